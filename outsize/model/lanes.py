"""Micro-batches that take turns: each runs the unchanged model on a stack of its own, one at a time, and passes the turn on
whenever it has been through a unit. So all of them go through it while its weights are near (vertical scheduling:
GreedySnake, arXiv 2512.17570), without a line of the model being rewritten.

They are greenlets of one thread, and not threads: OpenMP keeps helpers for each thread that computes, of which none may spin
when they are more than the processors, and to wake one takes as long as a small operation (docs/log.md, Memory)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from greenlet import getcurrent, greenlet

from outsize.errors import ModelError

Result = TypeVar("Result")


class Lanes:
    """A ring of lanes, `count` of them on their way, one running; `on_turn` is called whenever it is another one. A single
    lane runs as its caller, and `pass_turn` does nothing."""

    def __init__(self, on_turn: Callable[[], None] = lambda: None) -> None:
        self.count = 1
        self.current = 0
        self._on_turn = on_turn
        self._caller: greenlet | None = None
        self._around: tuple[Any, ...] = ()

    def run(self, bodies: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run every body as a lane and return their results in order. The first exception of any is raised here.

        In each round the last lane is the first: autograd goes back from what was made last, and so comes to the lanes'
        parts of a unit in the order in which a loop over them would."""
        if len(bodies) == 1:
            return [bodies[0]()]
        lanes, results = [greenlet(body) for body in bodies], dict[int, Result]()
        waiting = deque(reversed(range(len(bodies))))
        try:
            self._caller, self._around, self.count = getcurrent(), _opened(), len(bodies)
            while waiting:
                number = waiting.popleft()
                found = self._give_turn(number, lanes[number])
                if lanes[number].dead:
                    results[number] = found
                else:
                    waiting.append(number)
        finally:
            self._caller, self.count = None, 1
            with ExitStack() as ending:  # each leaves what it is in the middle of, whatever goes wrong in others
                ending.callback(self._turn_to, 0)
                for lane in lanes:
                    ending.callback(lane.throw)  # nothing to one that has ended
        return [results[number] for number in range(len(bodies))]

    def back(self, begins: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        """Backward of all lanes, from what each has given and its gradient: through a unit of each after the other."""
        self.count = len(begins)
        try:
            torch.autograd.backward([begin for begin, _ in begins], [gradient for _, gradient in begins])
        except BaseException:
            # Nodes that were about to run stay in the engine's queue, and with them the graph, till other work comes.
            torch.zeros(1, requires_grad=True).sum().backward()
            raise
        finally:
            self.count = 1

    def pass_turn(self) -> None:
        """Let the next lane run; returns when it is this lane's turn again."""
        if self._caller is None:
            return
        if _opened() != self._around:
            raise ModelError(
                "The model keeps a mode or autograd's hooks around several of its units (its own gradient checkpointing?), "
                "which other micro-batches would run within. Turn that off, or train with one micro-batch (--accumulate 1)."
            )
        computes = _arithmetic()
        self._caller.switch()
        _restore(*computes)

    def _give_turn(self, number: int, lane: greenlet) -> Any:
        computes = _arithmetic()
        self._turn_to(number)
        try:
            return lane.switch()
        finally:
            _restore(*computes)

    def _turn_to(self, number: int) -> None:
        self.current = number
        self._on_turn()


def _opened() -> tuple[Any, ...]:
    """What the thread has open, besides what `_arithmetic` says."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), hooks


def _arithmetic() -> tuple[Any, ...]:
    """How the thread computes: a lane may have set it otherwise."""
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), *kinds


def _restore(gradients: bool, *kinds: tuple[str, bool, torch.dtype]) -> None:
    torch.set_grad_enabled(gradients)
    for kind, enabled, dtype in kinds:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
