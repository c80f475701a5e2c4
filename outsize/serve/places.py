"""Places for pages on another tier, and pages on their way there and back. Which page goes where is for others to say
(`outsize.serve.far`); with several workers each has places for its own layers' part of every page, and an index of them if
they are to outlive the process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from outsize.distributed.relay import Relay
from outsize.errors import StorageError
from outsize.memory.block import make_block
from outsize.memory.entry import Entry
from outsize.memory.store import Store
from outsize.memory.tier import Extent, Moves
from outsize.memory.transfer import Then, Ticket
from outsize.serve.cache import Cache
from outsize.serve.far_index import FarIndex

BLOCK = "kv:far:{}"
BLOCK_BYTES = 64 << 20  # about


@dataclass(frozen=True)
class Move:
    """A page on its way."""

    number: int
    ticket: Ticket
    places: Places

    @property
    def done(self) -> bool:
        return self.ticket.done

    def wait(self) -> None:
        """Until it is there. To be called once. Raises what went wrong, StorageError when it is not what was written."""
        self.places.wait(self.number)


class Places:
    """Up to `count` places for pages of `cache` on `tier`, in blocks that are made one by one. On the `relay` others hear of
    everything that is done here, before it is done. With an `index` pages can be `found` (place -> key) that an earlier
    process wrote; whether they are as it wrote them is seen when they come."""

    def __init__(
        self, store: Store, cache: Cache, tier: str, count: int, relay: Relay, index: FarIndex | None = None
    ) -> None:
        self._store, self._cache, self._tier, self._relay, self.index = store, cache, tier, relay, index
        self.found = {} if index is None else index.keys
        self._doubted = {} if index is None else {place: checksum for place, (_, checksum) in index.found.items()}
        self._checks: dict[int, tuple[int, int]] = {}  # page and checksum, by the number of a move
        self._each = min(count, max(1, BLOCK_BYTES // cache.page_bytes))  # places in a block
        self._blocks: list[Entry] = []
        self._moving: dict[int, Ticket] = {}
        self._moves = 0

    @property
    def count(self) -> int:
        """Places that there are already."""
        return len(self._blocks) * self._each

    def make(self) -> None:
        """Some more. Raises StorageError when there is no room."""
        self._relay.tell("make")
        name, shape = BLOCK.format(len(self._blocks)), (self._each, self._cache.page_bytes)
        self._store.create(make_block(name, [("pages", "kv", torch.uint8, shape)]), self._tier, durable=False)
        self._blocks.append(self._store.entries[name])

    def save(self, page: int, place: int, key: bytes) -> Move:
        """Begin to write a page, to be found by its key, to a place."""
        self._relay.tell("save", page, place, key)
        self._doubted.pop(place, None)
        self._store.ledger.move(self._store.near, self._tier, {"kv": self._cache.page_bytes})
        then = self._noting(page, place, key)
        return self._begun(self._store.transfers.write(*self._where(place), self._cache.bytes[page], then=then))

    def _noting(self, page: int, place: int, key: bytes) -> Then | None:
        """What the transfer's thread does when the page is written: whatever happens next, it can be found."""
        if self.index is None:
            return None
        index, checksum = self.index, self._checksum(page)
        return lambda error: index.add(place, key, checksum) if error is None else None

    def load(self, place: int, page: int) -> Move:
        """Begin to read a page from a place."""
        self._relay.tell("load", place, page)
        self._store.ledger.move(self._tier, self._store.near, {"kv": self._cache.page_bytes})
        move = self._begun(self._store.transfers.read(*self._where(place), self._cache.bytes[page]))
        if place in self._doubted:
            self._checks[move.number] = page, self._doubted[place]
        return move

    def wait(self, number: int) -> None:
        self._relay.tell("wait", number)
        ticket, check = self._moving.pop(number), self._checks.pop(number, None)
        if check is None:
            ticket.wait()
        elif not self._relay.confirm(self._is_sound(ticket, *check)):
            raise StorageError("What an earlier process left in --kv-directory is damaged.")

    def _is_sound(self, ticket: Ticket, page: int, checksum: int) -> bool:
        try:
            ticket.wait()
        except Exception:
            return False
        return self._checksum(page) == checksum

    def _checksum(self, page: int) -> int:
        return xxhash.xxh3_64_intdigest(memoryview(self._cache.bytes[page].numpy()))  # pyright: ignore[reportArgumentType]

    def _begun(self, ticket: Ticket) -> Move:
        self._moves += 1
        self._moving[self._moves] = ticket
        return Move(self._moves, ticket, self)

    def _where(self, place: int) -> tuple[Moves, Extent, int]:
        entry = self._blocks[place // self._each]
        assert entry.extent is not None
        return self._store.homes.moves(entry), entry.extent, place % self._each * self._cache.page_bytes

    def check(self) -> None:
        """Integrity: raises AssertionError when the tier is not in order."""
        self._store.tiers[self._tier].check()

    def close(self) -> None:
        """Nobody may be waited for any more."""
        for ticket in self._moving.values():  # of a worker that ends because another is lost
            with suppress(Exception):
                ticket.wait()
        for entry in self._blocks:
            self._store.remove(entry.block.name)
        self._blocks.clear()
        if self.index is not None:
            self.index.close()

    def verbs(self) -> dict[str, Callable[..., Any]]:
        """What can be done, by the name that `tell` hears."""
        return {"make": self.make, "save": self.save, "load": self.load, "wait": self.wait}
