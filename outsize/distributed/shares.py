"""Which elements of a block are whose: each worker updates its share, and keeps the optimizer's state of it."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNED = 64  # elements; pieces that begin at a multiple of it are updated with the bits of the whole (is_elementwise)


@dataclass(frozen=True)
class Shares:
    """Elements of a flat tensor by worker, one after the other without gaps. Any of them may be empty."""

    spans: tuple[range, ...]
    rank: int

    @property
    def own(self) -> range:
        return self.spans[self.rank]

    @property
    def all_own(self) -> bool:
        """This worker has everything: it is alone, or nobody else has a part of this tensor."""
        return len(self.own) == self.spans[-1].stop

    @property
    def divided(self) -> bool:
        """Several workers have a part."""
        return sum(len(span) > 0 for span in self.spans) > 1


def sole_share(numel: int, owner: int, rank: int, workers: int) -> Shares:
    """Everything is `owner`'s."""
    ends = [0] * owner + [numel] * (workers - owner)
    return Shares(tuple(range(a, b) for a, b in zip([0, *ends], ends, strict=False)), rank)


def even_shares(numel: int, rank: int = 0, workers: int = 1) -> Shares:
    """Runs of equal length but for the last ones, which may be shorter or empty."""
    length = -(-numel // (ALIGNED * workers)) * ALIGNED
    starts = [min(numel, length * worker) for worker in range(workers + 1)]
    return Shares(tuple(range(a, b) for a, b in zip(starts, starts[1:], strict=False)), rank)
