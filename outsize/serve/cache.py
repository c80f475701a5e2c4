"""Where keys and values lie: pages, each one run of bytes that holds some tokens of all layers.

A page is moved, copied and cleared in one piece. Inside it a *row* is what one head of one layer keeps of the page's
tokens; every layer's rows lie at whole numbers of their own size from the cache's beginning, so that one `index_select`
gathers rows of any pages. Shapes: T tokens of a page, D channels of a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch

from outsize.memory.block import make_block
from outsize.memory.store import Store
from outsize.memory.tier import PAGE
from outsize.plan import KvLayer

BLOCK = "kv"


@dataclass(frozen=True)
class PageShape:
    """Bytes from a page's beginning to each layer's keys and values, and bytes of a page."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    nbytes: int


def page_shape(layers: Sequence[KvLayer], page_tokens: int) -> PageShape:
    """Whole pages of the operating system too, so that a page goes to a disk past the page cache."""
    starts: list[int] = []
    end, unit = 0, PAGE
    for layer in layers:
        for size in (layer.key_size, layer.value_size):
            row = row_bytes(layer, size, page_tokens)
            starts.append(-(-end // row) * row)
            end, unit = starts[-1] + layer.heads * row, lcm(unit, row)
    return PageShape(tuple(starts[::2]), tuple(starts[1::2]), -(-end // unit) * unit)


def row_bytes(layer: KvLayer, size: int, page_tokens: int) -> int:
    return page_tokens * size * getattr(torch, layer.dtype).itemsize


@dataclass(frozen=True)
class Rows:
    """Keys, or values, of one layer in all pages: `rows` [.., T * D] of which a page has every `stride`-th first and its
    other heads' after it, and the same memory as `slots` [.., D], token by token."""

    rows: torch.Tensor
    slots: torch.Tensor
    stride: int


class Cache:
    """`bytes` [pages, page bytes] in a block of the store that stays near, and the view of it of each layer, by the layer's
    number in the model. `layers` are those from number `first` on."""

    def __init__(self, store: Store, layers: Sequence[KvLayer], pages: int, page_tokens: int, first: int = 0) -> None:
        self.page_tokens, self._store = page_tokens, store
        shape = page_shape(layers, page_tokens)
        block = make_block(BLOCK, [("pages", "kv", torch.uint8, (pages, shape.nbytes))])
        store.create(block, store.near, durable=False)
        self._lease = store.lease(block.name, fresh=True)
        # Zeroed, so that the operating system gives the memory now and not page by page under the first requests.
        self.bytes = self._lease.tensors["pages"].zero_()
        same = {layer: layer for layer in layers}
        self.layers = {number: same[layer] for number, layer in enumerate(layers, first)}
        self.keys, self.values = dict[int, Rows](), dict[int, Rows]()
        for (number, layer), keys, values in zip(self.layers.items(), shape.keys, shape.values, strict=True):
            self.keys[number] = self._view(keys, layer, layer.key_size)
            self.values[number] = self._view(values, layer, layer.value_size)

    def _view(self, start: int, layer: KvLayer, size: int) -> Rows:
        row = row_bytes(layer, size, self.page_tokens)
        numbers = self.bytes.view(-1)[start:].view(getattr(torch, layer.dtype))
        return Rows(numbers.view(-1, self.page_tokens * size), numbers.view(-1, size), self.bytes.shape[1] // row)

    @property
    def device(self) -> torch.device:
        return self.bytes.device

    @property
    def page_bytes(self) -> int:
        return self.bytes.shape[1]

    def copy(self, source: int, target: int) -> None:
        """Fill one page with what another holds."""
        self.bytes[target] = self.bytes[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero them: what a sequence is not to see still goes through its products, and nothing times NaN is NaN."""
        for page in pages:
            self.bytes[page].zero_()

    def close(self) -> None:
        """Let go of the memory."""
        self.keys.clear()
        self.values.clear()
        del self.bytes
        self._lease.release()
        self._store.remove(BLOCK)
