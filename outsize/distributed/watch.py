"""Who is still there. Each worker counts up at the meeting point while it lives; whoever finds that another has stopped
counting ends its own process, as the exchange that it waits in would not."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch._C._distributed_c10d import Store

from outsize.distributed.launch import CONTINUES
from outsize.errors import RunError

LOOK_EVERY = 1.0  # seconds
NOTICE = 1.0  # seconds in which all who live have noticed that one does not
STOPPED = 1  # exit code


class Watch:
    """A thread of worker `rank` of `size`. `patience`, in seconds, is for a worker that is stopped or cut off; of one that
    has died, the exchange tells at once. `afterwards` is what to do when that has ended all."""

    def __init__(self, meeting: Store, rank: int, size: int, patience: float, afterwards: str = CONTINUES) -> None:
        self.rank, self._patience, self._afterwards = rank, patience, afterwards
        self._meeting: Store = meeting.clone()  # pyright: ignore[reportAttributeAccessIssue] - a connection of its own
        self._others = [peer for peer in range(size) if peer != rank]
        self._closing = threading.Event()
        self.on_end: Callable[[str], None] | None = None
        """Hears why the process is about to end. `NOTICE` seconds are left for what it does."""
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        self._thread.start()

    def lost(self, peer: int | None, problem: Exception) -> RunError:
        """What to raise when an exchange fails, with `peer` if that is known. It names the worker with whom it began, which
        is the one that does not say that it stops because of another."""
        names = [] if peer is None else [peer]
        self._closing.set()
        try:
            self._meeting.set(_stops(self.rank), "")
            time.sleep(NOTICE)
            if (said := self._failure()) is not None:
                return RunError(said)
            names = [other for other in self._others if not self._meeting.check([_stops(other)])] or names
        except RuntimeError:  # the meeting point is gone too
            names = names or [0]
        reason = str(problem).partition("\n")[0]
        return RunError(
            f"Worker {names[0] if names else '?'} is lost, and worker {self.rank} stops: {reason} {self._afterwards}"
        )

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

    def _look(self) -> None:
        # Counts, and the look that saw each first: who is stopped does not look.
        counts: dict[int, tuple[bytes, int]] = dict.fromkeys(self._others, (b"", 0))
        number = 0
        while not self._closing.wait(LOOK_EVERY):
            number += 1
            try:
                self._meeting.set(_alive(self.rank), str(number))
                for peer in self._others:
                    count = self._meeting.get(_alive(peer)) if self._meeting.check([_alive(peer)]) else b""
                    if count != counts[peer][0]:
                        counts[peer] = (count, number)
                said = self._failure()
            except RuntimeError:
                return  # the meeting point has closed: whatever goes wrong now, exchanges will tell
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
