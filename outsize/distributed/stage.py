"""A worker's place in a pipeline, in which each has other units of a model and hidden states go from stage to stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from outsize.distributed.group import Group

HIDDEN = "activation"  # in the ledger


def order_of(pipeline: str, stages: int, stage: int, micro_batches: int) -> list[tuple[bool, int]]:
    """What a stage does in a step, one after the other: (forward, or else backward; of which micro-batch).

    `gpipe` (arXiv 1811.06965): all forward, then all backward. `1f1b` (PipeDream-Flush, arXiv 2006.09503): once the first has
    come back, each forward follows a backward, so that a stage holds what as many leave behind as stages follow it. As
    `torch.distributed.pipelining` has them, whose import alone takes 73 MiB of each worker's memory."""
    ahead = micro_batches if pipeline == "gpipe" else min(micro_batches, stages - stage)
    order = [(True, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append((False, number))
        if ahead + number < micro_batches:
            order.append((True, ahead + number))
    return order


class Stage:
    """The only one: it has the whole model."""

    index, count = 0, 1

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Hidden states of the shape of `like` from the stage before."""
        return like

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        """The gradient of what went to the stage after this one."""
        return like

    def pass_on(self, hidden: torch.Tensor) -> Callable[[], None]:
        """Hidden states for the stage after this one; what is returned waits until they have gone."""
        return lambda: None

    def pass_back(self, gradient: torch.Tensor) -> Callable[[], None]:
        """To the stage before, as `pass_on`."""
        return lambda: None

    @contextmanager
    def both_ends(self, gradient: torch.Tensor) -> Iterator[None]:
        """`gradient` is of a table that embedding and head share, as the head has left it; within, the embedding's part is
        added; afterwards it is the sum at both ends."""
        yield

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        """Of the norm of this stage's gradients, that of all."""
        return own

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.count - 1


class OneOf(Stage):
    """The stage of a worker of `group`, of whom each has one."""

    def __init__(self, group: Group) -> None:
        self.index, self.count, self._group = group.rank, group.size, group

    def take(self, like: torch.Tensor) -> torch.Tensor:
        return self._take(self.index - 1, torch.empty_like(like).contiguous())

    def take_back(self, like: torch.Tensor) -> torch.Tensor:
        return self._take(self.index + 1, torch.empty_like(like).contiguous())

    def pass_on(self, hidden: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self.index + 1, hidden.detach().contiguous(), HIDDEN)

    def pass_back(self, gradient: torch.Tensor) -> Callable[[], None]:
        return self._group.pass_on(self.index - 1, gradient.contiguous(), HIDDEN)

    @contextmanager
    def both_ends(self, gradient: torch.Tensor) -> Iterator[None]:
        if self.last:  # the order of one worker's sum: first the head's part, then the embedding's
            self._group.pass_on(0, gradient, "gradient")()
            yield
            self._group.take(0, gradient, "gradient")
        else:
            self._group.take(self.count - 1, gradient, "gradient")
            yield
            self._group.pass_on(self.count - 1, gradient, "gradient")()

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.tensor(self._group.each(float(own))))

    def _take(self, peer: int, into: torch.Tensor) -> torch.Tensor:
        return self._group.take(peer, into, HIDDEN)
