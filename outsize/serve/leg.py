"""A model that several workers serve together, each with a *leg* of it: a run of its repeated units.

Each worker runs the unchanged module, in which units that others have give back what they are given. Where its leg begins
a worker takes hidden states from the one before, and where it ends it passes them on. The first worker has the embedding
and the head as well, so that one table is enough for both, and only hidden states travel; the last one has what comes
between its leg and the head (the last norm)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function

from outsize.distributed.relay import Relay
from outsize.model.route import Absent, Leg, hidden_of, with_hidden

Forward = Callable[..., Any]


class Cut:
    """`model` runs as this worker's leg of it until `remove`."""

    def __init__(self, model: nn.Module, leg: Leg, relay: Relay) -> None:
        self._changed: list[tuple[nn.Module, Any]] = []
        route, (start, stop) = leg.route, leg.span
        for name in leg.others:
            self._change(model, name, lambda module, forward: Absent(module).forward)
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


def _taking(relay: Relay, module: nn.Module, forward: Forward) -> Forward:
    def run(*given: Any, **named: Any) -> Any:
        given, named = with_hidden(take(hidden_of(given, named), relay), given, named)
        return forward(*given, **named)

    return run


def _passing(relay: Relay, module: nn.Module, forward: Forward) -> Forward:
    return lambda *given, **named: pass_on(forward(*given, **named), relay)


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
