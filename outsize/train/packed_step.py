"""A kept step that is packed without loss: a folder `state/packed/step-N` with the step's manifest and one packed file.

It has its own bytes, so none of the extents in `blocks`; going back to it writes them into free extents. Each tensor of a
block is packed as numbers of its dtype, what lies between tensors as bytes, so that a block comes back whole and the
checksums that were taken when it was committed still hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.errors import DamageError, ModelError, RunError
from outsize.memory.block import Block
from outsize.memory.checksum import PIECE, CheckedExtents, compare, count_pieces
from outsize.memory.disk import DiskTier
from outsize.memory.homes import Committed
from outsize.memory.host import allocate_slab
from outsize.memory.tier import Extent
from outsize.model.new_folder import new_folder, remove_folder
from outsize.model.packed_file import PackedTensor, packed_name, read_packed, write_packed
from outsize.train.manifest import Manifest
from outsize.train.retention import PINNED
from outsize.train.state import StateFolder

WINDOW = 16 * PIECE  # bytes held at once
_STEM, _MANIFEST = "blocks", "manifest"


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of a block that are packed as numbers of one dtype."""

    name: str
    dtype: torch.dtype
    start: int
    stop: int

    @property
    def spec(self) -> tuple[tuple[int, ...], torch.dtype]:
        return ((self.stop - self.start) // self.dtype.itemsize,), self.dtype


def segments(block: Block) -> Iterator[Segment]:
    """A block's tensors and what lies between them, together all of its bytes."""
    end = 0
    for part in block.parts:
        if part.offset > end:
            yield Segment(f"{block.name} from byte {end}", torch.uint8, end, part.offset)
        if part.nbytes:
            yield Segment(f"{block.name}, {part.name}", part.dtype, part.offset, part.offset + part.nbytes)
        end = part.offset + part.nbytes
    if block.nbytes > end:
        yield Segment(f"{block.name} from byte {end}", torch.uint8, end, block.nbytes)


def _home(folder: StateFolder, step: int) -> Path:
    return folder.packed / f"{PINNED}-{step}"


def packed_bytes(folder: StateFolder, step: int) -> int:
    return sum(path.stat().st_size for path in _home(folder, step).iterdir())


def pack_step(folder: StateFolder, manifest: Manifest) -> None:
    """Write the step beside `blocks`, complete or not at all. Memory: some 50 MiB.

    Raises DamageError when its bytes are not those committed, StorageError when the disk is full."""
    with DiskTier(folder.blocks, 1 << 62, writable=False) as tier:
        disk = CheckedExtents(tier)
        held: dict[str, tuple[Block, Segment]] = {}
        for block in manifest.layout.blocks:
            place = manifest.places[block.name]
            if place.extent is not None:
                tier.claim(place.extent)
                disk.expect(place.extent, place.sums, block)
                held |= {segment.name: (block, segment) for segment in segments(block)}

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            block, segment = held[name]
            out = torch.empty(stop - start, dtype=segment.dtype)
            extent = manifest.places[block.name].extent
            assert extent is not None
            disk.read(extent, segment.start + start * segment.dtype.itemsize, out.view(torch.uint8))
            return out

        with new_folder(_home(folder, manifest.step)) as place:
            write_packed(place / packed_name(_STEM), {name: segment.spec for name, (_, segment) in held.items()}, read)
            (place / _MANIFEST).write_bytes(manifest.encode())


def remove_packed(folder: StateFolder, step: int) -> None:
    """Give the packed step up, if there is one."""
    if _home(folder, step).exists():
        remove_folder(_home(folder, step))


class PackedStep:
    """A step that `pack_step` wrote. Raises RunError when there is none or its files do not belong together."""

    def __init__(self, folder: StateFolder, step: int) -> None:
        self.folder, self.place = folder, _home(folder, step)
        if not self.place.is_dir():
            raise RunError(f"{self.place} is not there: step {step} is not packed.")
        self.manifest = Manifest.read(self.place / _MANIFEST, folder.layout())
        try:
            self._tensors: Mapping[str, PackedTensor] = read_packed(self.place / packed_name(_STEM))
        except ModelError as problem:
            raise DamageError(f"Step {step} is damaged: {problem}.") from problem

    def holds(self, block: Block) -> bool:
        """Whether the block had been written at that step."""
        return self.manifest.places[block.name].extent is not None

    def read(self, block: Block, offset: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D uint8) with the block's bytes from `offset` on. Raises DamageError."""
        for segment in segments(block):
            first, last = max(offset, segment.start), min(offset + out.numel(), segment.stop)
            if first < last:
                size = segment.dtype.itemsize
                row, skip = divmod(first - segment.start, size)
                rows = self._rows(segment, row, -(-(last - segment.start) // size)).view(torch.uint8)
                out[first - offset : last - offset] = rows[skip : skip + last - first]

    def _rows(self, segment: Segment, start: int, stop: int) -> torch.Tensor:
        try:
            return self._tensors[segment.name].read(start, stop)
        except (ModelError, KeyError) as problem:
            raise DamageError(
                f"Step {self.manifest.step}, packed, is damaged in {segment.name}: {problem}"
            ) from problem

    def windows(self, block: Block, window: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """The block's bytes, compared with the checksums that were taken when it was committed: (offset, bytes), each
        over `window`. Raises DamageError."""
        sums = self.manifest.places[block.name].sums
        for start in range(0, block.nbytes, window.numel()):
            part = window[: min(window.numel(), block.nbytes - start)]
            self.read(block, start, part)
            compare(part, sums[start // PIECE :][: count_pieces(part.numel())], block, start)
            yield start, part

    def damage(self, block: Block, window: torch.Tensor) -> str | None:
        """What is wrong with the block; None: nothing."""
        if not self.holds(block):
            return None
        try:
            for _ in self.windows(block, window):
                pass
        except DamageError as problem:
            return str(problem)
        return None

    def restore(self) -> None:
        """Make it the committed step: its blocks go into extents that no committed or kept step needs, and the manifest
        comes last. Raises DamageError, StorageError when the disk is full; the committed step is then as it was."""
        window = allocate_slab(WINDOW)
        with DiskTier(self.folder.blocks) as disk:
            for extent in _needed(self.folder):
                disk.claim(extent)
            places = {block.name: self._unpack(disk, block, window) for block in self.manifest.layout.blocks}
            disk.flush()
        self.folder.go_back(replace(self.manifest, places=places).encode())

    def _unpack(self, disk: DiskTier, block: Block, window: torch.Tensor) -> Committed:
        if not self.holds(block):
            return Committed(None)
        extent = disk.allocate(block.nbytes)
        for start, part in self.windows(block, window):
            disk.write(extent, start, part)
        return Committed(extent, None, self.manifest.places[block.name].sums)


def _needed(folder: StateFolder) -> set[Extent]:
    """Extents of the committed step and of those kept in `blocks`."""
    manifests = [folder.read(), *(folder.read_kept(name) for name in folder.kept_names())]
    places = (place for manifest in manifests if manifest is not None for place in manifest.places.values())
    return {place.extent for place in places if place.extent is not None}
