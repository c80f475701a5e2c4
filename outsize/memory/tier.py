"""A tier is a place bytes can live: it hands out extents and reads and writes inside them.

It knows nothing of blocks. Each kind of tier supplies four private verbs: provide and withdraw the bytes
behind an extent, fill a tensor from them, store a tensor in them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

import torch

from outsize.errors import StorageError
from outsize.sizes import format_size

PAGE = 4096  # bytes; what O_DIRECT and the kernel's page tables are aligned to


def pages(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(frozen=True, order=True)
class Extent:
    """A run of bytes inside a tier; both numbers are multiples of PAGE."""

    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Moves(Protocol):
    """What reads and writes extents: a tier, or something in front of it."""

    def read(self, extent: Extent, offset: int, target: torch.Tensor) -> None: ...

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None: ...


class ExtentAllocator:
    """First fit over `capacity` bytes, rounded down to pages; neighbours that become free are joined."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity // PAGE * PAGE
        self.used = 0
        self._taken: dict[int, Extent] = {}  # by start
        self._holes = [Extent(0, self.capacity)] if self.capacity else []  # ascending, no two of them touch

    def __contains__(self, extent: Extent) -> bool:
        return self._taken.get(extent.start) == extent

    def allocate(self, nbytes: int) -> Extent:
        """Take the lowest free run of at least `nbytes`; even an empty one gets a page, so that it has a
        place."""
        nbytes = max(pages(nbytes), PAGE)
        for index, hole in enumerate(self._holes):
            if hole.nbytes >= nbytes:
                return self._take(index, Extent(hole.start, nbytes))
        raise StorageError(
            f"Tier {self.name} is full: {format_size(nbytes)} asked, {format_size(self.used)} of "
            f"{format_size(self.capacity)} in use. Give it more, or let less live there."
        )

    def claim(self, extent: Extent) -> None:
        """Take this very extent, as a manifest says. Raises StorageError if it is not all free."""
        index = bisect_right(self._holes, extent.start, key=lambda hole: hole.start) - 1
        whole = extent.start % PAGE == 0 and extent.nbytes % PAGE == 0 and extent.nbytes > 0
        if not whole or index < 0 or extent.end > self._holes[index].end:
            raise StorageError(
                f"Tier {self.name}: bytes {extent.start} to {extent.end} are not whole free pages inside its "
                f"{format_size(self.capacity)}, so the state that names them is not this tier's. "
                "Start anew in an empty directory."
            )
        self._take(index, extent)

    def free(self, extent: Extent) -> None:
        """Give an extent back. Raises ValueError if it was not handed out."""
        if extent not in self:
            raise ValueError(f"{extent} is not allocated in tier {self.name}")
        del self._taken[extent.start]
        self.used -= extent.nbytes
        start, end = extent.start, extent.end
        first = last = bisect_right(self._holes, start, key=lambda hole: hole.start)
        if first and self._holes[first - 1].end == start:
            first -= 1
            start = self._holes[first].start
        if last < len(self._holes) and self._holes[last].start == end:
            end = self._holes[last].end
            last += 1
        self._holes[first:last] = [Extent(start, end - start)]

    def check(self) -> None:
        """Raise AssertionError unless taken and free extents tile the capacity, and add up."""
        end, was_hole = 0, False
        holes = set(self._holes)
        for extent in sorted([*self._taken.values(), *holes]):
            assert extent.start == end, f"{self.name}: {extent} overlaps or leaves a gap after byte {end}"
            assert not (was_hole and extent in holes), f"{self.name}: free extents meet at {end}"
            end, was_hole = extent.end, extent in holes
        assert end == self.capacity, f"{self.name}: extents end at {end}, the capacity is {self.capacity}"
        taken = sum(extent.nbytes for extent in self._taken.values())
        assert taken == self.used, f"{self.name}: {taken} bytes are taken, {self.used} are counted"

    def _take(self, index: int, extent: Extent) -> Extent:
        """Take `extent` out of the hole at `index`, leaving what lies before and after it."""
        hole = self._holes[index]
        rest = (Extent(hole.start, extent.start - hole.start), Extent(extent.end, hole.end - extent.end))
        self._holes[index : index + 1] = [hole for hole in rest if hole.nbytes]
        self._taken[extent.start] = extent
        self.used += extent.nbytes
        return extent


