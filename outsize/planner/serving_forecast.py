"""What those who ask will see of a plan for serving: tokens a second, and how long until the first.

The very step that will run, attention over pages included, runs on fake tensors of the model's shapes, and each torch
operation has its price; what streams is read meanwhile, and every weight passes from memory through the processor once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.distributed.relay import Relay
from outsize.machine.machine import Machine
from outsize.memory.null import NullTier
from outsize.memory.store import Store
from outsize.memory.transfer import Transfers
from outsize.model.route import Leg
from outsize.plan import KvLayer, Plan, Served
from outsize.planner.prices import Prices, is_view
from outsize.planner.script import Live
from outsize.planner.trial import Watched, on_fake_tensors
from outsize.serve.attention import Paged
from outsize.serve.cache import Cache
from outsize.serve.layout import Layout, Span
from outsize.serve.leg import Cut


@dataclass(frozen=True)
class Forecast:
    """Seconds of steps of `model` under `plan`, on `machine` with these `prices`."""

    model: nn.Module
    plan: Plan
    machine: Machine
    prices: Prices
    near_bytes: int
    known: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def step(self, sequences: int, start: int, count: int) -> float:
        """`sequences` of them compute `count` tokens each, from position `start` on."""
        key = sequences, start, count
        if key not in self.known:
            assert self.plan.serving is not None and self.plan.predicted is not None
            serving = self.plan.serving
            each = -(-(start + count) // serving.page_tokens)
            spans = [Span(range(n * each, (n + 1) * each), start, count) for n in range(sequences)]
            meter = Meter(self.prices, self.machine)
            run_step(self.model, serving.layers, spans, serving.page_tokens, sequences, meter)
            read = self.plan.predicted.bytes_read / self.machine.link("disk", "host").bytes_per_second
            # A plain copy reads a byte and writes one; a product only reads its weights.
            passing = self.near_bytes / (2 * self.machine.processor("host").copy)
            self.known[key] = max(meter.seconds, passing, read)
        return self.known[key]


def with_forecast(plan: Plan, model: nn.Module, machine: Machine, prices: Prices) -> Plan:
    """The plan with what it means for requests whose context is half full."""
    assert plan.serving is not None and plan.predicted is not None
    serving, near = plan.serving, plan.near_weights
    near_bytes = sum(p.numel() * p.dtype.itemsize for name, p in model.named_parameters() if name in near)
    forecast = Forecast(model, plan, machine, prices, near_bytes)
    tokens = serving.pages * serving.page_tokens
    requests = min(serving.seats, max(1, tokens // serving.context))
    half = max(1, serving.context // 2)
    together = min(serving.seats, max(1, tokens // (half + 1)))
    alone, many = forecast.step(1, half, 1), forecast.step(together, half, 1)
    chunk = min(serving.step_tokens, half)
    reading = forecast.step(1, 0, chunk)
    chunks = -(-half // chunk)
    token_bytes = serving.page_bytes / serving.page_tokens
    moves = [token_bytes / machine.link(*way).bytes_per_second for way in (("disk", "host"), ("host", "disk"))]
    served = Served(requests, together, 1 / alone, together / many, half, chunks * reading, chunk / reading, many)
    return replace(
        plan,
        serving=replace(serving, token_seconds=(reading / chunk, *moves)),
        predicted=replace(plan.predicted, seconds_per_step=many, tokens_per_second=together / many),
        served=served,
    )


class Meter(TorchDispatchMode):
    """Adds up what operations cost. Of the cache, gathering and scattering touch only the rows they name."""

    def __init__(self, prices: Prices, machine: Machine) -> None:
        super().__init__()
        self.seconds, self._prices, self._processor = 0.0, prices, machine.compute

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in NAMED_ROWS:
            moved = result if func is torch.ops.aten.index_select.default else args[-1]
            touched = 2 * moved.numel() * moved.element_size()
            self.seconds += touched / self._processor.elementwise.at(touched) + self._processor.operation_seconds
        elif not is_view(func):
            self.seconds += self._prices.of(func, args, kwargs or {}, result).seconds
        return result


NAMED_ROWS = (torch.ops.aten.index_select.default, torch.ops.aten.index_copy_.default)


def run_step(
    model: nn.Module,
    layers: Sequence[KvLayer],
    spans: list[Span],
    page_tokens: int,
    seats: int,
    mode: TorchDispatchMode | None = None,
    leg: Leg | None = None,
) -> list[Live]:
    """One step on fake tensors, with logits for `seats` tokens, under `mode`; or its `leg`, whose `layers` these are.
    Returns what came and went meanwhile, weights and pages not among it."""
    count = sum(span.count for span in spans)
    page_count = 1 + max(page for span in spans for page in span.pages)
    with on_fake_tensors(model) as fake:
        store = Store({"host": NullTier("host", 1 << 60)}, 0, _fake_bytes, Transfers(readers=0))
        cache = Cache(store, layers, page_count, page_tokens, 0 if leg is None else leg.layers[0])
        store.transfers.close()
        if leg is not None:
            Cut(fake, leg, ImaginedRelay())
        with Watched([*fake.parameters(), *fake.buffers(), cache.bytes]) as watched:
            layout = Layout(spans, page_tokens, torch.device("cpu"))
            given = {
                "input_ids": torch.zeros((1, count), dtype=torch.long),
                "position_ids": layout.positions(),
                "logits_to_keep": torch.zeros(min(seats, count), dtype=torch.long),
                "paged": Paged(cache, layout),
            }
            with mode or nullcontext():
                fake(use_cache=False, **given).logits.float()
        return watched.events


class ImaginedRelay(Relay):
    """Nobody else is there, and what is taken takes memory."""

    def take(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(like)


def _fake_bytes(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)
