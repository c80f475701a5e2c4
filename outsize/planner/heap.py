"""How much the C library will hold for a step's tensors: it is asked itself.

Tensors that come and go leave a heap larger than what is ever alive, by how much only the C library's own strategy
says. So the rehearsed order of allocations is repeated on it, with the settings of the run; nothing is ever written
into that memory, so that hardly a page of it becomes real."""

from __future__ import annotations

from collections.abc import Iterable

from outsize.machine.allocator import LARGEST_RECYCLED, Heap, give_back, recycle_up_to
from outsize.memory.tier import PAGE
from outsize.model.attach import HOARD
from outsize.planner.script import Event, Key, Live, Touched

ALIGNMENT = 64  # bytes, of all tensors that torch allocates on the CPU (c10/core/alignment.h)


def heap_peak(steps: Iterable[Iterable[Event]], recycle_bytes: int) -> int:
    """Bytes of memory that become real, at most, for the tensors of these steps: what is alive, and what was alive
    earlier and is kept by the C library, as `outsize.train.run` makes it do between steps, and a unit on its way in.

    Without glibc: the most that is alive at once, and half as much again."""
    heap = Heap.find()
    if heap is None:
        return int(1.5 * max(live_peak(events) for events in steps))
    recycle_up_to(recycle_bytes)
    pages_kept = _Touched(heap)
    for events in steps:
        pages_kept.run(events)
        if recycle_bytes < LARGEST_RECYCLED:
            pages_kept.give_back(0)
    pages_kept.end()
    return pages_kept.peak


class _Touched:
    """Counts the pages, in bytes, that have held something and have not gone back to the system."""

    def __init__(self, heap: Heap) -> None:
        self.peak = 0
        self._heap = heap
        self._held: dict[Key, tuple[int, int]] = {}  # address and bytes
        self._pages: set[int] = set()  # of the heap
        self._mapped = 0

    def run(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Touched) and event.what == "take":
                self.give_back(HOARD)
            elif isinstance(event, Live) and event.nbytes > 0:
                self._allocate(event.key, event.nbytes)
            elif isinstance(event, Live) and event.key in self._held:
                self._free(event.key)

    def _allocate(self, key: Key, nbytes: int) -> None:
        address = self._heap.allocate(nbytes, ALIGNMENT)
        self._held[key] = address, nbytes
        if self._heap.is_mapped(address):
            self._mapped += nbytes
        else:
            self._pages.update(_pages(address, nbytes))
        self.peak = max(self.peak, self._mapped + PAGE * len(self._pages))

    def _free(self, key: Key) -> None:
        address, nbytes = self._held.pop(key)
        if self._heap.is_mapped(address):
            self._mapped -= nbytes
        self._heap.free(address)

    def give_back(self, beyond: int) -> None:
        if give_back(beyond):
            heaped = [place for place in self._held.values() if not self._heap.is_mapped(place[0])]
            self._pages = {page for address, nbytes in heaped for page in _pages(address, nbytes)}

    def end(self) -> None:
        for key in list(self._held):
            self._free(key)
        give_back()


def _pages(address: int, nbytes: int) -> range:
    return range(address // PAGE, (address + nbytes) // PAGE + 1)


def live_peak(events: Iterable[Event]) -> int:
    """The most bytes of tensors alive at once."""
    now = peak = 0
    for event in events:
        if isinstance(event, Live):
            now += event.nbytes
            peak = max(peak, now)
    return peak
