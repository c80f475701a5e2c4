"""Where blocks lie in memory of fixed size, and the window that is freed for the next one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(slots=True)
class Resident:
    """A block's place in the near arena."""

    offset: int
    nbytes: int
    name: str
    pins: int = 0


Policy = Callable[[Iterable[Resident], Callable[[str], int]], Iterable[Resident]]
"""Who goes first: (residents, the one used longest ago first; what tells how far a block's next use is) -> residents."""


def evict_oldest(residents: Iterable[Resident], next_use: Callable[[str], int]) -> Iterable[Resident]:
    """Least recently used. In a trace that runs forward and then backward it keeps just what the turn needs, and the
    space it frees was used longest ago, so that reading ahead never waits for a write that has just begun."""
    return residents


def evict_farthest(residents: Iterable[Resident], next_use: Callable[[str], int]) -> Iterable[Resident]:
    """Needed last (Belady 1966): the fewest bytes read, but what is freed was often touched a moment ago and may still
    be on its way out, so little can be read ahead of need."""
    return sorted(residents, key=lambda resident: -next_use(resident.name))


class Spans(Generic[Item]):
    """What lies side by side in memory, by offset; no two overlap."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._offsets: list[int] = []  # ascending
        self._ends: list[int] = []
        self._items: list[Item] = []

    def add(self, offset: int, nbytes: int, item: Item) -> int:
        """Returns its index."""
        index = bisect_left(self._offsets, offset)
        self._offsets.insert(index, offset)
        self._ends.insert(index, offset + nbytes)
        self._items.insert(index, item)
        return index

    def remove(self, offset: int) -> None:
        index = self.index(offset)
        del self._offsets[index], self._ends[index], self._items[index]

    def index(self, offset: int) -> int:
        """Of the first that begins there or behind."""
        return bisect_left(self._offsets, offset)

    def start(self, index: int) -> int:
        return self._offsets[index] if index < len(self._offsets) else self.capacity

    def end_before(self, index: int) -> int:
        return self._ends[index - 1] if index else 0

    def between(self, start: int, end: int) -> list[Item]:
        """Those with bytes there."""
        index = self.index(start)
        return self._items[index - (self.end_before(index) > start) : self.index(end)]


class Layout:
    """Residents by name, the one used longest ago first; by offset; and the gaps between them."""

    def __init__(self, capacity: int) -> None:
        self.by_name: OrderedDict[str, Resident] = OrderedDict()
        self._spans: Spans[Resident] = Spans(capacity)
        self._gaps = [(capacity, 0)]  # (bytes, offset), the smallest first

    def add(self, resident: Resident) -> None:
        self._forget_gap(self._spans.index(resident.offset))
        index = self._spans.add(resident.offset, resident.nbytes, resident)
        self.by_name[resident.name] = resident
        self._note_gap(index)
        self._note_gap(index + 1)

    def remove(self, name: str) -> None:
        offset = self.by_name.pop(name).offset
        index = self._spans.index(offset)
        self._forget_gap(index)
        self._forget_gap(index + 1)
        self._spans.remove(offset)
        self._note_gap(index)

    def used(self, name: str) -> None:
        """Nobody was used later."""
        self.by_name.move_to_end(name)

    def drop(self, name: str) -> None:
        """Nobody wants the resident's bytes again. Its room comes last for others all the same: the real run, who is behind,
        has to leave it first."""
        resident = self.by_name.pop(name)
        resident.name = f"dropped at {resident.offset}"
        self.by_name[resident.name] = resident

    def place(self, nbytes: int, order: Iterable[Resident]) -> tuple[int, list[str]] | None:
        """The window of `nbytes` that is free first when residents go in this order: (offset, those who lie in it), or None
        if pins leave none.

        Among several the window that wastes least is chosen, then the lowest."""
        fitting = bisect_left(self._gaps, (nbytes, 0))
        if fitting < len(self._gaps):
            return self._gaps[fitting][1], []
        spans = self._spans
        reach: dict[int, int] = {}  # of each run of those who would go, from the first to the last and back
        for resident in order:
            if resident.pins:
                continue
            index = spans.index(resident.offset)
            first, last = reach.get(index - 1, index), reach.get(index + 1, index)
            reach[first], reach[last] = last, first
            if spans.start(last + 1) - spans.end_before(first) >= nbytes:
                start = self._least_waste(nbytes, first, last)
                return start, [found.name for found in spans.between(start, start + nbytes)]
        return None

    def _least_waste(self, nbytes: int, first: int, last: int) -> int:
        """Where a window begins: where one of the residents from `first` to `last` follows another, or behind them."""
        spans = self._spans
        starts = [spans.end_before(index) for index in range(first, last + 2)]
        fitting = [start for start in starts if start + nbytes <= spans.start(last + 1)]
        return min(fitting, key=lambda start: (spans.start(spans.index(start + nbytes)) - start, start))

    def _note_gap(self, index: int) -> None:
        """There may be room before the resident at `index`."""
        start = self._spans.end_before(index)
        if nbytes := self._spans.start(index) - start:
            insort(self._gaps, (nbytes, start))

    def _forget_gap(self, index: int) -> None:
        start = self._spans.end_before(index)
        if nbytes := self._spans.start(index) - start:
            del self._gaps[bisect_left(self._gaps, (nbytes, start))]
