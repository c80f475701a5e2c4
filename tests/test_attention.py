"""Torch's own attention and products in blocks are the same attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.transfer import Transfers
from outsize.plan import KvLayer
from outsize.serve import layout as layouts
from outsize.serve.attention import Paged, paged_attention
from outsize.serve.cache import Cache
from outsize.serve.layout import Layout, Span

SIZE, HEADS, REPEATS, PAGES = 16, 2, 3, 60
CPU = torch.device("cpu")
# Weights add up to 1 and values are below 6: sums of at most 320 terms, in another order.
TOLERANCE = 320 * 6 * torch.finfo(torch.float32).eps
STEPS = {
    "a prompt": [Span(range(20), 0, 300)],
    "its second chunk": [Span(range(20), 131, 169)],
    "sequences that decode": [Span(range(4), 50, 1), Span(range(10, 16), 95, 1), Span([30], 0, 1)],
    "some that decode, and a prompt": [Span(range(4), 50, 1), Span(range(10, 16), 95, 1), Span(range(40, 42), 0, 17)],
    "both": [Span(range(4), 50, 1), Span(range(10, 16), 1, 90), Span([30], 15, 1), Span(range(40, 42), 0, 17)],
}


@contextmanager
def filled_cache(layer: KvLayer, generator: torch.Generator) -> Iterator[Cache]:
    store = Store({"host": HostTier(1 << 30)}, 1 << 20, allocate_slab, Transfers())
    cache = Cache(store, [layer], PAGES, 16)
    for rows in (cache.keys[0].rows, cache.values[0].rows):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    try:
        yield cache
    finally:
        cache.close()
        store.close()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("step", STEPS)
def test_both_ways_attend_to_the_same(step: str, window: int | None) -> None:
    generator, spans = torch.Generator().manual_seed(0), STEPS[step]
    count = sum(span.count for span in spans)
    query, key, value = (
        torch.randn((1, heads, count, SIZE), generator=generator) for heads in (HEADS * REPEATS, HEADS, HEADS)
    )
    with filled_cache(KvLayer(HEADS, SIZE, SIZE, "float32", window), generator) as cache:
        found = []
        for at_once in (True, False):
            layout = Layout(spans, 16, CPU, lambda layer, at_once=at_once: at_once)
            found.append(paged_attention(query, key, value, Paged(cache, layout), 0, SIZE**-0.5, None))
    assert found[0].shape == (1, count, HEADS * REPEATS, SIZE)
    assert float((found[0] - found[1]).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("in_vain", [0, 1 << 20], ids=["a group for each length", "one group"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "by products"])
@pytest.mark.parametrize("step", STEPS)
def test_a_sequence_attends_as_if_it_were_alone(
    step: str, at_once: bool, in_vain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever it is grouped with, and wherever in the step."""
    monkeypatch.setattr(layouts, "IN_VAIN_BYTES", (in_vain, in_vain))
    generator, spans = torch.Generator().manual_seed(0), STEPS[step]
    count = sum(span.count for span in spans)
    given = [torch.randn((1, heads, count, SIZE), generator=generator) for heads in (HEADS * REPEATS, HEADS, HEADS)]
    with filled_cache(KvLayer(HEADS, SIZE, SIZE, "float32", None), generator) as cache:

        def attended(spans: list[Span], first: int, last: int) -> torch.Tensor:
            layout = Layout(spans, 16, CPU, lambda layer: at_once)
            return paged_attention(*(t[:, :, first:last] for t in given), Paged(cache, layout), 0, SIZE**-0.5, None)

        together, first = attended(spans, 0, count), 0
        for span in spans:
            alone = attended([span], first, first + span.count)
            assert float((together[:, first : first + span.count] - alone).abs().max()) <= TOLERANCE
            first += span.count
