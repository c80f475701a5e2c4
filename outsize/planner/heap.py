"""How much the C library will hold for a step's tensors: it is asked itself.

Tensors that come and go leave a heap larger than what is ever alive, by how much only the C library's own strategy
says. So the rehearsed order of allocations is repeated on it, with the settings of the run; nothing is ever written
into that memory, so that hardly a page of it becomes real."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from outsize.machine.allocator import Heap, give_back, recycle_up_to
from outsize.memory.tier import PAGE
from outsize.planner.script import Event, Key, Live

ALIGNMENT = 64  # bytes, of all tensors that torch allocates on the CPU (c10/core/alignment.h)


def heap_peak(steps: Iterable[Iterable[Event]], recycle_bytes: int) -> int:
    """Bytes of memory that become real, at most, for the tensors of these steps: what is alive, and what was alive
    earlier in the step and is kept by the C library. Between steps it gives back what it can, as a run makes it do.

    Without glibc: the most that is alive at once, and half as much again."""
    heap = Heap.find()
    if heap is None:
        return int(1.5 * max(live_peak(events) for events in steps))
    recycle_up_to(recycle_bytes)
    return max(_touched(heap, events) for events in steps)


def _touched(heap: Heap, events: Iterable[Event]) -> int:
    """The most pages, in bytes, that hold something since the step began and have not gone back to the system."""
    held: dict[Key, tuple[ctypes.c_void_p, int]] = {}
    kept: set[int] = set()  # pages of the heap
    mapped = peak = 0
    for event in events:
        if not isinstance(event, Live):
            continue
        if event.nbytes > 0:
            pointer = heap.allocate(event.nbytes, ALIGNMENT)
            own = event.nbytes if heap.is_mapped(pointer) else 0
            if not own:
                address = pointer.value or 0
                kept.update(range(address // PAGE, (address + event.nbytes) // PAGE + 1))
            mapped += own
            held[event.key] = (pointer, own)
            peak = max(peak, mapped + PAGE * len(kept))
        elif event.key in held:
            pointer, own = held.pop(event.key)
            mapped -= own
            heap.free(pointer)
    for pointer, _ in held.values():
        heap.free(pointer)
    give_back()
    return peak


def live_peak(events: Iterable[Event]) -> int:
    """The most bytes of tensors alive at once."""
    now = peak = 0
    for event in events:
        if isinstance(event, Live):
            now += event.nbytes
            peak = max(peak, now)
    return peak