class Tier(ABC):
    """Threads may read and write different extents at once; one at a time allocates, claims and frees."""

    def __init__(self, name: str, capacity: int) -> None:
        self.name = name
        self._allocator = ExtentAllocator(name, capacity)

    @property
    def capacity(self) -> int:
        """Bytes, whole pages."""
        return self._allocator.capacity

    @property
    def used(self) -> int:
        """Bytes in extents handed out."""
        return self._allocator.used

    def allocate(self, nbytes: int) -> Extent:
        """Return an extent of at least `nbytes`, its content undefined.

        Raises StorageError, with the numbers, when the tier is full."""
        return self._provided(self._allocator.allocate(nbytes))

    def claim(self, extent: Extent) -> None:
        """Take this very extent, as a manifest says. Raises StorageError if it is taken or outside."""
        self._allocator.claim(extent)
        self._provided(extent)

    def free(self, extent: Extent) -> None:
        """Give an extent back. Raises ValueError if it was not handed out."""
        self._allocator.free(extent)
        self._withdraw(extent)

    def read(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        """Fill `target` (1-D uint8, contiguous) from the extent, starting `offset` bytes into it."""
        self._check_span(extent, offset, target)
        self._fill(extent, offset, target)

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        """Store `source` (1-D uint8, contiguous) into the extent, starting `offset` bytes into it."""
        self._check_span(extent, offset, source)
        self._store(extent, offset, source)

    def view(self, extent: Extent) -> torch.Tensor:
        """The bytes of an extent, as 1-D uint8, where they are. Raises NotImplementedError where they are not in memory."""
        raise NotImplementedError(f"tier {self.name} is not memory")

    def flush(self) -> None:  # noqa: B027 (most tiers have nothing to do)
        """Make everything written before durable, as far as the tier can."""

    def check(self) -> None:
        """Integrity of the allocator: raises AssertionError unless free and used extents tile the
        capacity."""
        self._allocator.check()

    @abstractmethod
    def close(self) -> None:
        """Let go of what the tier holds of the operating system. No transfer may be under way."""

    @abstractmethod
    def _provide(self, extent: Extent) -> None:
        """Get the bytes behind an extent just taken; what they already hold is kept."""

    @abstractmethod
    def _withdraw(self, extent: Extent) -> None:
        """Let go of the bytes behind an extent just freed."""

    @abstractmethod
    def _fill(self, extent: Extent, offset: int, target: torch.Tensor) -> None: ...

    @abstractmethod
    def _store(self, extent: Extent, offset: int, source: torch.Tensor) -> None: ...

    def _provided(self, extent: Extent) -> Extent:
        try:
            self._provide(extent)
        except BaseException:
            self._allocator.free(extent)
            raise
        return extent

    def _check_span(self, extent: Extent, offset: int, data: torch.Tensor) -> None:
        if extent not in self._allocator:
            raise ValueError(f"{extent} is not allocated in tier {self.name}")
        if offset < 0 or offset + data.numel() > extent.nbytes:
            raise ValueError(f"{data.numel()} bytes at {offset} reach outside an extent of {extent.nbytes}")
        if data.dtype is not torch.uint8 or data.dim() != 1 or not data.is_contiguous():
            raise ValueError(f"bytes move as contiguous 1-D uint8, not as {data.dtype} {tuple(data.shape)}")


class MemoryTier(Tier):
    """Memory of some device. Each extent is a tensor of its own, so that freeing one frees its memory."""

    def __init__(self, name: str, capacity: int) -> None:
        super().__init__(name, capacity)
        self._memory: dict[int, torch.Tensor] = {}  # by the extent's start

    @abstractmethod
    def _new(self, nbytes: int) -> torch.Tensor:
        """Return 1-D uint8 memory, its content undefined."""

    def view(self, extent: Extent) -> torch.Tensor:
        return self._memory[extent.start]

    def close(self) -> None:
        self._memory.clear()

    def _provide(self, extent: Extent) -> None:
        self._memory[extent.start] = self._new(extent.nbytes)

    def _withdraw(self, extent: Extent) -> None:
        del self._memory[extent.start]

    def _fill(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        copy_now(target, self._memory[extent.start][offset : offset + target.numel()])

    def _store(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        copy_now(self._memory[extent.start][offset : offset + source.numel()], source)


def on_host(data: torch.Tensor) -> torch.Tensor:
    """The same 1-D bytes on the host: itself, if they are there."""
    if not data.is_cuda:
        return data
    found = torch.empty(data.numel(), dtype=data.dtype)
    copy_now(found, data)
    return found


def copy_now(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy within or between host and CUDA device; complete on return, and beside the compute of the device.

    The part for a device is untested: no GPU was at hand."""
    on_device = next((tensor.device for tensor in (target, source) if tensor.is_cuda), None)
    if on_device is None:
        with torch.inference_mode():  # which the target may come from, and this thread knows nothing of it
            target.copy_(source)
        return
    stream = torch.cuda.Stream(on_device)  # from torch's pool: costs nothing to ask for
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
    stream.synchronize()
