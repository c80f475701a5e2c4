"""Workers in line, each with a leg of a model: hidden states go from one to the next, and their gradients back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from outsize.distributed.group import Group

HIDDEN = "activation"  # in the ledger


def order_of(schedule: str, legs: int, leg: int, micro_batches: int) -> list[tuple[bool, int]]:
    """What a worker does in a step, one thing after the other: (forward, or else backward; of which micro-batch).

    `gpipe` (arXiv 1811.06965): all forward, then all backward. `1f1b` (PipeDream-Flush, arXiv 2006.09503): once the first has
    come back, each forward follows a backward, so that no more are under way than workers follow. As
    `torch.distributed.pipelining` has them, whose import alone takes 73 MiB of each worker's memory."""
    ahead = micro_batches if schedule == "gpipe" else min(micro_batches, legs - leg)
    order = [(True, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append((False, number))
        if ahead + number < micro_batches:
            order.append((True, ahead + number))
    return order


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
    """Of the workers of `group`, in their order."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group

    def take(self, like: torch.Tensor) -> torch.Tensor:
        return self._take(self.rank - 1, torch.empty_like(like).contiguous())

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        return self._take(self.rank + 1, torch.empty_like(like).contiguous())

    def pass_on(self, hidden: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self.rank + 1, hidden.detach().contiguous(), HIDDEN)

    def pass_back(self, gradient: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self.rank - 1, gradient.contiguous(), HIDDEN)

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

    def _take(self, peer: int, into: torch.Tensor) -> torch.Tensor:
        return self._group.take(peer, into, HIDDEN)
