"""Workers in line, each with legs of a model: hidden states go from one to the next, and their gradients back."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from outsize.distributed.group import Group
from outsize.divided import HALVES, LOOP, V, leg_of, worker_of

HIDDEN = "activation"  # in the ledger
ON, BACK = 0, 1  # tags: of two workers the one before is the one after
BACKWARD, FORWARD, WEIGHTS = 0, 1, 2
Turn = tuple[int, int, int]
"""(forward, or backward; in which lap; of which micro-batch). Where backward is in two halves it is the first, and what finds
the gradients of weights a turn of its own."""


def order_of(schedule: str, workers: int, worker: int, micro_batches: int, laps: int = 1) -> list[Turn]:
    """What a worker does in a step, one thing after the other. With several legs each, micro-batches go through all workers
    in as many `laps`.

    `gpipe` (arXiv 1811.06965): all forward, then all backward. `1f1b` (PipeDream-Flush, arXiv 2006.09503): once the first has
    come back, each forward follows a backward, so that no more are under way than workers follow. `interleaved` (arXiv
    2104.04473): so, too, in laps; micro-batches take a lap in groups of as many as there are workers, or a few more. `v`
    (ZB-V, arXiv 2401.10241, with backward in one piece): two laps, there and back; `zero-bubble`: so, too, in halves. As
    `torch.distributed.pipelining` has them, whose import alone takes 73 MiB of each worker's memory."""
    if schedule in (V, HALVES):
        order = _there_and_back(workers, worker, micro_batches)
        return order if schedule == HALVES else [turn for turn in order if turn[0] != WEIGHTS]
    count = max(micro_batches // workers, 1) if schedule == "interleaved" else 1
    cuts = [-(-micro_batches * number // count) for number in range(count + 1)]
    groups = [range(*cut) for cut in pairwise(cuts)]
    on = [(FORWARD, lap, number) for group in groups for lap in range(laps) for number in group]
    back = [(BACKWARD, lap, number) for group in groups for lap in reversed(range(laps)) for number in group]
    ahead = {
        "gpipe": len(on),
        "1f1b": workers - worker,
        "interleaved": (laps - 1) * len(groups[0]) + 2 * (workers - 1 - worker) + 1,
    }[schedule]
    order = on[:ahead]
    for number, turn in enumerate(back):
        order += [turn, *on[ahead + number : ahead + number + 1]]
    return order


def _there_and_back(workers: int, worker: int, micro_batches: int) -> list[Turn]:
    """Of all workers each holds as many micro-batches: who has the first leg has the last one, too."""
    on, on_again, back_again, back = (FORWARD, 0), (FORWARD, 1), (BACKWARD, 1), (BACKWARD, 0)
    own, own_again = (WEIGHTS, 0), (WEIGHTS, 1)
    after, full = workers - worker, max(2 * workers - 1, micro_batches)  # fewer leave turns out
    again = [on_again, back_again, own_again]
    order = [on] * (2 * after - 1) + [on_again, on] * worker + again * after
    order += [on, back, own, *again] * (full + worker + 1 - 2 * workers) + [back, own, *again] * (after - 1)
    order += [back, back_again] * worker + [back, own] * after + [own_again] * worker + [own] * worker
    seen: Counter[tuple[int, int]] = Counter()
    turns = []
    for turn in order:
        turns.append((*turn, seen[turn]))
        seen[turn] += 1
    return [turn for turn in turns if turn[2] < micro_batches]


def returning(laps: int) -> int:
    """How many gradients may be on their way from a worker at once, the fewest with which no two workers wait for each other
    for ever: in laps, whoever is to take one may first be waiting for the next."""
    return min(laps, 2)


class Pipeline:
    """Of one worker, who has the whole model."""

    rank, size = 0, 1
    end = 0
    """Who has the last leg."""

    def take(self, like: torch.Tensor, lap: int) -> torch.Tensor:
        """Hidden states of the shape of `like`, from who has the leg before that of this `lap`."""
        return like

    def take_back(self, like: torch.Tensor, lap: int) -> torch.Tensor:
        """The gradient of what went to who has the leg after it."""
        return like

    def pass_on(self, hidden: torch.Tensor, lap: int) -> Callable[[], None]:
        """Hidden states for who has the leg after it; what is returned waits until they have gone."""
        return lambda: None

    def pass_back(self, gradient: torch.Tensor, lap: int) -> Callable[[], None]:
        """To who has the leg before it, as `pass_on`."""
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
        return self.rank == self.end


class Line(Pipeline):
    """Of the workers of `group`, in their order; where there are more legs, the way through them is of this `shape`."""

    def __init__(self, group: Group, shape: str = LOOP) -> None:
        self.rank, self.size, self._group, self._shape = group.rank, group.size, group, shape
        self.end = self.size - 1 if shape == LOOP else 0
        self._own: dict[int, deque[torch.Tensor]] = {ON: deque(), BACK: deque()}  # where a leg of its own comes next

    def take(self, like: torch.Tensor, lap: int) -> torch.Tensor:
        return self._take(like, self._at(lap, -1), ON)

    def take_back(self, like: torch.Tensor, lap: int) -> torch.Tensor:
        return self._take(like, self._at(lap, 1), BACK)

    def pass_on(self, hidden: torch.Tensor, lap: int) -> Callable[[], None]:
        return self._pass(hidden.detach(), self._at(lap, 1), ON)

    def pass_back(self, gradient: torch.Tensor, lap: int) -> Callable[[], None]:
        return self._pass(gradient, self._at(lap, -1), BACK)

    def _at(self, lap: int, beside: int) -> int:
        """Who has the leg that is so many further than that of this lap."""
        return worker_of(leg_of(self.rank, lap, self.size, self._shape) + beside, self.size, self._shape)

    def _take(self, like: torch.Tensor, peer: int, tag: int) -> torch.Tensor:
        if peer == self.rank:
            return self._own[tag].popleft()
        return self._group.take(peer, torch.empty_like(like).contiguous(), HIDDEN, tag)

    def _pass(self, data: torch.Tensor, peer: int, tag: int) -> Callable[[], None]:
        if peer == self.rank:
            self._own[tag].append(data)
            return lambda: None
        return self._group.pass_on(peer, data.contiguous(), HIDDEN, tag)

    @contextmanager
    def both_ends(self, gradient: torch.Tensor) -> Iterator[None]:
        if self.first and self.last:
            yield
        elif self.last:  # the order of one worker's sum: first the head's part, then the embedding's
            self._group.pass_on(0, gradient, "gradient")()
            yield
            self._group.take(0, gradient, "gradient")
        else:
            self._group.take(self.size - 1, gradient, "gradient")
            yield
            self._group.pass_on(self.size - 1, gradient, "gradient")()

    def norm(self, own: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.tensor(self._group.each(float(own))))
