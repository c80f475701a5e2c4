"""Checksums of what lies in a tier's extents: taken as bytes pass by, compared when they come back in another process.

XXH3 (64 bits, github.com/Cyan4973/xxHash) over pieces of 1 MiB: it keeps up with memory and lets other threads run
meanwhile (docs/commit.md says what it costs). Within one process what was written is believed; what a manifest says of
an extent is doubted until its bytes have been seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
import xxhash

from outsize.errors import DamageError
from outsize.memory.block import Block
from outsize.memory.host import allocate_slab
from outsize.memory.tier import Extent, Tier, on_host
from outsize.sizes import format_size

PIECE = 1 << 20  # bytes under one checksum, and so how exactly damage can be named
FROM_DEVICE = 4 * PIECE  # that are on the host at once; untested: no GPU was at hand

Sums = np.ndarray
"""uint64, one for each piece; the last piece may be shorter."""


def checksums(data: torch.Tensor) -> Sums:
    """Of the pieces of `data` (1-D uint8, on the host)."""
    view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
    return np.array([xxhash.xxh3_64_intdigest(view[start : start + PIECE]) for start in _starts(len(view))], np.uint64)


def count_pieces(nbytes: int) -> int:
    return len(_starts(nbytes))


def _starts(nbytes: int) -> range:
    return range(0, nbytes, PIECE)


class CheckedExtents:
    """Reads and writes a tier's extents as the tier does. Whole extents are written; any part may be read.

    Raises DamageError when bytes are not those that `expect` announced."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._sums: dict[Extent, Sums] = {}
        self._doubted: dict[Extent, tuple[Block, np.ndarray]] = {}  # for each piece: not seen yet
        self._local = threading.local()

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        assert offset == 0 and source.numel() == extent.nbytes, "a checked extent is written as a whole"
        step = FROM_DEVICE if source.is_cuda else max(source.numel(), 1)
        sums = []
        for start in range(0, source.numel(), step):
            part = on_host(source[start : start + step])
            sums.append(checksums(part))
            self.tier.write(extent, start, part)
        self._sums[extent] = np.concatenate(sums)
        self._doubted.pop(extent, None)

    def read(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        self.tier.read(extent, offset, target)
        doubted = self._doubted.get(extent)
        if doubted is not None:
            self._look_at(extent, offset, target, *doubted)

    def expect(self, extent: Extent, sums: Sums, block: Block) -> None:
        """A manifest says that the extent holds `block` with these checksums."""
        self._sums[extent] = sums
        self._doubted[extent] = block, np.ones(len(sums), bool)

    def sums(self, extent: Extent) -> Sums:
        return self._sums[extent]

    def forget(self, extent: Extent) -> None:
        self._sums.pop(extent, None)
        self._doubted.pop(extent, None)

    def _look_at(self, extent: Extent, offset: int, target: torch.Tensor, block: Block, doubted: np.ndarray) -> None:
        """Check the doubted pieces that the read has touched; those it has not read whole are read again."""
        end = offset + target.numel()
        for index in range(offset // PIECE, count_pieces(end)):
            if doubted[index]:
                start, stop = index * PIECE, min((index + 1) * PIECE, extent.nbytes)
                whole = offset <= start and stop <= end and not target.is_cuda
                piece = target[start - offset : stop - offset] if whole else self._again(extent, start, stop)
                compare(piece, self._sums[extent][index : index + 1], block, start)
                doubted[index] = False

    def _again(self, extent: Extent, start: int, stop: int) -> torch.Tensor:
        if not hasattr(self._local, "piece"):
            self._local.piece = allocate_slab(PIECE)
        piece = self._local.piece[: stop - start]
        self.tier.read(extent, start, piece)
        return piece


def compare(data: torch.Tensor, sums: Sums, block: Block, offset: int = 0) -> None:
    """Raises DamageError unless `data`, which lies `offset` (whole pieces) into the block, has these checksums."""
    for number in np.flatnonzero(checksums(data) != sums):
        start = offset + int(number) * PIECE
        stop = min(start + PIECE, block.nbytes)
        raise DamageError(
            f"Block {block.name} is damaged: bytes {start} to {stop} of its {format_size(block.nbytes)} "
            f"({'; '.join(_parts_in(block, start, stop))}) are not those that were committed."
        )


def _parts_in(block: Block, start: int, stop: int) -> Iterator[str]:
    """Which elements of which tensors lie in these bytes."""
    for part in block.parts:
        first, last = max(start, part.offset), min(stop, part.offset + part.nbytes)
        if first < last:
            size = part.dtype.itemsize
            yield f"{part.name}, elements {(first - part.offset) // size} to {-(-(last - part.offset) // size)}"
