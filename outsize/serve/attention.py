"""Attention of an unchanged model over paged keys and values: one packed forward for many sequences, without padding.

New keys and values are written into the cache, then each span attends to its own sequence, where `Layout` says. Shapes
are written with B sequences, N tokens, H query heads, K key-value heads, R = H / K, T keys, D channels of a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from outsize.errors import ModelError
from outsize.plan import KvLayer
from outsize.serve.cache import Cache, Rows
from outsize.serve.layout import Chunk, DecodeGroup, Layout

NAME = "outsize_paged"  # registered without a mask function: transformers then builds no mask at all
LENGTHWISE = ("longrope", "dynamic")  # rotary embeddings that change with the longest sequence of a batch
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
    """Have an unmodified transformers model call `attend`. Raises ModelError when it cannot.

    Rotary embeddings that would change with the longest sequence of a batch stay what they are up to `context_limit`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config: Any = model.config
    if config.is_encoder_decoder:
        raise ModelError(f"{type(model).__name__} has an encoder; only decoder-only models can be served.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{type(model).__name__} does not let its attention be replaced, so it cannot be served.")
    model.set_attn_implementation(NAME)  # pyright: ignore[reportCallIssue]
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            kinds.update({layer: "default" for layer, kind in kinds.items() if kind in LENGTHWISE})
        elif kinds in LENGTHWISE:
            module.rope_type = "default"  # pyright: ignore[reportArgumentType]


def context_limit(model: nn.Module) -> tuple[int, str]:
    """Tokens of the longest sequence that can be served, and a clause that says why."""
    config: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    most = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    found = most, f"{type(model).__name__} attends to {most} tokens"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = parameters.get("rope_type")
        if kind in LENGTHWISE:
            short = most if kind == "dynamic" else int(parameters["original_max_position_embeddings"])
            why = f"{type(model).__name__} has {kind} rotary embeddings, which change for a whole batch when one of its"
            if short <= found[0]:
                found = short, f"{why} sequences grows longer: it can be served up to {short} tokens"
    return found


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
    number: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    given = query, key, value
    if has_torch_function(given):  # a recorder is to see one call, whose parts depend on the step
        return handle_torch_function(paged_attention, given, *given, paged, number, scale, softcap), None
    return paged_attention(*given, paged, number, scale, softcap), None


def paged_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    paged: Paged,
    number: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """What `attend` gives, in layer `number`."""
    cache, layout = paged.cache, paged.layout
    keys, values, layer = cache.keys[number], cache.values[number], cache.layers[number]
    _write(keys, key, layout)
    _write(values, value, layout)
    groups, chunks, at_once = layout.reads(layer, keys, values)
    how = _How(scale, softcap, softcap is None and at_once)
    queries, heads = query.transpose(1, 2), key.shape[1]  # [1, N, H, D]
    if len(groups) == 1 and groups[0].where is None:
        return _decode(queries, keys, values, groups[0], heads, how)
    queries = queries[0]
    output = query.new_empty((query.shape[2], query.shape[1], value.shape[-1]))
    for group in groups:
        output[group.where] = _decode(queries[group.where], keys, values, group, heads, how)
    for chunk in chunks:
        span = slice(chunk.first, chunk.last)
        near = _gather(keys, chunk.keys, heads), _gather(values, chunk.values, heads)
        _attend_chunk(queries[span], *near, chunk, how, output[span])
    return output.unsqueeze(0)


@dataclass(frozen=True)
class _How:
    """Scores are scaled, and perhaps soft-capped; with `at_once` by torch's own attention, else by products."""

    scale: float
    softcap: float | None
    at_once: bool


def _refuse(module: nn.Module, mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    unknown = [name for name, given in others.items() if given is not None and name not in HARMLESS]
    if mask is not None or unknown:
        what = "a mask of its own" if mask is not None else unknown[0]
        raise ModelError(f"{type(module).__name__} attends with {what}, which paged attention does not know.")


def _write(cache: Rows, new: torch.Tensor, layout: Layout) -> None:
    """`new` [1, K, N, D], written token by token: that is how a projection leaves it."""
    size = new.shape[-1]
    cache.slots.index_copy_(0, layout.writes(new.shape[1], cache.stride), new.transpose(1, 2).reshape(-1, size))


def _gather(cache: Rows, rows: torch.Tensor, *batch: int) -> torch.Tensor:
    """[*batch, T, D] of the cache, a page's tokens of one head at a time."""
    return cache.rows.index_select(0, rows).view(*batch, -1, cache.slots.shape[1])


def _scores(query: torch.Tensor, keys: torch.Tensor, how: _How) -> torch.Tensor:
    """[batch, n, T] of `query` [batch, n, D] and `keys` [batch, T, D], scaled and perhaps soft-capped."""
    scores = torch.baddbmm(query.new_empty(1), query, keys.transpose(1, 2), beta=0, alpha=how.scale)
    return scores if how.softcap is None else torch.tanh(scores / how.softcap) * how.softcap


def _attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None, how: _How
) -> torch.Tensor:
    """Like `query` [batch, n, queries, D]; `keys` and `values` [batch, n, T, D]; `hidden`, which may be the same for all n,
    is added to the scores. The operation is named, as torch would quietly choose a slower one."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return attention(query, keys, values, attn_mask=hidden, scale=how.scale)[0]


def _decode(query: torch.Tensor, keys: Rows, values: Rows, group: DecodeGroup, heads: int, how: _How) -> torch.Tensor:
    """`query` [.., B, H, D] gives [.., B, H, D]."""
    batch, size = query.shape[-3], query.shape[-1]
    if how.at_once:
        near, over = _gather(keys, group.keys, batch, heads), _gather(values, group.values, batch, heads)
        return _attended(query.view(batch, heads, -1, size), near, over, group.hidden, how).reshape(query.shape)
    scores = _scores(query.reshape(batch * heads, -1, size), _gather(keys, group.keys, batch * heads), how)
    if group.hidden is not None:
        scores.view(batch, heads, -1, scores.shape[-1]).add_(group.hidden)
    weights = torch.softmax(scores, dim=-1)
    return torch.bmm(weights, _gather(values, group.values, batch * heads)).view(*query.shape[:-1], -1)


def _attend_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: Chunk, how: _How, output: torch.Tensor
) -> None:
    """`query` and `output` [n, H, D], `keys` and `values` [K, T, D]: block by block, each against the keys it sees."""
    heads, size = keys.shape[0], query.shape[-1]
    for block in chunk.blocks:
        count, seen = block.last - block.first, slice(block.low, block.high)
        queries = query[block.first : block.last].view(count, heads, -1, size).permute(1, 2, 0, 3)  # [K, R, n, D]
        if how.at_once:
            near, over = (rows[:, None, seen].expand(-1, queries.shape[1], -1, -1) for rows in (keys, values))
            found = _attended(queries, near, over, block.hidden, how)
        else:
            scores = _scores(queries.reshape(heads, -1, size), keys[:, seen], how)
            scores.view(heads, -1, count, block.high - block.low)[..., -block.hidden.shape[1] :].add_(block.hidden)
            found = torch.bmm(torch.softmax(scores, dim=-1), values[:, seen])
            found = found.view(heads, -1, count, values.shape[-1])
        output[block.first : block.last].view(count, heads, -1, values.shape[-1]).copy_(found.permute(2, 0, 1, 3))
