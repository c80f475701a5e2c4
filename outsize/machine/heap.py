"""How much the C library will hold for tensors that come and go: it is asked itself, in a process of its own.

Such tensors leave a heap larger than what is ever alive, by how much only the C library's own strategy says. So the order
of allocations is repeated on it, with the settings of the run; nothing is ever written into that memory, so that hardly
a page of it becomes real. The process is another one because a heap that has been large stays so: what is tried here
for a plan that is not taken would leave room for tensors to spread over (docs/log.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Iterable

from outsize.machine.allocator import Heap, limit_heaps, recycle_up_to
from outsize.machine.environment import TUNABLES, tunables

ALIGNMENT = 64  # bytes, of all tensors that torch allocates on the CPU (c10/core/alignment.h)
PAGE = 4096

Change = tuple[int, int]
"""The number of a tensor, and its bytes; negative ones when it goes."""


def heap_peak(changes: Iterable[Change], recycle_bytes: int) -> int | None:
    """Bytes of memory that become real, at most, for these tensors: what is alive, and what was alive earlier and is kept
    by the C library: nothing is given back while the process holds no more than this. None without glibc."""
    if Heap.find() is None:
        return None
    flat = array("q", (number for change in changes for number in change))
    command = [sys.executable, "-m", __name__, str(recycle_bytes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), TUNABLES: tunables()}
    return int(
        subprocess.run(command, input=flat.tobytes(), stdout=subprocess.PIPE, env=environment, check=True).stdout
    )


class _Heaped:
    """Counts the bytes of pages that have held something, but for maps of their own, which go back to the system."""

    def __init__(self, heap: Heap) -> None:
        self.peak = 0
        self._heap = heap
        self._held: dict[int, tuple[int, int, bool]] = {}  # address, bytes, whether in a map of its own
        self._kept = _Pages()
        self._mapped = 0

    def change(self, number: int, nbytes: int) -> None:
        if nbytes > 0:
            self._allocate(number, nbytes)
        elif number in self._held:
            self._free(number)

    def _allocate(self, number: int, nbytes: int) -> None:
        address = self._heap.allocate(nbytes, ALIGNMENT)
        mapped = self._heap.is_mapped(address)
        self._held[number] = address, nbytes, mapped
        if mapped:
            self._mapped += nbytes
        else:
            self._kept.add(address, nbytes)
        self.peak = max(self.peak, self._mapped + self._kept.nbytes)

    def _free(self, number: int) -> None:
        address, nbytes, mapped = self._held.pop(number)
        self._heap.free(address)
        self._mapped -= nbytes if mapped else 0


class _Pages:
    """A set of pages, by the addresses of what lies in them."""

    REGION = 1 << 14  # pages

    def __init__(self) -> None:
        self.nbytes = 0
        self._regions: dict[int, bytearray] = {}

    def add(self, address: int, nbytes: int) -> None:
        first, end = address // PAGE, (address + nbytes - 1) // PAGE + 1
        while first < end:
            number, place = divmod(first, self.REGION)
            stop = min(place + end - first, self.REGION)
            region = self._regions.setdefault(number, bytearray(self.REGION))
            self.nbytes += PAGE * region.count(0, place, stop)
            region[place:stop] = b"\1" * (stop - place)
            first += stop - place


def main() -> None:
    """The changes come on the standard input, the peak goes to the standard output."""
    heap = Heap.find()
    assert heap is not None
    limit_heaps()
    recycle_up_to(int(sys.argv[1]))
    numbers = array("q", sys.stdin.buffer.read())
    heaped = _Heaped(heap)
    for place in range(0, len(numbers), 2):
        heaped.change(numbers[place], numbers[place + 1])
    print(heaped.peak)


if __name__ == "__main__":
    main()
