"""Workers in line, each with a leg of a model: hidden states go from one to the next, and their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from outsize.distributed.group import Group

HIDDEN = "activation"  # in the ledger
ON, BACK = 0, 1  # tags: of two workers the one before is the one after
Turn = tuple[bool, int, int]
"""(forward, or else backward; in which lap; of which micro-batch)."""


def order_of(schedule: str, workers: int, worker: int, micro_batches: int, laps: int = 1) -> list[Turn]:
    """What a worker does in a step, one thing after the other. With several legs each, micro-batches go through all workers
    in as many `laps`.

    `gpipe` (arXiv 1811.06965): all forward, then all backward. `1f1b` (PipeDream-Flush, arXiv 2006.09503): once the first has
    come back, each forward follows a backward, so that no more are under way than workers follow. `interleaved` (arXiv
    2104.04473): so, too, in laps; micro-batches take a lap in groups of as many as there are workers, or a few more. As
    `torch.distributed.pipelining` has them, whose import alone takes 73 MiB of each worker's memory."""
    count = max(micro_batches // workers, 1) if schedule == "interleaved" else 1
    cuts = [-(-micro_batches * number // count) for number in range(count + 1)]
    groups = [range(*cut) for cut in pairwise(cuts)]
    on = [(True, lap, number) for group in groups for lap in range(laps) for number in group]
    back = [(False, lap, number) for group in groups for lap in reversed(range(laps)) for number in group]
    ahead = {
        "gpipe": len(on),
        "1f1b": workers - worker,
        "interleaved": (laps - 1) * len(groups[0]) + 2 * (workers - 1 - worker) + 1,
    }[schedule]
    order = on[:ahead]
    for number, turn in enumerate(back):
        order += [turn, *on[ahead + number : ahead + number + 1]]
    return order


def returning(laps: int) -> int:
    """How many gradients may be on their way from a worker at once, the fewest with which no two workers wait for each other
    for ever: in laps, whoever is to take one may first be waiting for the next."""
    return min(laps, 2)


class Pipeline:
    """Of one worker, who has the whole model."""

    rank, size = 0, 1

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Hidden states of the shape of `like` from the worker before."""
        return like

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        """The gradient of what went to the worker after this one."""
        return like

    def pass_on(self, hidden: torch.Tensor) -> Callable[[], None]:
        """Hidden states for the worker after this one; what is returned waits until they have gone."""
        return lambda: None

    def pass_back(self, gradient: torch.Tensor) -> Callable[[], None]:
        """To the worker before, as `pass_on`."""
        return lambda: None

    @contextmanager
    def both_ends(self, gradient: torch.Tensor) -> Iterator[None]:
        """`gradient` is of a table that embedding and head share, as the head has left it; within, the embedding's part is
        added; afterwards it is the sum at both ends."""
        yield

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        """Of the norm of this leg's gradients, that of all."""
        return own

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def last(self) -> bool:
        return self.rank == self.size - 1


class Line(Pipeline):
    """Of the workers of `group`, in their order; with several legs each, after the last comes the first again."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group
        self._before, self._after = (self.rank - 1) % self.size, (self.rank + 1) % self.size

    def take(self, like: torch.Tensor) -> torch.Tensor:
        return self._group.take(self._before, torch.empty_like(like).contiguous(), HIDDEN, ON)

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        return self._group.take(self._after, torch.empty_like(like).contiguous(), HIDDEN, BACK)

    def pass_on(self, hidden: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self._after, hidden.detach().contiguous(), HIDDEN, ON)

    def pass_back(self, gradient: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self._before, gradient.contiguous(), HIDDEN, BACK)

    @contextmanager
    def both_ends(self, gradient: torch.Tensor) -> Iterator[None]:
        if self.last:  # the order of one worker's sum: first the head's part, then the embedding's
            self._group.pass_on(0, gradient, "gradient")()
            yield
            self._group.take(0, gradient, "gradient")
        else:
            self._group.take(self.size - 1, gradient, "gradient")
            yield
            self._group.pass_on(self.size - 1, gradient, "gradient")()

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.tensor(self._group.each(float(own))))
