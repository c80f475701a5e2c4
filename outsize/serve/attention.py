"""Attention of an unchanged model over paged keys and values: one packed forward for many sequences, without padding.

Vocabulary of this file: tokens of all sequences lie one after the other in one row `[1, tokens]`; a *span* is one
sequence's run of them. Keys and values of the span are written into its pages, then each span attends to its own
sequence. Which rows of the cache that takes is worked out once a step, by `Layout`, not once a layer. Shapes are written
with B sequences, N tokens, H query heads, K key-value heads, R = H / K, T keys, D channels of a head."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from outsize.errors import ModelError
from outsize.memory.block import make_block
from outsize.memory.store import Lease, Store
from outsize.plan import KvLayer

NAME = "outsize_paged"  # registered without a mask function: transformers then builds no mask at all
QUERY_BLOCK = 128  # queries of a prompt's chunk that attend at once
GATHER_BYTES = 4 << 20  # keys of several decoding sequences that are gathered at once, at most
WASTE = 1.25  # keys gathered over keys needed, within a group of decoding sequences
HARMLESS = {
    "output_router_logits",
    "dropout",
    "is_causal",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "cu_seq_lens_q",
}


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `start` + `count` of a sequence whose keys and values lie in `pages`."""

    pages: list[int]
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class Cache:
    """Keys and values `[pages, K, page_tokens, D]` of every layer, in blocks of the store that stay near."""

    def __init__(self, store: Store, layers: tuple[KvLayer, ...], pages: int, page_tokens: int) -> None:
        self.layers, self.page_tokens, self._store = layers, page_tokens, store
        self.tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._leases: list[Lease] = []
        for number, layer in enumerate(layers):
            shape = (pages, layer.heads, page_tokens)
            dtype = getattr(torch, layer.dtype)
            parts = [
                ("keys", "kv", dtype, (*shape, layer.key_size)),
                ("values", "kv", dtype, (*shape, layer.value_size)),
            ]
            block = make_block(f"kv:{number}", parts)
            store.create(block, store.near, durable=False)
            lease = store.lease(block.name, fresh=True)
            self._leases.append(lease)
            self.tensors.append((lease.tensors["keys"], lease.tensors["values"]))

    @property
    def device(self) -> torch.device:
        return self.tensors[0][0].device

    def copy(self, source: int, target: int) -> None:
        """Fill one page with what another holds."""
        for keys, values in self.tensors:
            keys[target] = keys[source]
            values[target] = values[source]

    def close(self) -> None:
        """Let go of the memory."""
        self.tensors.clear()
        for lease in self._leases:
            name = lease.name
            lease.release()
            self._store.remove(name)
        self._leases.clear()


