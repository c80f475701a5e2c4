"""Engines over tiny models, assembled with any number of pages, and what transformers itself would answer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import Family, tiny_model

from outsize.distributed.group import Group
from outsize.distributed.relay import Relay, Ring
from outsize.memory.disk import DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.tier import Tier
from outsize.memory.transfer import Transfers
from outsize.model.attach import Attachment
from outsize.model.route import Leg
from outsize.model.units import find_units, parts_of
from outsize.plan import KvLayer, Plan, Serving
from outsize.planner.legs import find_route
from outsize.planner.serving import discover, page_size
from outsize.serve.attention import use_paged_attention
from outsize.serve.engine import Engine
from outsize.serve.far_index import FarIndex
from outsize.serve.request import Event, Request, Sampling
from outsize.serve.runner import Runner
from outsize.serve.schedule import POLICIES
from outsize.serve.weights import bind_for_inference
from outsize.train.job import users_of

PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [3] * 40,
    list(range(10, 60)),
    [3] * 16,
    [*range(10, 42), 7],
    [*range(10, 42), 8, 9],
    [200],
    [(7 * n * n) % 250 + 3 for n in range(61)],
]
LONGEST = 24
MOVE, COMPUTE = (1.0, 0.0, 0.0), (0.0, 1.0, 1.0)  # seconds of a token: computed, read, written


@dataclass
class Bound:
    """A tiny model in a store, attached, and transformers' greedy answers to all prompts."""

    model: torch.nn.Module
    attachment: Attachment
    store: Store
    answers: list[list[int]]
    layers: tuple[KvLayer, ...]
    leg: Leg | None = None
    relay: Relay | None = None
    group: Group = field(default_factory=Group)

    @contextmanager
    def engine(
        self,
        pages: int,
        seats: int,
        step_tokens: int,
        policy: str = "fcfs",
        far_pages: int = 0,
        token_seconds: tuple[float, float, float] = MOVE,
        directory: Path | None = None,
    ) -> Iterator[Engine]:
        index = self.index(directory, far_pages)
        engine = Engine(self.runner(pages, seats, step_tokens, far_pages, token_seconds, index), POLICIES[policy]())
        try:
            yield engine
            engine.check()
        finally:
            engine.fail(RuntimeError("the test is over"))
            engine.close()
            if index is not None:
                self.store.tiers.pop("kv").close()

    def index(self, directory: Path | None, far_pages: int) -> FarIndex | None:
        """Of the places of a worker in its own directory."""
        if directory is None:
            return None
        index = FarIndex(directory, far_pages)
        index.keep_common(self.group.tell(index.keys))
        self.store.tiers["kv"] = DiskTier(index.pages)
        return index

    def runner(
        self,
        pages: int,
        seats: int,
        step_tokens: int,
        far_pages: int = 0,
        token_seconds: tuple[float, float, float] = MOVE,
        index: FarIndex | None = None,
    ) -> Runner:
        size = page_size(self.layers)
        serving = Serving(self.layers, pages, 16, size, step_tokens, seats, 16 * pages, far_pages, token_seconds)
        return Runner(self.model, self.attachment, self.store, serving, self.leg, self.relay, index)


@contextmanager
def bound(family: Family, streamed: bool = False) -> Iterator[Bound]:
    """`streamed`: no weight of a layer stays near, and one part of it after the other comes."""
    with bound_model(lambda: tiny_model(family, tied=False).eval(), streamed) as found:
        yield found


@contextmanager
def bound_model(
    make: Callable[[], torch.nn.Module],
    streamed: bool = False,
    prompts: list[list[int]] = PROMPTS,
    new: int = LONGEST,
    group: Group | None = None,
    lengths: tuple[int, ...] = (),
) -> Iterator[Bound]:
    """A model in a store, and the `new` tokens that transformers answers. `make` gives equal models each time. Of a `group`
    each worker has so many of the layers."""
    whole = make()
    answers = [_answer(whole, prompt, new) for prompt in prompts]
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    model = make()
    use_paged_attention(model)
    units, (layers, _, _), leg, relay = find_units(model), discover(model), None, None
    if group is not None and lengths:
        leg, relay = find_route(model).leg(lengths, group.rank), Ring(group)
        units, layers = [unit for unit in units if leg.has(unit.name)], layers[slice(*leg.layers)]
    near = {n for u in units for n, _ in u.parameters if not (streamed and u.repeated)}
    with tempfile.TemporaryDirectory() as folder:
        tiers: dict[str, Tier] = {"host": HostTier(8 << 30), "disk": DiskTier(Path(folder) / "blocks")}
        store = Store(tiers, 1 << 20, allocate_slab, Transfers(), ledger=group.ledger if group is not None else None)
        plan = Plan("stored", 1 << 20, frozenset(near), parts=parts_of(units, ()) if streamed else ())

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return weights[name][start:stop] if weights[name].dim() else weights[name]

        attachment = bind_for_inference(model, units, plan, store, read, _users(model))
        yield Bound(model, attachment, store, answers, layers, leg, relay, group or Group())
        attachment.detach()
        store.check()
        store.close()


def _users(model: torch.nn.Module):
    return lambda parameter: users_of(model, parameter)


def _answer(model: torch.nn.Module, prompt: list[int], new: int) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return found[0, len(prompt) :].tolist()


@dataclass
class Heard:
    """A request's listener that remembers."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        assert not self.finished(event.index), "nothing is said after the end"
        self.events.append(event)

    def tokens(self, index: int = 0) -> list[int]:
        return [event.chosen.token for event in self.events if event.index == index and event.chosen is not None]

    def finished(self, index: int = 0) -> str | None:
        return next((event.finish for event in self.events if event.index == index and event.finish), None)


def ask(engine: Engine, prompt: list[int], heard: Heard | None = None, **options) -> tuple[Request, Heard]:
    heard = heard or Heard()
    who = {name: options.pop(name) for name in ("key", "priority") if name in options}
    request = Request(tuple(prompt), Sampling(**options), heard, **who)
    engine.submit(request)
    return request, heard


def run(engine: Engine, limit: int = 5000) -> int:
    """Step until nothing is left to do; how many steps that took."""
    for steps in range(limit):
        if not engine.step():
            assert engine.idle, "there is work, but nobody gets on"
            return steps
    raise AssertionError(f"not finished after {limit} steps")
