"""The keeper: a process that does nothing but hold a run's shared memory open, so that the memory outlives the trainer.

Run as a script with the memory's file descriptor, in an interpreter without libraries: some 10 MiB. It has nothing to
tidy up, so it is ended with SIGKILL; and by itself when its run has had no trainer for an hour, or when the trainer died
before it had said on disk where its keeper is, and by one byte to this process that it has. `outsize.memory.shared` starts,
finds and ends it."""

from __future__ import annotations

import os
import sys
import time

OWNER = 8  # where in the memory the trainer says who it is: process id, and when that process started
PATIENCE = 3600  # seconds without a trainer
LOOK_EVERY = 1.0  # seconds


def started(process: int) -> int:
    """When a process started, in the kernel's ticks since boot: with the id, who it is. 0: it is dead."""
    try:
        with open(f"/proc/{process}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _has_trainer(memory: int) -> bool:
    said = os.pread(memory, 16, OWNER)
    return started(int.from_bytes(said[:8], "little")) == int.from_bytes(said[8:], "little")


def main() -> None:
    if not sys.stdin.buffer.read(1):
        return
    memory, alone = int(sys.argv[1]), 0.0
    while alone < PATIENCE:
        time.sleep(LOOK_EVERY)
        alone = 0.0 if _has_trainer(memory) else alone + LOOK_EVERY


if __name__ == "__main__":
    main()
