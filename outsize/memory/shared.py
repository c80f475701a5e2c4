"""Near memory that outlives the process: the blocks of a run whose state stays in memory, as of its last complete step.

Every block lies beside a *twin*. A published step is in the blocks themselves until one of them is about to change: its
bytes are copied to the twin first (`save`), and the block is marked with the number of what was published. So at every
instant each block's published bytes are in one of the two, and the mark says in which. `publish` makes what the blocks
hold now the published step, by one number: it copies nothing, and every mark is void.

The memory has no name: it lives as long as a process holds it, which is what the keeper is for. Linux only."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from outsize.errors import BudgetError, StorageError
from outsize.memory import keeper
from outsize.memory.block import Block
from outsize.memory.tier import PAGE

AVAILABLE = hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
NAME = "outsize-state-1"  # as /proc shows the memory; with the version of what follows
KEEPER = "keeper"  # the file in the state's folder that says where the memory is

# Where in the memory things lie. Only what was written takes memory, so there is room for whatever is said.
PUBLISHED = keeper.OWNER + 16  # 8 bytes
MARKS = PAGE  # 8 bytes for each block
SAID = 1 << 30  # two places, used in turn: length, then bytes
BLOCKS = 3 << 30


class Shared:
    """Memory for `nbytes` of blocks and as much for their twins, which the run whose state is in `folder` finds again.

    One thread at a time places, saves and publishes."""

    def __init__(self, folder: Path, nbytes: int, memory: int | None = None) -> None:
        """`memory` is a descriptor of what another process has made; without it, memory is made.

        Raises BudgetError when the operating system refuses."""
        self.nbytes, self._folder = nbytes, folder
        try:
            self._memory = os.memfd_create(NAME, os.MFD_CLOEXEC) if memory is None else memory
            if memory is None:
                os.ftruncate(self._memory, BLOCKS + 2 * nbytes)
            self._all = torch.frombuffer(mmap.mmap(self._memory, 2 * nbytes, offset=BLOCKS), dtype=torch.uint8)
        except OSError as problem:
            raise BudgetError(f"The operating system has no shared memory to give ({problem}).") from problem
        self._put(keeper.OWNER + 8, keeper.started(os.getpid()))
        self._put(keeper.OWNER, os.getpid())
        self.published = self._get(PUBLISHED)
        """The number of the last published step; 0 before the first."""
        self._places: dict[str, tuple[int, torch.Tensor, torch.Tensor]] = {}  # number, bytes, bytes of the twin
        self._end = 0
        self._process: subprocess.Popen[bytes] | None = None

    # -- blocks -----------------------------------------------------------------------------------------------------

    def place(self, block: Block) -> torch.Tensor:
        """The block's memory, 1-D uint8, with its published bytes, if a step was published. Every process places the same
        blocks in the same order."""
        middle, end = self._end + block.nbytes, self._end + 2 * block.nbytes
        assert end <= self._all.numel(), "the plan has counted fewer blocks"
        number, here, twin = len(self._places), self._all[self._end : middle], self._all[middle:end]
        self._places[block.name] = number, here, twin
        self._end = end
        if self.published and self._is_saved(number):
            here.copy_(twin)
        return here

    def save(self, name: str) -> None:
        """The block is about to change: its published bytes go to the twin, unless they are there."""
        number, here, twin = self._places[name]
        if not self._is_saved(number):
            twin.copy_(here)
            self._put(MARKS + 8 * number, self.published)

    def _is_saved(self, number: int) -> bool:
        """Also when nothing was ever published: there is nothing to save."""
        return self._get(MARKS + 8 * number) == self.published

    def find_all(self, blocks: Iterable[Block]) -> dict[str, int]:
        """Where `read` finds the published bytes of `blocks`: all, in their order."""
        found, start = {}, BLOCKS
        for number, block in enumerate(blocks):
            found[block.name] = start + (block.nbytes if self._is_saved(number) else 0)
            start += 2 * block.nbytes
        return found

    def read(self, start: int, target: torch.Tensor) -> None:
        """Fill `target` (1-D uint8) without having what is read count as memory of this process."""
        view, done = memoryview(target.numpy()), 0  # pyright: ignore[reportArgumentType]
        while done < len(view):
            done += os.preadv(self._memory, [view[done:]], start + done)

    # -- steps ------------------------------------------------------------------------------------------------------

    def publish(self, said: bytes) -> None:
        """What the blocks hold now is what `find` finds from now on, and `said` is what is said of it."""
        place = self._place_of_said(self.published + 1)
        os.pwrite(self._memory, said, place + 8)
        self._put(place, len(said))
        self._put(PUBLISHED, self.published + 1)
        self.published += 1
        if self.published == 1:
            self._process = _start_keeper(self._memory, self._folder)

    def said(self) -> bytes:
        """What was said of the published step."""
        place = self._place_of_said(self.published)
        return os.pread(self._memory, self._get(place), place + 8)

    def _place_of_said(self, number: int) -> int:
        return SAID * (1 + number % 2)

    def _get(self, offset: int) -> int:
        return int.from_bytes(os.pread(self._memory, 8, offset), "little")

    def _put(self, offset: int, value: int) -> None:
        os.pwrite(self._memory, value.to_bytes(8, "little"), offset)

    def dismiss(self) -> None:
        """End the keeper: from now on the memory lives as long as this process uses it."""
        dismiss(self._folder)
        if self._process is not None:
            self._process.wait()

    def close(self) -> None:
        """Let go of the memory; it is there until the last view of it dies, and as long as a keeper lives."""
        self._places.clear()
        self._all = self._all[:0].clone()
        os.close(self._memory)


def _start_keeper(memory: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(Path(keeper.__file__)), str(memory)]
    pipe, silent = subprocess.PIPE, subprocess.DEVNULL
    process = subprocess.Popen(
        command, pass_fds=[memory], start_new_session=True, cwd="/", stdin=pipe, stdout=silent, stderr=silent
    )
    assert process.stdin is not None
    said = {"process": process.pid, "started": keeper.started(process.pid), "memory": memory, "of": _identity(folder)}
    partial = folder / f"{KEEPER}.partial"
    try:
        partial.write_text(json.dumps(said))
        os.replace(partial, folder / KEEPER)
    except OSError as problem:
        process.stdin.close()  # so it ends
        raise StorageError(
            f"{partial} could not be written: {problem.strerror}. Free space, and start again."
        ) from problem
    with process.stdin as told:
        told.write(b".")  # until then it ends with this process: nobody would find it
    return process


def find(folder: Path) -> Shared | None:
    """What the run whose state is in `folder` has published, if its keeper lives. Call it with the run's lock."""
    said = _read(folder)
    if said is None:
        return None
    try:
        path = f"/proc/{said['process']}/fd/{said['memory']}"
        if not os.readlink(path).startswith(f"/memfd:{NAME}"):
            return None
        memory = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    return Shared(folder, (os.fstat(memory).st_size - BLOCKS) // 2, memory)


def dismiss(folder: Path) -> None:
    """End the keeper of the run whose state is in `folder`, if there is one. Call it with the run's lock."""
    said = _read(folder)
    if said is not None:
        with suppress(ProcessLookupError):
            process = os.pidfd_open(said["process"])
            if keeper.started(said["process"]) == said["started"]:  # asked while the descriptor holds on to the process
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)
    (folder / KEEPER).unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any] | None:
    """What the keeper's file says, if that process lives and is this folder's: a copied folder has a file of another."""
    try:
        said = json.loads((folder / KEEPER).read_text())
        right = keeper.started(said["process"]) == said["started"] > 0 and said["of"] == _identity(folder)
        return said if right else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(folder: Path) -> list[int]:
    """What stays when a folder is moved within a file system, and differs for a copy."""
    found = folder.stat()
    return [found.st_dev, found.st_ino]
