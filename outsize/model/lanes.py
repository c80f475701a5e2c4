"""Micro-batches that take turns: each runs the unchanged model in a thread of its own, one at a time, and passes the
turn on whenever it arrives at another unit. So all of them go through a unit while its weights are near (vertical
scheduling: GreedySnake, arXiv 2512.17570), without a line of the model being rewritten."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from outsize.machine.threads import start_computing

Result = TypeVar("Result")


class LaneStopped(BaseException):
    """Raised inside a lane when another lane failed, so that its thread ends."""


class Lanes:
    """A ring of lanes; exactly one runs. A single lane runs in the caller's thread and `pass_turn` does nothing."""

    def __init__(self) -> None:
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext  # what every lane's thread works within
        self.count = 1
        self.current = 0
        self._turn = threading.Condition()
        self._alive: list[int] = []
        self._failure: BaseException | None = None

    def run(self, bodies: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run every body as a lane and return their results in order. The first exception of any is raised here."""
        if len(bodies) == 1:
            return [bodies[0]()]
        self.count, self.current, self._failure = len(bodies), 0, None
        try:
            return self._take_turns(bodies)
        finally:
            self.count, self.current = 1, 0  # whoever runs the model now does so alone
            self._failure = None  # its traceback holds the graph

    def _take_turns(self, bodies: Sequence[Callable[[], Result]]) -> list[Result]:
        results: list[Result | None] = [None] * len(bodies)
        self._alive = list(range(len(bodies)))

        def lane(index: int) -> None:
            try:
                self._await_turn(index)
                with self.around():
                    results[index] = bodies[index]()
            except LaneStopped:
                pass
            except BaseException as failure:
                self._failure = self._failure or failure
            finally:
                self._leave(index)

        threads: list[threading.Thread] = []
        try:
            for index in range(len(bodies)):
                threads.append(start_computing(partial(lane, index), f"lane {index}"))
            for thread in threads:
                thread.join()
        except BaseException as interrupt:  # Ctrl-C reaches only the caller's thread
            self._failure = interrupt
            for thread in threads:
                thread.join()
        if self._failure is not None:
            raise self._failure
        return results  # type: ignore[return-value]  # every lane finished, so none is None by accident

    def pass_turn(self) -> None:
        """Let the next lane run; returns when it is this lane's turn again."""
        if self.count == 1:
            return
        with self._turn:
            index = self.current
            self.current = self._after(index)
            self._turn.notify_all()
        self._await_turn(index)

    def _after(self, index: int) -> int:
        later = [other for other in self._alive if other > index]
        return later[0] if later else self._alive[0]

    def _await_turn(self, index: int) -> None:
        with self._turn:
            self._turn.wait_for(lambda: self.current == index)
        if self._failure is not None:
            raise LaneStopped

    def _leave(self, index: int) -> None:
        with self._turn:
            if len(self._alive) > 1:
                self.current = self._after(index)
            self._alive.remove(index)
            self._turn.notify_all()