@dataclass(frozen=True)
class DecodeGroup:
    """Sequences of about one length that attend with one query each: `where` [B] in the packed row, `rows` [B * K * P] of
    the cache, `hidden` [B, 1, T] true where a gathered key is not the sequence's, None if there is no such key."""

    where: torch.Tensor
    rows: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A span of several queries: packed tokens `first` to `first` + `count` see keys from `low` on, gathered by `rows`."""

    first: int
    count: int
    start: int
    low: int
    rows: torch.Tensor


class Layout:
    """What one step reads and writes in the cache, for layers of each number of heads and window."""

    def __init__(self, spans: list[Span], page_tokens: int, device: torch.device) -> None:
        self.spans, self.page_tokens, self.device = spans, page_tokens, device
        firsts, first = [], 0
        for span in spans:
            firsts.append(first)
            first += span.count
        self.firsts, self.tokens = firsts, first
        self._writes: dict[int, torch.Tensor] = {}
        self._reads: dict[tuple[int, int | None, int], tuple[list[DecodeGroup], list[Chunk]]] = {}

    def positions(self) -> torch.Tensor:
        """Position of every packed token in its sequence `[1, N]`."""
        return self._index(p for span in self.spans for p in range(span.start, span.end)).unsqueeze(0)

    def writes(self, heads: int) -> torch.Tensor:
        """Rows of `[pages * K * page_tokens, D]` that take the new keys, head by head `[K * N]`."""
        if heads not in self._writes:
            size = self.page_tokens
            slots = [
                (span.pages[position // size] * heads * size + position % size)
                for span in self.spans
                for position in range(span.start, span.end)
            ]
            by_head = torch.arange(heads, device=self.device).unsqueeze(1) * size
            self._writes[heads] = (self._index(slots).unsqueeze(0) + by_head).view(-1)
        return self._writes[heads]

    def reads(self, heads: int, window: int | None, token_bytes: int) -> tuple[list[DecodeGroup], list[Chunk]]:
        """Groups of single queries and chunks of many. `token_bytes`: of one token's keys in a layer."""
        key = heads, window, token_bytes
        if key not in self._reads:
            single = [i for i, span in enumerate(self.spans) if span.count == 1]
            groups = [self._group(g, heads, window) for g in self._alike(single, window, token_bytes)]
            chunks = [self._chunk(i, heads, window) for i, span in enumerate(self.spans) if span.count > 1]
            self._reads[key] = groups, chunks
        return self._reads[key]

    def _pages_seen(self, span: Span, window: int | None) -> list[int]:
        """The pages with keys that some query of the span may see."""
        low = 0 if window is None else max(0, span.start - window + 1) // self.page_tokens
        return span.pages[low : -(-span.end // self.page_tokens)]

    def _alike(self, single: list[int], window: int | None, token_bytes: int) -> list[list[int]]:
        """Sequences sorted by length and cut where a group would gather too much, or too much in vain."""
        lengths = {i: len(self._pages_seen(self.spans[i], window)) for i in single}
        most = max(1, GATHER_BYTES // (token_bytes * self.page_tokens))
        groups: list[list[int]] = []
        needed = 0
        for i in sorted(single, key=lambda i: lengths[i]):
            size = (len(groups[-1]) + 1) * lengths[i] if groups else 0
            if groups and size <= most and size <= WASTE * (needed + lengths[i]):
                groups[-1].append(i)
                needed += lengths[i]
            else:
                groups.append([i])
                needed = lengths[i]
        return groups

    def _group(self, members: list[int], heads: int, window: int | None) -> DecodeGroup:
        seen = [self._pages_seen(self.spans[i], window) for i in members]
        width = max(len(pages) for pages in seen)
        padded = torch.tensor([pages + pages[-1:] * (width - len(pages)) for pages in seen], device=self.device)
        low = self._index((self._low(self.spans[i], window)) for i in members).unsqueeze(1)
        here = self._index(self.spans[i].start for i in members).unsqueeze(1)
        keys = low + torch.arange(width * self.page_tokens, device=self.device)
        hidden = keys > here
        if window is not None:
            hidden |= keys <= here - window
        complete = all(
            (self.spans[i].end - self._low(self.spans[i], window)) == width * self.page_tokens for i in members
        )
        exact = complete and (window is None or all(self.spans[i].end <= window for i in members))
        where = self._index(self.firsts[i] for i in members)
        return DecodeGroup(where, self._rows(padded, heads), None if exact else hidden.unsqueeze(1))

    def _low(self, span: Span, window: int | None) -> int:
        """Position of the first key in the first page seen."""
        return 0 if window is None else max(0, span.start - window + 1) // self.page_tokens * self.page_tokens

    def _chunk(self, i: int, heads: int, window: int | None) -> Chunk:
        span = self.spans[i]
        pages = torch.tensor([self._pages_seen(span, window)], device=self.device)
        return Chunk(self.firsts[i], span.count, span.start, self._low(span, window), self._rows(pages, heads))

    def _rows(self, pages: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows of `[pages * K, page_tokens * D]`, head by head: `pages` [B, P] gives [B * K * P]."""
        by_head = torch.arange(heads, device=self.device).view(1, heads, 1)
        return (pages.unsqueeze(1) * heads + by_head).view(-1)

    def _index(self, numbers: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.long, device=self.device)


@dataclass(frozen=True)
class Paged:
    """What a step hands through the model to `attend`, as the keyword argument `paged`."""

    cache: Cache
    layout: Layout


class Discovery:
    """In place of `Paged` in a trial run: learns from the calls what each layer keeps for a token.

    Raises ModelError naming what it is that cannot be paged."""

    def __init__(self) -> None:
        self.layers: list[KvLayer] = []

    def complete(self, model: nn.Module) -> None:
        """The trial run is over. Layers without attention keep something else, which nobody pages."""
        layers = model.config.get_text_config().num_hidden_layers  # pyright: ignore
        if len(self.layers) != layers:
            raise ModelError(
                f"{type(model).__name__} has {layers} layers, of which {len(self.layers)} attend: what the others keep of a "
                "sequence cannot be paged."
            )

    def note(self, module: nn.Module, key: torch.Tensor, value: torch.Tensor, window: int | None) -> None:
        number = getattr(module, "layer_idx", None)
        if number != len(self.layers):
            raise ModelError(
                f"{type(module).__name__} is layer {number} where {len(self.layers)} was expected: a model whose layers do "
                "not attend once each, in order, cannot be served."
            )
        dtype = str(key.dtype).removeprefix("torch.")
        self.layers.append(KvLayer(key.shape[1], key.shape[-1], value.shape[-1], dtype, window))


def use_paged_attention(model: nn.Module) -> None:
    """Have an unmodified transformers model call `attend`. Raises ModelError when it cannot."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config: Any = model.config
    if config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} has an encoder; only decoder-only models can be served.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{type(model).__name__} does not let its attention be replaced, so it cannot be served.")
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]


def context_limit(model: nn.Module) -> int:
    """Tokens of the longest sequence the model was made for. Rotary embeddings that change with the length of the longest
    sequence in a batch are kept to the length below which they do not."""
    config: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    most = getattr(config, "max_position_embeddings", None) or 1 << 20
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("longrope", "dynamic"):
            original = parameters.get("original_max_position_embeddings")
            most = min(most, original or getattr(config, "original_max_position_embeddings", None) or most)
    return int(most)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Paged | Discovery | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` [1, H, N, D], `key` and `value` [1, K, N, D] of all packed tokens give
    [1, N, H, D]. Raises ModelError for an argument that this attention does not know."""
    if paged is None:
        raise ModelError(f"{type(module).__name__} is served by Outsize: only its engine can run it.")
    if isinstance(paged, Discovery):
        _refuse(module, attention_mask, others)
        paged.note(module, key, value, sliding_window)
        return query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1])), None
    keys, values = paged.cache.tensors[module.layer_idx]  # pyright: ignore[reportArgumentType, reportCallIssue]
    heads = key.shape[1]
    _write(keys, key, paged.layout.writes(heads))
    _write(values, value, paged.layout.writes(heads))
    groups, chunks = paged.layout.reads(heads, sliding_window, heads * key.shape[-1] * key.element_size())
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    queries = query[0].transpose(0, 1)  # [N, H, D]
    output = query.new_empty((query.shape[2], query.shape[1], value.shape[-1]))
    soften = functools.partial(_weights, scale=scale, softcap=softcap)
    for group in groups:
        output[group.where] = _decode(queries[group.where], keys, values, group, soften)
    for chunk in chunks:
        span = slice(chunk.first, chunk.first + chunk.count)
        _attend_chunk(queries[span], keys, values, chunk, sliding_window, soften, output[span])
    return output.unsqueeze(0), None


def _refuse(module: nn.Module, mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if mask is not None or unknown:
        what = "a mask of its own" if mask is not None else unknown[0]
        raise ModelError(f"{type(module).__name__} attends with {what}, which paged attention does not know.")


def _write(cache: torch.Tensor, new: torch.Tensor, rows: torch.Tensor) -> None:
    """`cache` [pages, K, page_tokens, D], `new` [1, K, N, D], `rows` [K * N]."""
    size = new.shape[-1]
    cache.view(-1, size).index_copy_(0, rows, new[0].reshape(-1, size))


def _gather(cache: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch, T, D] of the cache `[pages, K, page_tokens, D]`, whole pages of one head at a time."""
    pages, heads, tokens, size = cache.shape
    return cache.view(pages * heads, tokens * size).index_select(0, rows).view(batch, -1, size)


def _weights(scores: torch.Tensor, hidden: torch.Tensor | None, *, scale: float, softcap: float | None) -> torch.Tensor:
    """Softmax in float32 of scaled, perhaps soft-capped scores; `hidden` ones count nothing."""
    found = scores.float() * scale
    if softcap is not None:
        found = torch.tanh(found / softcap) * softcap
    if hidden is not None:
        found.masked_fill_(hidden, float("-inf"))
    return torch.softmax(found, dim=-1).to(scores.dtype)


def _decode(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: DecodeGroup, soften: Any
) -> torch.Tensor:
    """`query` [B, H, D] gives [B, H, D]."""
    batch, heads = query.shape[0], keys.shape[1]
    grouped = query.reshape(batch * heads, -1, query.shape[-1])
    scores = torch.bmm(grouped, _gather(keys, group.rows, batch * heads).transpose(1, 2))
    weights = soften(scores.view(batch, query.shape[1], -1), group.hidden).view(scores.shape)
    return torch.bmm(weights, _gather(values, group.rows, batch * heads)).view(batch, query.shape[1], -1)


def _attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: Chunk,
    window: int | None,
    soften: Any,
    output: torch.Tensor,
) -> None:
    """`query` and `output` [n, H, D]: blocks of queries, each against the keys up to its last query."""
    heads = keys.shape[1]
    near_keys, near_values = _gather(keys, chunk.rows, heads), _gather(values, chunk.rows, heads)
    for first in range(0, chunk.count, QUERY_BLOCK):
        count = min(QUERY_BLOCK, chunk.count - first)
        position = chunk.start + first
        low = 0 if window is None else max(0, position - window + 1 - chunk.low)
        high = position + count - chunk.low
        block = query[first : first + count].view(count, heads, -1, query.shape[-1])
        block = block.permute(1, 2, 0, 3).reshape(heads, -1, query.shape[-1])  # [K, R * n, D]
        scores = torch.bmm(block, near_keys[:, low:high].transpose(1, 2))
        hidden = _hidden(position, count, chunk.low + low, chunk.low + high, window, query.device)
        weights = soften(scores.view(-1, count, high - low), hidden).view(scores.shape)
        found = torch.bmm(weights, near_values[:, low:high]).view(heads, -1, count, values.shape[-1])
        output[first : first + count] = found.permute(2, 0, 1, 3).reshape(count, -1, values.shape[-1])


def _hidden(start: int, count: int, low: int, high: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[count, high - low]: true where the key comes after the query, or before its window."""
    queries = torch.arange(start, start + count, device=device).unsqueeze(1)
    keys = torch.arange(low, high, device=device)
    hidden = keys > queries
    return hidden if window is None else hidden | (keys <= queries - window)
