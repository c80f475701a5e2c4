"""Which workers are near each other: groups of groups, of which the inner ones have the faster links."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from outsize.errors import OptionError

CLOSE, PEER, REMOTE = "close", "peer", "remote"
"""Tiers: what workers hold who have faster links to this one than its node has; others of the node; those of other nodes."""
WIRE = (CLOSE, PEER, REMOTE)  # all that is on the other side of a wire


@dataclass(frozen=True)
class Arrangement:
    """The place of worker `rank`. `levels` are (tier, how many groups of the level before make one of this), the fastest
    links first: 2 workers that are close, 4 such pairs in a node, 4 nodes. Neighbours have successive ranks."""

    rank: int = 0
    levels: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, rank: int, workers: int, nodes: int = 1, close: int = 1) -> Arrangement:
        """So many workers, on as many nodes with equally many each, of whom `close` neighbours at a time have faster links to
        each other. Raises OptionError when a node's workers cannot be divided so."""
        here = workers // nodes
        if here % close:
            raise OptionError(
                f"{here} workers of a node cannot be groups of {close} that are close. Give another --close."
            )
        levels = ((CLOSE, close), (PEER, here // close), (REMOTE, nodes))
        return cls(rank, tuple((tier, size) for tier, size in levels if size > 1))

    @property
    def size(self) -> int:
        """Workers in all."""
        return self._within(len(self.levels))

    @property
    def nodes(self) -> int:
        return dict(self.levels).get(REMOTE, 1)

    @property
    def close(self) -> int:
        return dict(self.levels).get(CLOSE, 1)

    @property
    def copies(self) -> list[int]:
        """How many times all workers together may hold something that they divide, by stage of its shares: once, then one
        time for each circle over the slowest links, ..."""
        return [self.size // self._within(level) for level in reversed(range(len(self.levels) + 1))]

    def among(self, size: int) -> Arrangement:
        """The place among `size` neighbours, of whom all workers are so many groups. Raises OptionError when these are not
        alike."""
        levels, left = [], size
        for tier, count in self.levels:
            inner = min(count, left)
            if count % inner or left % inner:
                raise OptionError(
                    f"{size} workers of a leg cannot be alike on {self.nodes} nodes of {self.size // self.nodes} workers. "
                    f"Give another --legs or --workers{', or leave out --close' * (self.close > 1)}."
                )
            left //= inner
            levels += [(tier, inner)] * (inner > 1)
        return Arrangement(self.rank % size, tuple(levels))

    def stage_of(self, copies: int) -> int:
        """At which stage of their shares workers have so many copies of what they divide. Raises OptionError."""
        possible = self.copies[:-1]
        if copies not in possible:
            raise OptionError(
                f"{self.size} workers on {self.nodes} nodes cannot have {copies} copies of divided weights (weight_copies); "
                f"possible: {', '.join(map(str, possible)) or 'none'}."
            )
        return possible.index(copies)

    def tier(self, level: int) -> str:
        return self.levels[level][0]

    def tier_of(self, peer: int) -> str:
        """Where what another worker holds is, seen from here: over the slowest links on the way."""
        apart = (
            level for level in range(len(self.levels)) if self._digit(peer, level) != self._digit(self.rank, level)
        )
        return self.tier(max(apart, default=0))

    def circle(self, level: int, rank: int | None = None) -> range:
        """Those who exchange with this worker over the links of `level`, itself among them, in order: each stands in its own
        group where this one does in its."""
        rank, inner = self.rank if rank is None else rank, self._within(level)
        first = rank - self._digit(rank, level) * inner
        return range(first, first + self.levels[level][1] * inner, inner)

    def others(self, level: int) -> list[int]:
        """The circle without this worker."""
        return [peer for peer in self.circle(level) if peer != self.rank]

    def slot(self, rank: int) -> int:
        """Where a worker's share lies among all of equal length, so that those of each circle over the slowest links lie side
        by side; then those of the circles over the next faster ones."""
        found = 0
        for level, (_, size) in enumerate(self.levels):
            found = found * size + self._digit(rank, level)
        return found

    def _within(self, level: int) -> int:
        """Workers of one group whose links are all faster than those of `level`."""
        return prod(size for _, size in self.levels[:level])

    def _digit(self, rank: int, level: int) -> int:
        return rank // self._within(level) % self.levels[level][1]


ALONE = Arrangement()
