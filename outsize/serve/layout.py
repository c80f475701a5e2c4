"""Which rows of the cache a step writes and reads: worked out once a step, not once a layer.

Tokens of all sequences lie one after the other in one row `[1, tokens]`; a *span* is one sequence's run of them. Shapes
are written with B sequences, N tokens, K key-value heads, P pages of a sequence, T keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from outsize.plan import KvLayer
from outsize.serve.cache import Rows

# By products, and by torch's own attention, which takes less of a call:
GATHER_BYTES = 4 << 20, 2 << 20  # keys of several decoding sequences that are gathered at once, at most
IN_VAIN_BYTES = 1 << 20, 128 << 10  # of them not needed, as lengths differ: a group more costs as much time
QUERY_BLOCK = 128  # queries of a prompt's chunk that attend at once


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `start` + `count` of a sequence whose keys and values lie in `pages`."""

    pages: Sequence[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of about one length that attend with one query each: `where` in the packed row, a run of it where they lie
    side by side, else [B], None if they are all of it; rows [B * K * P] of keys and of values; `hidden` [B, 1, 1, T] is added
    to the scores: minus infinity where a gathered key is not the sequence's. None if there is no such key."""

    where: slice | torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class Block:
    """Queries `first` to `last` of a chunk and what they see: gathered keys `low` to `high`. `hidden` [last - first, so many
    keys at the end] is added to the scores: minus infinity where a key is not seen. All keys, where they attend at once."""

    first: int
    last: int
    low: int
    high: int
    hidden: torch.Tensor


@dataclass(frozen=True)
class Chunk:
    """A span of several queries, packed tokens `first` to `last`; its keys and values are gathered by these rows."""

    first: int
    last: int
    keys: torch.Tensor
    values: torch.Tensor
    blocks: list[Block]


def has_tiles(layer: KvLayer) -> bool:
    """The processor multiplies the layer's numbers in tiles (AMX). There torch's own attention takes half the time of
    products in blocks; elsewhere it takes several times as long (docs/log.md). It may copy keys and values for each head,
    which is no more than the scores of a block where these are as many."""
    fits = layer.key_size == layer.value_size <= QUERY_BLOCK
    return layer.dtype == "bfloat16" and fits and _tiles()


@cache
def _tiles() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and supported()


class Layout:
    """What one step reads and writes in the cache, for layers of each kind; `at_once` says where queries, keys and values
    attend in one call."""

    def __init__(
        self,
        spans: list[Span],
        page_tokens: int,
        device: torch.device,
        at_once: Callable[[KvLayer], bool] = has_tiles,
    ) -> None:
        self.spans, self.page_tokens, self.device, self.at_once = spans, page_tokens, device, at_once
        firsts, first = [], 0
        for span in spans:
            firsts.append(first)
            first += span.count
        self.firsts, self.tokens = firsts, first
        self._writes: dict[tuple[int, int], torch.Tensor] = {}
        self._reads: dict[KvLayer, tuple[list[DecodeGroup], list[Chunk], bool]] = {}

    def begun(self) -> list[int]:
        """Pages that this step begins to fill and leaves unfilled."""
        size = self.page_tokens
        last = [(span, (span.end - 1) // size) for span in self.spans if span.end % size]
        return [span.pages[number] for span, number in last if number * size >= span.start]

    def positions(self) -> torch.Tensor:
        """Position of every packed token in its sequence `[1, N]`."""
        return self._index(p for span in self.spans for p in range(span.start, span.end)).unsqueeze(0)

    def writes(self, heads: int, stride: int) -> torch.Tensor:
        """Slots that take the new keys, or values, token by token `[N * K]`; `stride`: rows of a page."""
        key = heads, stride
        if key not in self._writes:
            size = self.page_tokens
            slots = self._index(
                span.pages[position // size] * stride * size + position % size
                for span in self.spans
                for position in range(span.start, span.end)
            )
            by_head = torch.arange(heads, device=self.device) * size
            self._writes[key] = (slots.unsqueeze(1) + by_head).view(-1)
        return self._writes[key]

    def reads(self, layer: KvLayer, keys: Rows, values: Rows) -> tuple[list[DecodeGroup], list[Chunk], bool]:
        """Groups of single queries, chunks of many, and whether they attend in one call."""
        if layer not in self._reads:
            token_bytes = layer.heads * layer.key_size * keys.rows.element_size()
            single = [i for i, span in enumerate(self.spans) if span.count == 1]
            alike = self._alike(single, layer, token_bytes)
            groups = [self._group(members, layer, keys.stride, values.stride) for members in alike]
            several = [i for i, span in enumerate(self.spans) if span.count > 1]
            chunks = [self._chunk(i, layer, keys.stride, values.stride) for i in several]
            self._reads[layer] = groups, chunks, self.at_once(layer)
        return self._reads[layer]

    def _low(self, span: Span, window: int | None) -> int:
        """The first page with a key that some query of the span may see."""
        return 0 if window is None else max(0, span.start - window + 1) // self.page_tokens

    def _pages_seen(self, span: Span, window: int | None) -> Sequence[int]:
        return span.pages[self._low(span, window) : -(-span.end // self.page_tokens)]

    def _alike(self, single: list[int], layer: KvLayer, token_bytes: int) -> list[list[int]]:
        """Sequences sorted by length and cut where a group would gather too much, or too much in vain."""
        lengths = {i: len(self._pages_seen(self.spans[i], layer.window)) for i in single}
        page_bytes, at_once = token_bytes * self.page_tokens, self.at_once(layer)
        most, in_vain = max(1, GATHER_BYTES[at_once] // page_bytes), IN_VAIN_BYTES[at_once] // page_bytes
        groups: list[list[int]] = []
        needed = 0
        for i in sorted(single, key=lambda i: lengths[i]):
            size = (len(groups[-1]) + 1) * lengths[i] if groups else 0
            if groups and size <= most and size - needed - lengths[i] <= in_vain:
                groups[-1].append(i)
                needed += lengths[i]
            else:
                groups.append([i])
                needed = lengths[i]
        return [sorted(group) for group in groups]

    def _group(self, members: list[int], layer: KvLayer, keys: int, values: int) -> DecodeGroup:
        spans = [self.spans[i] for i in members]
        seen = [list(self._pages_seen(span, layer.window)) for span in spans]
        width = max(len(pages) for pages in seen)
        padded = torch.tensor([pages + pages[-1:] * (width - len(pages)) for pages in seen], device=self.device)
        low = [self._low(span, layer.window) * self.page_tokens for span in spans]
        complete = all(span.end - first == width * self.page_tokens for span, first in zip(spans, low, strict=True))
        whole = complete and (layer.window is None or all(span.end <= layer.window for span in spans))
        where = self._where([self.firsts[i] for i in members])
        hidden = None if whole else _minus_infinity(self._unseen(spans, low, width, layer.window), layer)
        return DecodeGroup(where, self._rows(padded, layer, keys), self._rows(padded, layer, values), hidden)

    def _where(self, places: list[int]) -> slice | torch.Tensor | None:
        run = range(places[0], places[-1] + 1)
        if places != list(run):
            return self._index(places)
        return None if len(run) == self.tokens else slice(run.start, run.stop)

    def _unseen(self, spans: list[Span], low: list[int], width: int, window: int | None) -> torch.Tensor:
        here = self._index(span.start for span in spans).view(-1, 1, 1, 1)
        keys = self._index(low).view(-1, 1, 1, 1) + torch.arange(width * self.page_tokens, device=self.device)
        hidden = keys > here
        if window is not None:
            hidden |= keys <= here - window
        return hidden

    def _chunk(self, i: int, layer: KvLayer, keys: int, values: int) -> Chunk:
        span, low = self.spans[i], self._low(self.spans[i], layer.window) * self.page_tokens
        pages = torch.tensor([list(self._pages_seen(span, layer.window))], device=self.device)
        starts = range(0, span.count, QUERY_BLOCK)
        blocks = [self._block(span, first, low, layer) for first in starts]
        rows = self._rows(pages, layer, keys), self._rows(pages, layer, values)
        return Chunk(self.firsts[i], self.firsts[i] + span.count, *rows, blocks)

    def _block(self, span: Span, first: int, low: int, layer: KvLayer) -> Block:
        """`low`: position of the first key that was gathered."""
        window, last = layer.window, min(first + QUERY_BLOCK, span.count)
        start, end = span.start + first, span.start + last
        begin = low if window is None else max(low, start - window + 1)
        whole = window is None or end - begin <= window  # every query sees the first key
        seen = start if whole and not self.at_once(layer) else begin  # some query does not see what is here or later
        queries = torch.arange(start, end, device=self.device).unsqueeze(1)
        keys = torch.arange(seen, end, device=self.device)
        hidden = keys > queries
        if not whole:
            hidden |= keys <= queries - (window or 0)
        return Block(first, last, begin - low, end - low, _minus_infinity(hidden, layer))

    def _rows(self, pages: torch.Tensor, layer: KvLayer, stride: int) -> torch.Tensor:
        """Head by head: `pages` [B, P] gives [B * K * P]."""
        by_head = torch.arange(layer.heads, device=self.device).view(1, layer.heads, 1)
        return (pages.unsqueeze(1) * stride + by_head).view(-1)

    def _index(self, numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=self.device)


def _minus_infinity(hidden: torch.Tensor, layer: KvLayer) -> torch.Tensor:
    """Where `hidden` is true, elsewhere zero, in the layer's dtype."""
    zeros = torch.zeros(hidden.shape, dtype=getattr(torch, layer.dtype), device=hidden.device)
    return zeros.masked_fill_(hidden, float("-inf"))
