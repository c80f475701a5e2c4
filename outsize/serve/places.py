"""Places for pages on another tier, and pages on their way there and back. Which page goes where is for others to say
(`outsize.serve.far`); with several workers each has places for its own layers' part of every page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from outsize.memory.block import make_block
from outsize.memory.entry import Entry
from outsize.memory.store import Store
from outsize.memory.tier import Extent, Moves
from outsize.memory.transfer import Then, Ticket
from outsize.serve.cache import Cache

BLOCK = "kv:far:{}"
BLOCK_BYTES = 64 << 20  # about

Tell = Callable[..., None]
"""Hears of everything that is done here, by name and arguments, before it is done."""


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
        """Until it is there. To be called once. Raises what went wrong."""
        self.places.wait(self.number)


class Places:
    """Up to `count` places for pages of `cache` on `tier`, in blocks that are made one by one."""

    def __init__(self, store: Store, cache: Cache, tier: str, count: int, tell: Tell) -> None:
        self._store, self._cache, self._tier, self._tell = store, cache, tier, tell
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
        self._tell("make")
        name, shape = BLOCK.format(len(self._blocks)), (self._each, self._cache.page_bytes)
        self._store.create(make_block(name, [("pages", "kv", torch.uint8, shape)]), self._tier, durable=False)
        self._blocks.append(self._store.entries[name])

    def save(self, page: int, place: int, then: Then | None = None) -> Move:
        """Begin to write a page to a place."""
        self._tell("save", page, place)
        self._store.ledger.move(self._store.near, self._tier, {"kv": self._cache.page_bytes})
        return self._begun(self._store.transfers.write(*self._where(place), self._cache.bytes[page], then=then))

    def load(self, place: int, page: int) -> Move:
        """Begin to read a page from a place."""
        self._tell("load", place, page)
        self._store.ledger.move(self._tier, self._store.near, {"kv": self._cache.page_bytes})
        return self._begun(self._store.transfers.read(*self._where(place), self._cache.bytes[page]))

    def wait(self, number: int) -> None:
        self._tell("wait", number)
        self._moving.pop(number).wait()

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
        for entry in self._blocks:
            self._store.remove(entry.block.name)
        self._blocks.clear()

    def verbs(self) -> dict[str, Callable[..., Any]]:
        """What can be done, by the name that `tell` hears."""
        return {"make": self.make, "save": self.save, "load": self.load, "wait": self.wait}
