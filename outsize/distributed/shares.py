"""Which elements of a block are whose: each worker updates its share, and keeps the optimizer's state of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from outsize.distributed.arrangement import ALONE, Arrangement
from outsize.errors import OptionError

ALIGNED = 64  # elements; pieces that begin at a multiple of it are updated with the bits of the whole (is_elementwise)


@dataclass(frozen=True)
class Shares:
    """Elements of a flat tensor by worker. `stages[0]` are the shares, no element in two of them, any of them empty;
    `stages[n]` is what each worker has when it has exchanged over the n slowest kinds of link: in the end all."""

    stages: tuple[tuple[range, ...], ...]
    rank: int

    @classmethod
    def of(cls, spans: Iterable[range], arrangement: Arrangement) -> Shares:
        """Each worker is given one of the `spans`."""
        stages = [tuple(spans)]
        for level in reversed(range(len(arrangement.levels))):
            last, ranks = stages[-1], range(arrangement.size)
            stages.append(tuple(_together(last[peer] for peer in arrangement.circle(level, rank)) for rank in ranks))
        return cls(tuple(stages), arrangement.rank)

    @property
    def own(self) -> range:
        return self.stages[0][self.rank]

    @property
    def numel(self) -> int:
        """Of the tensor."""
        return len(self.stages[-1][self.rank])

    def at(self, stage: int) -> range:
        """What this worker has after so many exchanges."""
        return self.stages[stage][self.rank]

    @property
    def all_own(self) -> bool:
        """This worker has everything: it is alone, or nobody else has a part of this tensor."""
        return len(self.own) == self.numel

    @property
    def divided(self) -> bool:
        """Several workers have a part."""
        return sum(len(span) > 0 for span in self.stages[0]) > 1


def sole_share(numel: int, owner: int, arrangement: Arrangement = ALONE) -> Shares:
    """Everything is `owner`'s."""
    spans = (range(numel) if rank == owner else range(0) for rank in range(arrangement.size))
    return Shares.of(spans, arrangement)


def cut_shares(numel: int, arrangement: Arrangement = ALONE, parts: Sequence[int] = ()) -> Shares:
    """Runs as long as the workers' `parts` say, equally long if there are none: cut at the next multiple of ALIGNED, so that
    some may be shorter or empty."""
    parts = parts or (1,) * arrangement.size
    by_slot = sorted(range(arrangement.size), key=arrangement.slot)
    whole = ALIGNED * sum(parts)
    ends = (min(numel, -(-numel * end // whole) * ALIGNED) for end in accumulate(parts[rank] for rank in by_slot))
    spans = dict(zip(by_slot, (range(start, end) for start, end in pairwise((0, *ends))), strict=True))
    return Shares.of((spans[rank] for rank in range(arrangement.size)), arrangement)


def _together(parts: Iterable[range]) -> range:
    """Of runs side by side."""
    some = [part for part in parts if part]
    return range(min(part.start for part in some), max(part.stop for part in some)) if some else range(0)


def in_proportion(count: int, speeds: Sequence[float]) -> tuple[int, ...]:
    """So many sequences, divided among workers of these speeds, one for each at least.

    Raises OptionError when there are fewer."""
    if count < len(speeds):
        raise OptionError(
            f"A step of {count} sequences leaves nothing to do for some of {len(speeds)} workers. Give a larger "
            "--batch-size or --accumulate, or fewer workers."
        )
    ends = [round(count * end / sum(speeds)) for end in accumulate(speeds)]
    found = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    while 0 in found:
        found[found.index(max(found))] -= 1
        found[found.index(0)] += 1
    return tuple(found)
