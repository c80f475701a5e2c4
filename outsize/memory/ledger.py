"""The count of every byte held and moved, by tier, kind and direction, with peaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from threading import Lock


class Ledger:
    """`held[tier, kind]` is bytes there now, `peak[tier]` the most there ever was,
    `moved[source, destination, kind]` bytes carried since the start."""

    def __init__(self) -> None:
        self.held: Counter[tuple[str, str]] = Counter()
        self.peak: Counter[str] = Counter()
        self.moved: Counter[tuple[str, str, str]] = Counter()
        self._sums: Counter[str] = Counter()  # of `held`, by tier
        self.adopted: Counter[str] = Counter()  # by tier: bytes of `held` that a library keeps, in a form of its own
        self._moving = Lock()  # threads that move blocks count, too

    def hold(self, tier: str, bytes_by_kind: Mapping[str, int], sign: int = 1) -> None:
        """Bytes appear in a tier, or leave it (`sign` -1)."""
        for kind, nbytes in bytes_by_kind.items():
            self.held[tier, kind] += sign * nbytes
            self._sums[tier] += sign * nbytes
        self.peak[tier] = max(self.peak[tier], self._sums[tier])

    def adopt(self, tier: str, kind: str, nbytes: int) -> None:
        """A library holds so many bytes more, which the store does not."""
        self.adopted[tier] += nbytes
        self.hold(tier, {kind: nbytes})

    def move(self, source: str, destination: str, bytes_by_kind: Mapping[str, int]) -> None:
        with self._moving:
            for kind, nbytes in bytes_by_kind.items():
                self.moved[source, destination, kind] += nbytes

    def held_in(self, tier: str) -> int:
        return self._sums[tier]

    def held_by_store(self, tier: str) -> int:
        return self.held_in(tier) - self.adopted[tier]

    def total_moved(self, source: str | None = None, destination: str | None = None) -> int:
        """Bytes moved so far from `source` and to `destination`; None stands for any tier."""
        return sum(
            nbytes
            for (start, end, _), nbytes in dict(self.moved).items()  # threads that move blocks may add a kind
            if source in (None, start) and destination in (None, end)
        )
