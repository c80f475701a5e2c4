"""Engines over tiny models, assembled with any number of pages, and what transformers itself would answer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from models import Family, tiny_model

from outsize.memory.disk import DiskTier
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.transfer import Transfers
from outsize.model.attach import Attachment
from outsize.model.units import find_units
from outsize.plan import KvLayer, Plan, Serving
from outsize.planner.serving import discover, page_size
from outsize.serve.attention import use_paged_attention
from outsize.serve.engine import Engine
from outsize.serve.request import Event, Request, Sampling
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


@dataclass
class Bound:
    """A tiny model in a store, attached, and transformers' greedy answers to all prompts."""

    model: torch.nn.Module
    attachment: Attachment
    store: Store
    answers: list[list[int]]
    layers: tuple[KvLayer, ...]

    @contextmanager
    def engine(self, pages: int, seats: int, step_tokens: int, policy: str = "fcfs") -> Iterator[Engine]:
        serving = Serving(self.layers, pages, 16, page_size(self.layers), step_tokens, seats, 16 * pages)
        engine = Engine(self.model, self.attachment, self.store, serving, POLICIES[policy]())
        try:
            yield engine
            engine.check()
        finally:
            engine.fail(RuntimeError("the test is over"))
            engine.close()


@contextmanager
def bound(family: Family, streamed: bool = False) -> Iterator[Bound]:
    """`streamed`: no weight of a layer stays near."""
    whole = tiny_model(family, tied=False).eval()
    answers = [_answer(whole, prompt) for prompt in PROMPTS]
    weights = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    model = tiny_model(family, tied=False).eval()
    use_paged_attention(model)
    units, layers = find_units(model), discover(model)
    near = {n for u in units for n, _ in u.parameters if not u.repeated} if streamed else set(weights)
    with tempfile.TemporaryDirectory() as folder:
        tiers = {"host": HostTier(1 << 30), "disk": DiskTier(Path(folder) / "blocks")}
        store = Store(tiers, 1 << 20, allocate_slab, Transfers())
        plan = Plan("stored", 1 << 20, frozenset(near))
        attachment = bind_for_inference(
            model,
            units,
            plan,
            store,
            lambda n, a, b: weights[n][a:b] if weights[n].dim() else weights[n],
            _users(model),
        )
        yield Bound(model, attachment, store, answers, layers)
        attachment.detach()
        store.check()
        store.close()


def _users(model: torch.nn.Module):
    return lambda parameter: users_of(model, parameter)


def _answer(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=LONGEST, min_new_tokens=LONGEST, do_sample=False, eos_token_id=None
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
