"""A model that several workers serve together, each with a *leg* of it: a run of its repeated units.

Each worker runs the unchanged module, in which units that others have give back what they are given. Where its leg begins
a worker takes hidden states from the one before, and where it ends it passes them on. The first worker has the embedding
and the head as well, so that one table is enough for both, and only hidden states travel; the last one has what comes
between its leg and the head (the last norm)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from outsize.distributed.relay import Relay

Forward = Callable[..., Any]
HIDDEN_STATES = "hidden_states"  # as transformers call what a unit works on


@dataclass(frozen=True)
class Route:
    """The way through a model: its units by name, in the order in which they run. `layers`: how many attend, in each of
    the `repeated` ones."""

    before: tuple[str, ...]
    repeated: tuple[str, ...]
    after: tuple[str, ...]
    head: str
    layers: tuple[int, ...]

    def leg(self, lengths: Sequence[int], worker: int) -> Leg:
        """Of this worker, where each has so many of the repeated units, in order."""
        start, stop = [0, *accumulate(lengths)][worker : worker + 2]
        first = (*self.before, self.head) if worker == 0 else ()
        last = self.after if worker == len(lengths) - 1 else ()
        before, within = sum(self.layers[:start]), sum(self.layers[start:stop])
        return Leg(
            self, (start, stop), frozenset((*first, *self.repeated[start:stop], *last)), (before, before + within)
        )


@dataclass(frozen=True)
class Leg:
    """`units` of one worker, by name; of the repeated ones it has those from `span[0]` to `span[1]`, which attend in
    `layers` [first, past the last)."""

    route: Route
    span: tuple[int, int]
    units: frozenset[str]
    layers: tuple[int, int]

    def has(self, unit: str) -> bool:
        """The worker runs this unit; what is not on the route everybody does."""
        route = self.route
        return unit in self.units or unit not in (*route.before, *route.repeated, *route.after, route.head)


class Cut:
    """`model` runs as this worker's leg of it until `remove`."""

    def __init__(self, model: nn.Module, leg: Leg, relay: Relay) -> None:
        self._changed: list[tuple[nn.Module, Any]] = []
        route, (start, stop) = leg.route, leg.span
        for name in (*route.before, *route.repeated, *route.after, route.head):
            if name not in leg.units:
                self._change(model, name, _absent)
        # On a worker of its own the head is the end of the last leg; the first worker's leg ends before, and goes on there.
        if start == 0:
            self._change(model, route.head, functools.partial(_taking, relay))
        else:
            self._change(model, route.repeated[start], functools.partial(_taking, relay))
        if stop < len(route.repeated):
            self._change(model, route.repeated[stop - 1], functools.partial(_passing, relay))
        else:
            self._change(model, route.head, functools.partial(_passing, relay))

    def _change(self, model: nn.Module, name: str, how: Callable[[nn.Module, Forward], Forward]) -> None:
        module = model.get_submodule(name)
        self._changed.append((module, module.__dict__.get("forward")))
        module.forward = how(module, module.forward)

    def remove(self) -> None:
        for module, before in reversed(self._changed):
            module.__dict__.pop("forward", None)
            if before is not None:
                module.forward = before
        self._changed.clear()


def _absent(module: nn.Module, forward: Forward) -> Forward:
    """Another worker has the unit."""
    if isinstance(module, nn.Embedding):
        width, dtype = module.embedding_dim, module.weight.dtype
        return lambda ids: ids.new_zeros((*ids.shape, width), dtype=dtype)
    return lambda *given, **named: hidden_of(given, named)


def _taking(relay: Relay, module: nn.Module, forward: Forward) -> Forward:
    def run(*given: Any, **named: Any) -> Any:
        hidden = take(hidden_of(given, named), relay)
        return forward(hidden, *given[1:], **named) if given else forward(**named | {HIDDEN_STATES: hidden})

    return run


def _passing(relay: Relay, module: nn.Module, forward: Forward) -> Forward:
    return lambda *given, **named: pass_on(forward(*given, **named), relay)


def hidden_of(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a unit is given to work on."""
    return given[0] if given else named[HIDDEN_STATES]


def take(hidden: torch.Tensor, relay: Relay) -> torch.Tensor:
    """In place of `hidden`, of which only the shape matters, what the worker before passes on."""
    if has_torch_function((hidden,)):  # a recorder is to see one call
        return handle_torch_function(take, (hidden,), hidden, relay)
    return relay.take(hidden)


def pass_on(hidden: torch.Tensor, relay: Relay) -> torch.Tensor:
    """`hidden` again."""
    if has_torch_function((hidden,)):
        return handle_torch_function(pass_on, (hidden,), hidden, relay)
    relay.pass_on(hidden)
    return hidden
