"""Who is still there. Each worker counts up at the meeting point while it lives; whoever finds that another has stopped
counting, or that a process of its own machine is gone, ends its own, as the exchange that it waits in would not."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch._C._distributed_c10d import Store

from outsize.distributed.launch import CONTINUES
from outsize.errors import RunError
from outsize.machine.describe import which_boot

LOOK_EVERY = 1.0  # seconds
NOTICE = 1.0  # seconds in which all who live have noticed that one does not
STOPPED = 1  # exit code


class Watch:
    """A thread of worker `rank` of `size`. `patience`, in seconds, is for a worker that is stopped or cut off; of one that
    has died, the exchange tells at once, or else the system, if it was on this machine. `afterwards` is what to do when that
    has ended all."""

    def __init__(self, meeting: Store, rank: int, size: int, patience: float, afterwards: str = CONTINUES) -> None:
        self.rank, self._patience, self._afterwards = rank, patience, afterwards
        self._meeting: Store = meeting.clone()  # pyright: ignore[reportAttributeAccessIssue] - a connection of its own
        self._others = [peer for peer in range(size) if peer != rank]
        self._closing = threading.Event()
        self._processes: dict[int, int | None] = {}  # of the others; None: on another machine, or not to be seen
        self.on_end: Callable[[str], None] | None = None
        """Hears why the process is about to end. `NOTICE` seconds are left for what it does."""
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        self._thread.start()

    def lost(self, peer: int | None, problem: Exception) -> RunError:
        """What to raise when an exchange fails, with `peer` if that is known. It names the worker with whom it began: one
        whose process is gone, or else who does not say that it stops because of another. Who lives and computes has not
        noticed yet, and says nothing either: of such, the exchange knows best."""
        names, gone = [] if peer is None else [peer], list[int]()
        self._closing.set()
        try:
            self._meeting.set(_stops(self.rank), "")
            gone = [other for other in self._others if self._has_died(other)]  # before others end because of it
            time.sleep(NOTICE)
            if (said := self._failure()) is not None:
                return RunError(said)
            silent = [other for other in self._others if not self._meeting.check([_stops(other)])]
            gone = [other for other in gone if other in silent] or [o for o in silent if self._has_died(o)]
            names = gone or [other for other in names if other in silent] or silent or names
            if self.rank == 0:
                time.sleep(NOTICE)  # the meeting point ends with this process: let the others look
        except RuntimeError:  # the meeting point is gone too
            names = gone or names or [0]
        reason = str(problem).partition("\n")[0]
        return RunError(self._lost(names[0] if names else "?", reason))

    def _lost(self, peer: int | str, reason: str) -> str:
        return f"Worker {peer} is lost, and worker {self.rank} stops: {reason} {self._afterwards}"

    def fail(self, problem: Exception) -> None:
        """Tell the others why this worker stops, if it is not because of one of them."""
        if self._closing.is_set():
            return
        self._closing.set()
        with suppress(RuntimeError):
            self._meeting.set(_failed(self.rank), str(problem))
            end = time.monotonic() + 2 * LOOK_EVERY
            while self.rank == 0 and not self._all_know() and time.monotonic() < end:
                time.sleep(0.02)  # the meeting point ends with this process: let them look

    def _all_know(self) -> bool:
        """The others stop too: because of this worker, or for a reason of their own, which may be the same."""
        return all(self._meeting.check([_stops(peer)]) or self._meeting.check([_failed(peer)]) for peer in self._others)

    def _failure(self) -> str | None:
        """What another worker has said before it stopped."""
        for peer in self._others:
            if self._meeting.check([_failed(peer)]):
                said = self._meeting.get(_failed(peer)).decode()
                return f"Worker {peer} has stopped, and so does worker {self.rank}: {said}"
        return None

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        with suppress(RuntimeError):  # whoever has left may end
            self._meeting.set(_left(self.rank), "")

    def _has_died(self, peer: int) -> bool:
        if peer not in self._processes and self._meeting.check([_process(peer)]):
            where, _, number = self._meeting.get(_process(peer)).decode().rpartition(" ")
            here = bool(where) and where == _machine() and _runs(int(number))
            self._processes[peer] = int(number) if here else None
        process = self._processes.get(peer)
        return process is not None and not _runs(process) and not self._meeting.check([_left(peer)])

    def _look(self) -> None:
        # Counts, and the look that saw each first: who is stopped does not look.
        counts: dict[int, tuple[bytes, int]] = dict.fromkeys(self._others, (b"", 0))
        number, died = 0, set[int]()
        while not self._closing.wait(LOOK_EVERY):
            number += 1
            try:
                self._meeting.set(_alive(self.rank), str(number))
                if number == 1:
                    self._meeting.set(_process(self.rank), f"{_machine()} {os.getpid()}")
                for peer in self._others:
                    count = self._meeting.get(_alive(peer)) if self._meeting.check([_alive(peer)]) else b""
                    if count != counts[peer][0]:
                        counts[peer] = (count, number)
                said = self._failure()
                died, before = {peer for peer in self._others if self._has_died(peer)}, died
                gone = sorted(died & before)  # for a second it was the exchange's to tell
                gone = [peer for peer in gone if not self._meeting.check([_stops(peer)])] or gone
            except RuntimeError:
                return  # the meeting point has closed: whatever goes wrong now, exchanges will tell
            if gone and said is None:
                said = self._lost(gone[0], "its process has ended.")
            for peer, (_, since) in counts.items():
                if (number - since) * LOOK_EVERY > self._patience:
                    said = (
                        f"Worker {peer} has not moved for {self._patience:g} seconds, and worker {self.rank} stops. "
                        f"{self._afterwards}"
                    )
            if said is not None and not self._closing.is_set():
                with suppress(RuntimeError):
                    self._meeting.set(_stops(self.rank), "")
                with suppress(OSError):  # who would read it may be gone too
                    print(f"outsize: {said}", file=sys.stderr, flush=True)
                if self.on_end is not None:
                    self.on_end(said)
                    time.sleep(NOTICE)
                os._exit(STOPPED)


def _alive(rank: int) -> str:
    return f"alive {rank}"


def _stops(rank: int) -> str:
    return f"stops {rank}"


def _failed(rank: int) -> str:
    return f"failed {rank}"


def _left(rank: int) -> str:
    return f"left {rank}"


def _process(rank: int) -> str:
    return f"process {rank}"


def _machine() -> str:
    """Where a process is known by its number; empty where the system does not say."""
    try:
        return (boot := which_boot()) and boot + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # too many open files here say nothing of a process there
        return True
