"""Who holds which page of the key-value cache, and which pages hold the same tokens.

A page is a place for the keys and values of `page_tokens` tokens in all layers. Pages are counted, not copied: two
sequences that begin with the same tokens hold the same pages. A full page is known by a digest of its tokens and of all
before them, so that equal digests mean equal prefixes; it stays findable after its last holder has let go, until its
place is wanted."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

ROOT = b""


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """What a full page is known by: SHA-256 over the page before it and its own tokens."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class Pages:
    """Pages 0 to `count` - 1. A page is held (by one or more), kept (findable, by nobody), or free."""

    def __init__(self, count: int, page_tokens: int) -> None:
        self.count, self.page_tokens = count, page_tokens
        self.holders = [0] * count
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
        """A page for new content, held once. The kept page held least recently is forgotten when none is free."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._by_digest[self._digests.pop(page)]
        self.holders[page] = 1
        return page

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

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the longest known prefix of `tokens`, held once more each. At least one token is left over:
        a model must compute something to say what comes next."""
        found: list[int] = []
        before = ROOT
        for start in range(0, len(tokens) - self.page_tokens, self.page_tokens):
            before = digest(before, tokens[start : start + self.page_tokens])
            page = self._by_digest.get(before)
            if page is None:
                break
            found.append(self.hold(page))
        return found

    def know(self, tokens: Sequence[int], pages: Sequence[int], first: int, computed: int) -> None:
        """Pages from number `first` on that are full with `computed` tokens can be found from now on. A page whose twin is
        known already stays its holder's own."""
        last = computed // self.page_tokens
        if first >= last:
            return
        before = ROOT if first == 0 else self._digest_before(tokens, pages, first)
        for number in range(first, last):
            before = digest(before, tokens[number * self.page_tokens : (number + 1) * self.page_tokens])
            if before not in self._by_digest and pages[number] not in self._digests:
                self._by_digest[before] = pages[number]
                self._digests[pages[number]] = before

    def _digest_before(self, tokens: Sequence[int], pages: Sequence[int], first: int) -> bytes:
        known = self._digests.get(pages[first - 1])
        if known is not None:
            return known
        before = ROOT
        for number in range(first):
            before = digest(before, tokens[number * self.page_tokens : (number + 1) * self.page_tokens])
        return before

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
