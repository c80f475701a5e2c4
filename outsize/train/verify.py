"""Reads a run's committed and kept steps and compares every byte with its checksum; a run may go on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from outsize.errors import StorageError
from outsize.memory.block import Block
from outsize.memory.checksum import PIECE, Sums, compare, count_pieces
from outsize.memory.disk import DiskTier
from outsize.memory.homes import Committed
from outsize.memory.host import allocate_slab
from outsize.memory.tier import Extent, Tier
from outsize.train.manifest import Manifest
from outsize.train.packed_step import WINDOW, PackedStep
from outsize.train.retention import PINNED
from outsize.train.state import Held, StateFolder


@dataclass(frozen=True)
class Verdict:
    """`name` is that of the kept step, None for the committed one; `damage` is empty when every byte is right."""

    name: str | None
    step: int
    damage: tuple[str, ...]


class Verifier:
    """Memory: one window. What several steps share is read once.

    Raises RunError when a manifest cannot be read."""

    def __init__(self, folder: StateFolder, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        self._folder, self._progress = folder, progress
        self._window = allocate_slab(WINDOW)
        self._seen: dict[tuple[Extent, bytes], str | None] = {}

    def look_at(self, held: Held) -> Verdict | None:
        """At a step, however it is there."""
        if held is None:
            return self.committed()
        return self.kept(held) if isinstance(held, str) else self.packed(held)

    def committed(self) -> Verdict | None:
        """A step's extents may be written again once the next step is committed: what differs then is looked at where
        the newer manifest has it. None when nothing was committed."""
        manifest = self._folder.read()
        if manifest is None:
            return None
        damage = []
        with self._disk() as tier:
            for block in manifest.layout.blocks:
                found = self._look_at(tier, block, manifest.places[block.name])
                while found is not None and (newer := self._folder.read()) is not None and newer.step != manifest.step:
                    manifest = newer
                    found = self._look_at(tier, block, manifest.places[block.name])
                damage += [found] if found else []
        return Verdict(None, manifest.step, tuple(damage))

    def kept(self, name: str) -> Verdict:
        manifest: Manifest = self._folder.read_kept(name)
        with self._disk() as tier:
            found = [self._look_at(tier, block, manifest.places[block.name]) for block in manifest.layout.blocks]
        return Verdict(name, manifest.step, tuple(damage for damage in found if damage))

    def packed(self, step: int) -> Verdict:
        """Of a kept step that is packed."""
        held = PackedStep(self._folder, step)
        found = [held.damage(block, self._window) for block in held.manifest.layout.blocks]
        return Verdict(f"{PINNED}-{step}", held.manifest.step, tuple(damage for damage in found if damage))

    def _disk(self) -> DiskTier:
        return DiskTier(self._folder.blocks, 1 << 60, writable=False)

    def _look_at(self, tier: Tier, block: Block, place: Committed) -> str | None:
        if place.extent is None:
            return None
        key = place.extent, place.sums.tobytes()
        if key not in self._seen:
            self._seen[key] = self._damage(tier, block, place.extent, place.sums)
            self._progress(block.nbytes)
        return self._seen[key]

    def _damage(self, tier: Tier, block: Block, extent: Extent, sums: Sums) -> str | None:
        try:
            tier.claim(extent)
            try:
                for start in range(0, extent.nbytes, WINDOW):
                    window = self._window[: min(WINDOW, extent.nbytes - start)]
                    tier.read(extent, start, window)
                    compare(window, sums[start // PIECE :][: count_pieces(window.numel())], block, start)
            finally:
                tier.free(extent)
        except StorageError as problem:
            return str(problem)
        return None
