"""What those who ask will see of a plan for serving: tokens a second, and how long until the first.

The very step that will run, attention over pages included, runs on fake tensors of the model's shapes, and each torch
operation has its price; what streams is read meanwhile, and every weight passes from memory through the processor once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.distributed.arrangement import PEER, REMOTE
from outsize.distributed.relay import Relay
from outsize.distributed.wire import NO_WIRE, Wire
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
from outsize.serve.layout import Layout, Span, has_tiles
from outsize.serve.leg import Cut


@dataclass(frozen=True)
class Turn:
    """One worker's part of each step: its `leg` of the model, or all of it, by its `plan`."""

    plan: Plan
    near_bytes: int
    leg: Leg | None = None

    @classmethod
    def of(cls, plan: Plan, model: nn.Module, leg: Leg | None = None) -> Turn:
        near = (p for name, p in model.named_parameters() if name in plan.near_weights)
        return cls(plan, sum(p.numel() * p.dtype.itemsize for p in near), leg)

    @property
    def read_bytes(self) -> int:
        return 0 if self.plan.predicted is None else self.plan.predicted.bytes_read


@dataclass(frozen=True)
class Forecast:
    """Seconds of steps of `model` on `machine` with these `prices`, by those who take `turns`, one after the other, and pass
    hidden states on over the `wire`."""

    model: nn.Module
    machine: Machine
    prices: Prices
    turns: Sequence[Turn]
    wire: Wire
    known: dict[tuple[int, int, int], float] = field(default_factory=dict)

    def step(self, sequences: int, start: int, count: int) -> float:
        """`sequences` of them compute `count` tokens each, from position `start` on."""
        key = sequences, start, count
        if key not in self.known:
            taken = sum(self._turn(turn, *key) for turn in self.turns) + self._passing(sequences, count)
            nodes = min(self.machine.nodes.count, len(self.turns))  # workers of a node share a disk
            self.known[key] = max(taken, self._reading(sum(turn.read_bytes for turn in self.turns)) / nodes)
        return self.known[key]

    def _turn(self, turn: Turn, sequences: int, start: int, count: int) -> float:
        serving = turn.plan.serving
        assert serving is not None
        each = -(-(start + count) // serving.page_tokens)
        spans = [Span(range(n * each, (n + 1) * each), start, count) for n in range(sequences)]
        meter = Meter(self.prices, self.machine)
        run_step(self.model, serving.layers, spans, serving.page_tokens, sequences, meter, turn.leg)
        # A plain copy reads a byte and writes one; a product only reads its weights.
        near = turn.near_bytes / (2 * self.machine.processor("host").copy)
        # While others compute, as much is read ahead as there is room for.
        ahead = turn.plan.arena_bytes if len(self.turns) > 1 else 0
        return max(meter.seconds, near, self._reading(turn.read_bytes - ahead))

    def _reading(self, nbytes: int) -> float:
        return nbytes / self.machine.link("disk", "host").bytes_per_second

    def _passing(self, sequences: int, count: int) -> float:
        """From each worker to the next, and what is to be continued from the last to the first."""
        config: Any = self.model.config
        state = config.get_text_config().hidden_size * next(self.model.parameters()).element_size()
        here = -(-len(self.turns) // self.machine.nodes.count)
        seconds = 0.0
        for rank in range(len(self.turns) if len(self.turns) > 1 else 0):
            tier = PEER if rank % here else REMOTE if len(self.turns) > here else PEER
            nbytes = state * sequences * (count if rank else 1)
            seconds += self.wire[tier].seconds(nbytes, nbytes)
        return seconds


def with_forecast(
    plan: Plan,
    model: nn.Module,
    machine: Machine,
    prices: Prices,
    turns: Sequence[Turn] = (),
    wire: Wire = NO_WIRE,
) -> Plan:
    """The plan with what it means for requests whose context is half full; of several workers, each with its turn."""
    assert plan.serving is not None and plan.predicted is not None
    serving = plan.serving
    forecast = Forecast(model, machine, prices, turns or [Turn.of(plan, model)], wire)
    tokens = serving.pages * serving.page_tokens
    requests = min(serving.seats, max(1, tokens // serving.context))
    half = max(1, serving.context // 2)
    together = min(serving.seats, max(1, tokens // (half + 1)))
    alone, many = forecast.step(1, half, 1), forecast.step(together, half, 1)
    chunk = min(serving.step_tokens, half)
    reading = forecast.step(1, 0, chunk)
    prices.keep()
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
    at_once: Callable[[KvLayer], bool] = has_tiles,
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
            layout = Layout(spans, page_tokens, torch.device("cpu"), at_once)
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
