"""Bytes on their way: a few threads that read and write extents while compute goes on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from outsize.memory.clock import Clock
from outsize.memory.tier import Extent, Moves

PIECE = 16 << 20  # bytes; reads are cut so that the threads share them and the first asked for is there first
Then = Callable[[BaseException | None], None]


class Ticket:
    """A transfer's receipt. `wait` returns when it is complete and raises what went wrong, each time."""

    def __init__(self, pieces: int = 1, then: Then | None = None) -> None:
        self._left, self._then = pieces, then
        self._error: BaseException | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        """Complete, or failed."""
        return self._finished.is_set()

    def wait(self) -> None:
        """Block until it is done. Raises what the transfer raised, a StorageError for instance."""
        self._finished.wait()
        if self._error is not None:
            raise self._error

    def piece_done(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._finished.set()
            if self._then is not None:
                self._then(self._error)


class Transfers:
    """`readers` threads share a queue of pieces, first come first served. One writer keeps the order of
    writes, so that what runs `after_writes` separates those before it from those after.

    The threads are daemons: Ctrl-C ends the process whatever they do. `bytes` counts what was moved and
    `busy_seconds` how long the threads of a direction worked, added up, which two readers can make more
    than the time that passed."""

    def __init__(self, readers: int = 2) -> None:
        self.clock = Clock()
        self.busy_seconds = {"read": 0.0, "write": 0.0}
        self.bytes = {"read": 0, "write": 0}
        self._lock = threading.Lock()
        # A condition for each direction: a new piece wakes one thread that can take it, and no other.
        self._arrivals = {name: threading.Condition(self._lock) for name in ("read", "write")}
        self._queues: dict[str, deque[tuple[Callable[[], None], int, Ticket]]]
        self._queues = {"read": deque(), "write": deque()}
        self._failure: BaseException | None = None  # of the writer, or of somebody's `then`; it stays
        self._closing = False
        # A thread begins with the first device, and would make a context there.
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        names = ["read"] * readers + ["write"]
        self._threads = [threading.Thread(target=self._work, args=(name,), daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def read(
        self,
        tier: Moves,
        extent: Extent,
        offset: int,
        target: torch.Tensor,
        then: Then | None = None,
        fence: Any = None,
    ) -> Ticket:
        """Fill `target` (1-D uint8, on the host or a CUDA device), and begin only when `fence`, a CUDA event,
        has passed.

        A thread calls `then(error or None)` when all is there; it must not raise."""
        starts = range(0, max(target.numel(), 1), PIECE)
        ticket = Ticket(len(starts), then)
        for start in starts:
            part = target[start : start + PIECE]
            self._submit("read", tier.read, (extent, offset + start, part), fence, ticket)
        return ticket

    def write(
        self,
        tier: Moves,
        extent: Extent,
        offset: int,
        source: torch.Tensor,
        then: Then | None = None,
        fence: Any = None,
    ) -> Ticket:
        """Store `source`, which nobody may change until the ticket is done. Writes happen in the order
        submitted, and none after one that failed: it might be in the place of what a commit that failed still needs.

        `then` and `fence` as for `read`."""
        ticket = Ticket(1, then)
        self._submit("write", tier.write, (extent, offset, source), fence, ticket)
        return ticket

    def after_writes(self, function: Callable[[], None]) -> Ticket:
        """Run `function` in the writer when every write submitted so far is complete and none after has
        begun.

        If any write ever failed the function does not run, and the ticket raises that failure."""

        def run() -> None:
            self._raise_failure()
            function()

        ticket = Ticket()
        self._queue("write", run, 0, ticket)
        return ticket

    def drain(self) -> None:
        """Wait until every write submitted so far is complete. Raises the first failure of any."""
        self.after_writes(lambda: None).wait()

    def close(self) -> None:
        """Finish what was submitted, then end the threads. Raises nothing: only `drain` tells that all
        went well."""
        with self._lock:
            self._closing = True
            for arrivals in self._arrivals.values():
                arrivals.notify_all()
        for thread in self._threads:
            thread.join()

    def _submit(
        self,
        direction: str,
        move: Callable[[Extent, int, torch.Tensor], None],
        what: tuple[Extent, int, torch.Tensor],
        fence: Any,
        ticket: Ticket,
    ) -> None:
        def job() -> None:
            if direction == "write":
                self._raise_failure()
            if fence is not None:
                fence.synchronize()
            move(*what)

        self._queue(direction, job, what[2].numel(), ticket)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _queue(self, direction: str, job: Callable[[], None], nbytes: int, ticket: Ticket) -> None:
        with self._lock:
            if self._closing:
                raise RuntimeError("the transfers are closed")
            self._queues[direction].append((job, nbytes, ticket))
            self._arrivals[direction].notify()

    def _work(self, direction: str) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while (item := self._next(direction)) is not None:
            job, nbytes, ticket = item
            started = self.clock.now()
            error = _error_of(job)
            with self._lock:
                self.busy_seconds[direction] += self.clock.note(direction, started)
                self.bytes[direction] += 0 if error else nbytes
                if direction == "write":
                    self._failure = self._failure or error
            broken = _error_of(lambda ticket=ticket, error=error: ticket.piece_done(error))
            if broken is not None:
                with self._lock:
                    self._failure = self._failure or broken
            del item, job, ticket, error, broken  # an idle thread must not keep a slab alive

    def _next(self, direction: str) -> tuple[Callable[[], None], int, Ticket] | None:
        """Wait for work. None when there is none left and none will come."""
        queue = self._queues[direction]
        with self._lock:
            self._arrivals[direction].wait_for(lambda: queue or self._closing)
            return queue.popleft() if queue else None


def _error_of(function: Callable[[], None]) -> BaseException | None:
    try:
        function()
    except BaseException as error:
        return error
    return None
