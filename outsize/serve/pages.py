"""Who holds which page of the key-value cache, and which pages hold the same tokens.

A page is a place for the keys and values of `page_tokens` tokens in all layers. Pages are counted, not copied: two
sequences that begin with the same tokens hold the same pages. A full page is known by a digest of its tokens and of all
before them, so that equal digests mean equal prefixes; it stays findable after its last holder has let go, until its
place is wanted. What it holds then goes to another tier, if there is one, and can still be found there."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

ROOT = b""
AHEAD = 8  # one page in so many is ready to be taken before somebody wants it


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a full page is known by: SHA-256 over the page before it and its own tokens."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class Elsewhere(Protocol):
    """Where pages go for which there is no place near, by their digests."""

    lasting: bool
    """It outlives the process, so that every known page goes there at once."""

    def has(self, key: bytes) -> bool:
        """The page can be brought back."""
        ...

    def save(self, page: int, key: bytes) -> None:
        """Begin to copy the page, unless it is there already or not worth it. It must stay as it is until `settle`."""
        ...

    def settle(self, key: bytes) -> None:
        """Wait until the page is copied, if it is being copied."""
        ...


class Nowhere:
    """Pages without a place near are forgotten."""

    lasting = False

    def has(self, key: bytes) -> bool:
        return False

    def save(self, page: int, key: bytes) -> None: ...

    def settle(self, key: bytes) -> None: ...


class Pages:
    """Pages 0 to `count` - 1. A page is held (by one or more), kept (findable, by nobody), or free."""

    def __init__(self, count: int, page_tokens: int, elsewhere: Elsewhere | None = None) -> None:
        self.count, self.page_tokens = count, page_tokens
        self.holders = [0] * count
        self._elsewhere = elsewhere or Nowhere()
        self._free = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently held first
        self._by_digest: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self._free) + len(self._kept)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def take(self) -> int:
        """A page for new content, held once. When none is free the kept page held least recently goes elsewhere."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            key = self._digests.pop(page)
            del self._by_digest[key]
            self._elsewhere.save(page, key)
            self._elsewhere.settle(key)
        self.holders[page] = 1
        return page

    def save_ahead(self) -> None:
        """Begin to copy what will have to make way soon, so that `take` need not wait for it."""
        for page in islice(self._kept, max(0, self.count // AHEAD - len(self._free))):
            self._elsewhere.save(page, self._digests[page])

    def hold(self, page: int) -> int:
        """One more holds the page."""
        if self.holders[page] == 0:
            del self._kept[page]
        self.holders[page] += 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One less holds each; the last of a prefix is forgotten before the first."""
        for page in reversed(pages):
            self.holders[page] -= 1
            assert self.holders[page] >= 0, f"page {page} was released once too often"
            if self.holders[page] == 0:
                if page in self._digests:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def find(self, tokens: Sequence[int]) -> list[tuple[bytes, int | None]]:
        """(digest, page) of the longest known prefix of `tokens`; None for a page that is elsewhere. At least one token
        is left over: a model must compute something to say what comes next."""
        found: list[tuple[bytes, int | None]] = []
        for key in self._chain(tokens, (len(tokens) - 1) // self.page_tokens):
            page = self._by_digest.get(key)
            if page is None and not self._elsewhere.has(key):
                break
            found.append((key, page))
        return found

    def know(self, tokens: Sequence[int], pages: Sequence[int], first: int, computed: int) -> None:
        """Pages from number `first` on that are full with `computed` tokens can be found from now on. A page whose twin is
        known already stays its holder's own."""
        last = computed // self.page_tokens
        if first >= last:
            return
        before = self._digests.get(pages[first - 1]) if first else ROOT
        start = first if before is not None else 0
        chain = self._chain(tokens[start * self.page_tokens :], last - start, before or ROOT)
        for number, key in enumerate(chain, start):
            if number >= first:
                self.learn(key, pages[number])

    def learn(self, key: bytes, page: int) -> None:
        """What the page holds is known by `key` from now on."""
        if key not in self._by_digest and page not in self._digests:
            self._by_digest[key] = page
            self._digests[page] = key
            if self._elsewhere.lasting:
                self._elsewhere.save(page, key)

    def _chain(self, tokens: Sequence[int], count: int, before: bytes = ROOT) -> Iterator[bytes]:
        """Digests of the first `count` pages of `tokens`."""
        for start in range(0, count * self.page_tokens, self.page_tokens):
            before = digest(before, tokens[start : start + self.page_tokens])
            yield before

    def check(self, holding: Sequence[Sequence[int]] = ()) -> None:
        """Integrity: raises AssertionError unless `holding`, the pages of all sequences, are exactly what is held."""
        counts = [0] * self.count
        for pages in holding:
            for page in pages:
                counts[page] += 1
        wrong = [page for page in range(self.count) if counts[page] != self.holders[page]]
        assert not wrong, f"page {wrong[0]} is held {self.holders[wrong[0]]} times, by {counts[wrong[0]]} sequences"
        held = sum(1 for holders in self.holders if holders)
        assert held + self.available == self.count, f"{self.count - held - self.available} pages are lost"
        assert len(set(self._free) | set(self._kept)) == self.available, "a page is free twice"
        assert {page: key for key, page in self._by_digest.items()} == self._digests, "two pages have one digest"
