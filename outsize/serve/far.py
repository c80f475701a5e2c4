"""Pages of keys and values for which there is no place near: on another tier, and back again.

They lie in a ring of places, in blocks of the store that are made as they are needed: what was written longest ago makes
way. A full page never changes, so it is written once, however often it comes near and goes again. Moves are whole pages,
all layers at once, between the cache itself and the tier; nothing waits for them but who wants the very page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash

from outsize.errors import StorageError
from outsize.memory.block import make_block
from outsize.memory.entry import Entry
from outsize.memory.store import Store
from outsize.memory.tier import Extent, Moves
from outsize.memory.transfer import Then, Ticket
from outsize.serve.cache import Cache
from outsize.serve.far_index import FarIndex
from outsize.serve.pace import Pace

BLOCK = "kv:far:{}"
BLOCK_BYTES = 64 << 20  # about


@dataclass(frozen=True)
class Load:
    """One page on its way back from its place of the ring. `checksum`: of what an earlier process wrote there; what this
    one wrote is believed."""

    key: bytes
    page: int
    place: int
    ticket: Ticket
    checksum: int | None


@dataclass(frozen=True)
class Coming:
    """Pages that wait for their content; `loads` of those whose content had not been forgotten meanwhile."""

    pages: tuple[int, ...]
    loads: tuple[Load, ...]

    @property
    def arrived(self) -> bool:
        return all(load.ticket.done for load in self.loads)


class FarPages:
    """`count` places on `tier`. `pace` says whether moving is worth it. With an `index` what is there outlives the
    process, and whatever was there before is found again."""

    def __init__(
        self, store: Store, cache: Cache, tier: str, count: int, pace: Pace, index: FarIndex | None = None
    ) -> None:
        self.count, self.lasting, self._tier = count, index is not None, tier
        self._store, self._cache, self._pace, self._index = store, cache, pace, index
        self._each = min(count, max(1, BLOCK_BYTES // cache.page_bytes))  # places in a block
        self._blocks: list[Entry] = []
        self._keys: list[bytes | None] = [None] * count
        self._places: dict[bytes, int] = {}
        self._leaving: dict[bytes, tuple[Ticket, int]] = {}
        self._readers: Counter[int] = Counter()
        self._next, self._broken = 0, False
        self._doubted: dict[bytes, int] = {}  # the checksum of what an earlier process wrote
        for place, (key, checksum) in (index.found if index is not None else {}).items():
            self._keys[place], self._places[key], self._doubted[key] = key, place, checksum
        for _ in range(-(-(max(self._places.values(), default=-1) + 1) // self._each)):
            self._make_block()

    def _make_block(self) -> None:
        name, shape = BLOCK.format(len(self._blocks)), (self._each, self._cache.page_bytes)
        self._store.create(make_block(name, [("pages", "kv", torch.uint8, shape)]), self._tier, durable=False)
        self._blocks.append(self._store.entries[name])

    @property
    def known(self) -> int:
        """Pages that can be brought back."""
        return len(self._places)

    def has(self, key: bytes) -> bool:
        return key in self._places

    # -- away -------------------------------------------------------------------------------------------------------

    def save(self, page: int, key: bytes) -> None:
        if key in self._places or key in self._leaving or self._broken or not self._pace.worth_saving:
            return
        place = self._claim()
        if place is None:
            return
        tier, extent, offset = self._where(place)
        self._store.ledger.move(self._store.near, self._tier, {"kv": self._cache.page_bytes})
        source, noted = self._cache.bytes[page], self._noting(place, key, page)
        self._leaving[key] = self._store.transfers.write(tier, extent, offset, source, then=noted), place

    def _where(self, place: int) -> tuple[Moves, Extent, int]:
        entry = self._blocks[place // self._each]
        assert entry.extent is not None
        return self._store.homes.moves(entry), entry.extent, place % self._each * self._cache.page_bytes

    def _noting(self, place: int, key: bytes, page: int) -> Then | None:
        """What the transfer's thread does when the page is written: whatever happens next, it can be found."""
        if self._index is None:
            return None
        index, checksum = self._index, self._checksum(page)
        return lambda error: index.add(place, key, checksum) if error is None else None

    def _claim(self) -> int | None:
        """The next place of the ring that nobody reads or writes; what was there is forgotten."""
        busy = {place for _, place in self._leaving.values()}
        for place in (*range(self._next, self.count), *range(self._next)):
            if place not in busy and not self._readers[place] and self._is_there(place):
                self._next = (place + 1) % self.count
                self._forget(place)
                return place
        return None

    def _is_there(self, place: int) -> bool:
        """The place has a block. When the disk has no room for another one the ring goes round where it is."""
        if place >= len(self._blocks) * self._each and place < self.count:
            try:
                self._make_block()
            except StorageError:
                self.count = len(self._blocks) * self._each
        return place < self.count

    def _forget(self, place: int) -> None:
        key, self._keys[place] = self._keys[place], None
        if key is not None:
            del self._places[key]
            self._doubted.pop(key, None)

    def settle(self, key: bytes) -> None:
        ticket, place = self._leaving.pop(key, (None, 0))
        if ticket is None:
            return
        try:
            ticket.wait()
        except Exception:  # a disk that fails here costs time, not tokens
            self._broken = True
            return
        self._keys[place], self._places[key] = key, place

    def collect(self) -> None:
        """Note what has been written meanwhile."""
        for key in [key for key, (ticket, _) in self._leaving.items() if ticket.done]:
            self.settle(key)

    # -- and back ---------------------------------------------------------------------------------------------------

    @property
    def worth_loading(self) -> bool:
        return self._pace.worth_loading

    def load(self, wanted: Sequence[tuple[bytes, int]]) -> Coming:
        """Begin to fill pages, which nobody else may touch until `finish`, with what is known by these keys."""
        loads = tuple(self._load(key, page) for key, page in wanted if key in self._places)
        nbytes = self._cache.page_bytes * len(loads)
        self._store.ledger.move(self._tier, self._store.near, {"kv": nbytes})
        return Coming(tuple(page for _, page in wanted), loads)

    def _load(self, key: bytes, page: int) -> Load:
        place = self._places[key]
        self._readers[place] += 1
        ticket = self._store.transfers.read(*self._where(place), self._cache.bytes[page])
        return Load(key, page, place, ticket, self._doubted.get(key))

    def finish(self, coming: Coming) -> list[tuple[bytes, int]]:
        """Wait until they are there. Returns (key, page) of those that came back as they were."""
        sound = []
        for load in coming.loads:
            well = _succeeds(load.ticket) and (load.checksum is None or load.checksum == self._checksum(load.page))
            self._readers[load.place] -= 1
            if well:
                sound.append((load.key, load.page))
            elif self._keys[load.place] == load.key:
                self._forget(load.place)
        return sound

    def _checksum(self, page: int) -> int:
        return xxhash.xxh3_64_intdigest(memoryview(self._cache.bytes[page].numpy()))  # pyright: ignore[reportArgumentType]

    # -- the whole --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Integrity: raises AssertionError unless keys and places agree."""
        assert {key: place for place, key in enumerate(self._keys) if key is not None} == self._places
        assert self._doubted.keys() <= self._places.keys()
        assert all(readers >= 0 for readers in self._readers.values())
        self._store.tiers[self._tier].check()

    def close(self) -> None:
        """Finish what is on its way. No page may be coming."""
        for key in list(self._leaving):
            self.settle(key)
        assert not +self._readers, "pages are still on their way"
        if self._index is not None:
            self._index.close()
        for entry in self._blocks:
            self._store.remove(entry.block.name)


def _succeeds(ticket: Ticket) -> bool:
    try:
        ticket.wait()
    except Exception:
        return False
    return True
