"""Where blocks lie at home, and what makes a step permanent: extents are written anew, never over a committed copy.

A durable block has an extent that the last commit needs and a spare that the next step writes. A kept step pins its
extents: a block whose pinned extent is superseded gets another spare, so that only what is rewritten costs space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from outsize.errors import RunError, StorageError
from outsize.memory.block import Block
from outsize.memory.checksum import CheckedExtents, Sums
from outsize.memory.entry import Entry, Residency
from outsize.memory.ledger import Ledger
from outsize.memory.tier import Extent, Moves, Tier


@dataclass(frozen=True)
class Committed:
    """Where a committed step has a block: `extent` (None: never written), the `spare` that the next step may write, and
    the checksums of the extent's pieces (none without a checked store)."""

    extent: Extent | None
    spare: Extent | None = None
    sums: Sums = field(default_factory=lambda: np.empty(0, np.uint64))


Places = dict[str, Extent]
"""Extents of a kept step, by block."""


class Homes:
    """Hands out extents to entries. Not for several threads at once: the store's lock is around every call."""

    def __init__(
        self, tiers: dict[str, Tier], near: str, entries: dict[str, Entry], ledger: Ledger, checked: bool
    ) -> None:
        self._tiers, self._near, self._entries, self._ledger = tiers, near, entries, ledger
        self._checked = CheckedExtents(tiers["disk"]) if checked else None
        self._recovered: dict[str, Committed] = {}
        self._pinned: dict[str, Places] = {}  # by the name of the kept step
        self._uses: Counter[Extent] = Counter()  # how many kept steps need an extent

    def tier(self, entry: Entry) -> Tier:
        """Where the entry's extents are: the disk for a durable block, else its home."""
        return self._tiers["disk"] if entry.durable or entry.home.name == self._near else entry.home

    def moves(self, entry: Entry) -> Moves:
        return self._checked if entry.durable and self._checked is not None else self.tier(entry)

    def source(self, entry: Entry) -> tuple[Tier, Moves, Extent]:
        """Where the entry's bytes come from, when they are not near: the tier, what reads it, and where there."""
        if entry.slot is not None:
            return entry.home, entry.home, entry.slot
        assert entry.extent is not None
        return self.tier(entry), self.moves(entry), entry.extent

    def target(self, entry: Entry) -> tuple[Tier, Moves, Extent]:
        """Where they go. Raises as `place`."""
        if entry.slot is not None:
            return entry.home, entry.home, entry.slot
        return self.tier(entry), self.moves(entry), self.place(entry)

    def recover(self, committed: dict[str, Committed], kept: dict[str, Places]) -> None:
        """Take the extents that manifests name, before any other can be handed out. A spare that is pinned, or lies
        where the file does not reach, is given up."""
        disk = self._tiers["disk"]
        for name, places in kept.items():
            self._pin(name, places)
        needed = {entry.extent for entry in committed.values() if entry.extent is not None}
        for extent in needed | set(self._uses):
            disk.claim(extent)
        for name, block in committed.items():
            self._recovered[name] = Committed(block.extent, self._claimed(disk, block.spare), block.sums)

    def _claimed(self, tier: Tier, spare: Extent | None) -> Extent | None:
        try:
            if spare is not None:
                tier.claim(spare)
            return spare
        except StorageError:
            return None

    @property
    def unclaimed(self) -> list[str]:
        """Blocks that `recover` announced and nobody has created."""
        return list(self._recovered)

    def settle(self, entry: Entry) -> None:
        """Give a new entry its extents: those announced for it, or new ones."""
        if entry.durable and entry.block.name in self._recovered:
            self._take_over(entry, self._recovered.pop(entry.block.name))
        if entry.extent is None and (entry.durable or entry.home.name != self._near):
            entry.extent = self._allocate(entry)
        if entry.durable and entry.spare is None:
            entry.spare = self._allocate(entry)
        if entry.durable and entry.home.name not in (self._near, "disk"):
            entry.slot = entry.home.allocate(entry.block.nbytes)
            self._ledger.hold(entry.home.name, entry.block.bytes_by_kind)

    def _take_over(self, entry: Entry, found: Committed) -> None:
        pinned = {places[entry.block.name] for places in self._pinned.values() if entry.block.name in places}
        for extent in {found.extent, found.spare, *pinned} - {None}:
            self._check_size(entry.block, extent)
            self._count(entry, 1)
        entry.extent = entry.committed = found.extent
        entry.spare = found.spare
        if found.extent is not None:
            entry.written, entry.residency = True, Residency.FAR
            if self._checked is not None:
                self._checked.expect(found.extent, found.sums, entry.block)

    def _check_size(self, block: Block, extent: Extent | None) -> None:
        if extent is not None and extent.nbytes != block.nbytes:
            raise RunError(
                f"Block {block.name} has {block.nbytes} bytes, but {extent.nbytes} were committed: this state belongs to "
                "another model, optimizer or precision. Use its own settings or another directory."
            )

    def place(self, entry: Entry) -> Extent:
        """Where the entry's bytes may be written now: not where the last commit or a kept step needs them.

        Raises StorageError when a new extent is needed and the disk is full."""
        if entry.durable and entry.extent is entry.committed:
            entry.extent = entry.spare or self._allocate(entry)
            entry.spare = None
        assert entry.extent is not None
        return entry.extent

    def commit(self, keep: str | None, drop: Iterable[str]) -> Callable[[], dict[str, Committed]]:
        """What is at home now becomes the committed state, and with `keep` a kept one of that name; kept steps in `drop`
        are let go. Returns what to call, after all writes so far, to learn where every durable block is.

        What becomes free here may be handed out at once: it is written after the commit is durable, or never."""
        for name in {keep, *drop}:
            self._unpin(self._pinned.pop(name or "", {}))
        durable = {name: entry for name, entry in self._entries.items() if entry.durable}
        for entry in durable.values():
            before, entry.committed = entry.committed, entry.extent
            if before is not None and before is not entry.extent and not self._uses[before]:
                self._give_back(entry, before)
        places = {name: entry.extent for name, entry in durable.items() if entry.written and entry.extent is not None}
        spares = {name: entry.spare for name, entry in durable.items()}
        if keep is not None:
            self._pin(keep, places)
        return lambda: {name: self._said(places.get(name), spares[name]) for name in durable}

    def _said(self, extent: Extent | None, spare: Extent | None) -> Committed:
        if extent is None or self._checked is None:
            return Committed(extent, spare)
        return Committed(extent, spare, self._checked.sums(extent))

    def _pin(self, name: str, places: Places) -> None:
        self._pinned[name] = places
        self._uses.update(places.values())

    def _unpin(self, places: Places) -> None:
        for name, extent in places.items():
            self._uses[extent] -= 1
            entry = self._entries[name]
            if not self._uses[extent] and extent not in (entry.extent, entry.committed, entry.spare):
                self._give_back(entry, extent)
        self._uses = +self._uses

    def _give_back(self, entry: Entry, extent: Extent) -> None:
        """Nobody needs the extent: it is the entry's spare, or free."""
        if entry.spare is None:
            entry.spare = extent
        else:
            self._free(entry, extent)

    def leave(self, entry: Entry) -> None:
        """Free the extents of an entry that is removed."""
        for extent in {entry.extent, entry.spare} - {None}:
            self._free(entry, extent)
        if entry.slot is not None:
            entry.home.free(entry.slot)
            self._ledger.hold(entry.home.name, entry.block.bytes_by_kind, -1)

    def _allocate(self, entry: Entry) -> Extent:
        extent = self.tier(entry).allocate(entry.block.nbytes)
        self._count(entry, 1)
        return extent

    def _free(self, entry: Entry, extent: Extent | None) -> None:
        assert extent is not None
        self.tier(entry).free(extent)
        self._count(entry, -1)
        if self._checked is not None:
            self._checked.forget(extent)

    def _count(self, entry: Entry, sign: int) -> None:
        self._ledger.hold(self.tier(entry).name, entry.block.bytes_by_kind, sign)
