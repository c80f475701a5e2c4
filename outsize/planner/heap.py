"""How much the C library will hold for a step's tensors: it is asked itself.

Tensors that come and go leave a heap larger than what is ever alive, by how much only the C library's own strategy
says. So the rehearsed order of allocations is repeated on it, with the settings of the run; nothing is ever written
into that memory, so that hardly a page of it becomes real."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from outsize.machine.allocator import Heap, give_back, recycle_up_to
from outsize.memory.tier import PAGE
from outsize.planner.script import Event, Key, Live

ALIGNMENT = 64  # bytes, of all tensors that torch allocates on the CPU (c10/core/alignment.h)


def heap_peak(steps: Iterable[Iterable[Event]], recycle_bytes: int) -> int:
    """Bytes of memory that become real, at most, for the tensors of these steps: what is alive, and what was alive
    earlier and is kept by the C library, from step to step: nothing is given back while the process holds no more than
    this.

    Without glibc: the most that is alive at once, and half as much again."""
    heap = Heap.find()
    if heap is None:
        return int(1.5 * max(live_peak(events) for events in steps))
    recycle_up_to(recycle_bytes)
    heaped = _Heaped(heap)
    for events in steps:
        heaped.run(events)
    heaped.end()
    give_back()
    return heaped.peak


class _Heaped:
    """Counts the bytes of pages that have held something, but for maps of their own, which go back to the system."""

    def __init__(self, heap: Heap) -> None:
        self.peak = 0
        self._heap = heap
        self._held: dict[Key, tuple[int, int, bool]] = {}  # address, bytes, whether in a map of its own
        self._kept = _Pages()
        self._mapped = 0

    def run(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Live) and event.nbytes > 0:
                self._allocate(event.key, event.nbytes)
            elif isinstance(event, Live) and event.key in self._held:
                self._free(event.key)

    def _allocate(self, key: Key, nbytes: int) -> None:
        address = self._heap.allocate(nbytes, ALIGNMENT)
        mapped = self._heap.is_mapped(address)
        self._held[key] = address, nbytes, mapped
        if mapped:
            self._mapped += nbytes
        else:
            self._kept.add(address, nbytes)
        self.peak = max(self.peak, self._mapped + self._kept.nbytes)

    def _free(self, key: Key) -> None:
        address, nbytes, mapped = self._held.pop(key)
        self._heap.free(address)
        self._mapped -= nbytes if mapped else 0

    def end(self) -> None:
        for key in list(self._held):
            self._free(key)


class _Pages:
    """A set of pages, by the addresses of what lies in them."""

    REGION = 1 << 14  # pages

    def __init__(self) -> None:
        self.nbytes = 0
        self._regions: dict[int, np.ndarray] = {}

    def add(self, address: int, nbytes: int) -> None:
        first, end = address // PAGE, (address + nbytes - 1) // PAGE + 1
        while first < end:
            number, place = divmod(first, self.REGION)
            stop = min(place + end - first, self.REGION)
            region = self._regions.setdefault(number, np.zeros(self.REGION, bool))
            self.nbytes += PAGE * (stop - place - int(np.count_nonzero(region[place:stop])))
            region[place:stop] = True
            first += stop - place


def live_peak(events: Iterable[Event]) -> int:
    """The most bytes of tensors alive at once."""
    now = peak = 0
    for event in events:
        if isinstance(event, Live):
            now += event.nbytes
            peak = max(peak, now)
    return peak
