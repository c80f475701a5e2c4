"""How much of a device PyTorch's caching allocator will hold for tensors that come and go: its rules, played.

The allocator asks the driver for segments and keeps them. A tensor gets the smallest free block that is large enough, of
the pool for its size; what is left of the block stays free, if it is worth it; free neighbours become one block again. So
it holds more than is ever alive, and by how much the order of tensors says. The rules are those of PyTorch's
c10/cuda/CUDACachingAllocator.cpp with nothing set in PYTORCH_CUDA_ALLOC_CONF; untested beside the real one, as no GPU was
at hand. Where the device is full, the real one gives free segments back before it gives up, so that it needs no more."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

from outsize.machine.heap import Change

LEAST = 512  # bytes, of which all sizes are multiples
SMALL = 1 << 20  # bytes: the largest tensor of the small ones' pool, and the least rest that a large block leaves free
SMALL_SEGMENT = 2 << 20
LARGE = 10 << 20  # bytes, from which on a tensor that finds no room gets a segment of its own
LARGE_SEGMENT = 20 << 20
ROUND = 2 << 20  # bytes, of which segments for one tensor are multiples


def cached_peak(changes: Iterable[Change]) -> int:
    """Bytes of all segments once these tensors have come and gone."""
    allocator = Caching()
    for number, nbytes in changes:
        if nbytes > 0:
            allocator.allocate(number, nbytes)
        else:
            allocator.free(number)
    return allocator.reserved


def lasting(nbytes: int) -> int:
    """What each of many tensors of this size that stay takes of a device: its part of a segment."""
    size = _rounded(nbytes, LEAST)
    if size >= LARGE:
        return _rounded(size, ROUND)
    segment = SMALL_SEGMENT if size <= SMALL else LARGE_SEGMENT
    return -(-segment // (segment // size))


@dataclass(eq=False, slots=True)
class _Block:
    """A run of bytes of a segment, and its neighbours there."""

    address: int
    size: int
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


class Caching:
    """The allocator, without memory. Tensors have numbers."""

    def __init__(self) -> None:
        self.reserved = 0
        """Bytes of all segments."""
        self._taken: dict[int, tuple[_Block, bool]] = {}
        self._at: dict[int, _Block] = {}  # free blocks, by address
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by pool: (size, address), ascending

    def allocate(self, number: int, nbytes: int) -> None:
        size = _rounded(nbytes, LEAST)
        small = size <= SMALL
        block = self._best(size, small) or self._segment(size, small)
        rest = block.size - size
        if rest >= LEAST if small else rest > SMALL:
            self._split(block, size, small)
        block.free = False
        self._taken[number] = block, small

    def free(self, number: int) -> None:
        """Of a tensor that nobody has seen come, nothing is known."""
        block, small = self._taken.pop(number, (None, True))
        if block is None:
            return
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._withdraw(other, small)
        if block.before is not None and block.before.free:
            block = _joined(block.before, block)
        if block.after is not None and block.after.free:
            block = _joined(block, block.after)
        self._offer(block, small)

    def _best(self, size: int, small: bool) -> _Block | None:
        free = self._free[small]
        index = bisect_left(free, (size, 0))
        if index == len(free):
            return None
        block = self._at[free[index][1]]
        self._withdraw(block, small)
        return block

    def _segment(self, size: int, small: bool) -> _Block:
        taken = SMALL_SEGMENT if small else LARGE_SEGMENT if size < LARGE else _rounded(size, ROUND)
        block = _Block(self.reserved, taken)
        self.reserved += taken
        return block

    def _split(self, block: _Block, size: int, small: bool) -> None:
        rest = _Block(block.address + size, block.size - size, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._offer(rest, small)

    def _offer(self, block: _Block, small: bool) -> None:
        block.free = True
        self._at[block.address] = block
        insort(self._free[small], (block.size, block.address))

    def _withdraw(self, block: _Block, small: bool) -> None:
        free = self._free[small]
        del free[bisect_left(free, (block.size, block.address))], self._at[block.address]


def _joined(first: _Block, second: _Block) -> _Block:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def _rounded(nbytes: int, step: int) -> int:
    return max(-(-nbytes // step), 1) * step
