"""One thread at a time in a store, what it waits for there, and the first failure, which ends every wait."""

from __future__ import annotations

import threading
from collections.abc import Callable

from outsize.memory.clock import Clock


class Turn:
    """A lock that may be taken again by who has it. `waiting_seconds`: what waits inside took, by what was waited for."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waiting_seconds = {"read": 0.0, "write": 0.0}
        self._changed = threading.Condition(threading.RLock())
        self._failure: BaseException | None = None

    def __enter__(self) -> None:
        self._changed.acquire()

    def __exit__(self, *_: object) -> None:
        self._changed.release()

    def wait(self, direction: str) -> None:
        """Let others in until something has changed. Raises what went wrong with any transfer, though it be over."""
        started = self.clock.now()
        self.clock.wait(self._changed)
        self.waited(direction, started)
        self.check()

    def wait_while(self, busy: Callable[[], bool], direction: str) -> None:
        """As `wait`, until it is not busy; one wait, however often something changes."""
        if busy():
            started = self.clock.now()
            while busy() and self._failure is None:
                self.clock.wait(self._changed)
            self.waited(direction, started)
        self.check()

    def waited(self, direction: str, started: float) -> None:
        """Since `started` there was nothing else to do."""
        self.waiting_seconds[direction] += self.clock.note("waiting", started)

    def notify(self, error: BaseException | None = None) -> None:
        """Who waits looks again. The first error stays."""
        self._failure = self._failure or error
        self._changed.notify_all()

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self._failure is not None:
            raise self._failure
