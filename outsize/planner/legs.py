"""Which units of a model each of several workers has when they serve it together.

The way through the model is learnt from a run on fake tensors, in which every tensor that comes from weights asks for a
gradient: whatever a unit is given of such besides its hidden states would not be there on another worker."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from outsize.distributed.measure import leveled
from outsize.errors import ModelError, OptionError
from outsize.model.route import Route, hidden_of
from outsize.model.units import Unit, find_units
from outsize.planner.trial import measurable, on_fake_tensors
from outsize.serve.attention import Discovery

NEARLY = 1.05  # times as much room, and yet taken for as much


@dataclass
class _Calls:
    """What a trial run has seen: units as they were called, with what they were given and gave."""

    attention: Discovery
    names: list[str] = field(default_factory=list)
    given: dict[str, torch.Tensor] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    layers: Counter[str] = field(default_factory=Counter)
    foreign: set[str] = field(default_factory=set)

    def enter(self, name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.names.append(name)
        self.given[name] = hidden_of(given, named)
        self.layers[name] -= len(self.attention.layers)
        rest = [value for value in tree_leaves((given, named)) if value is not self.given[name]]
        if any(isinstance(value, torch.Tensor) and value.requires_grad for value in rest):
            self.foreign.add(name)

    def leave(self, name: str, module: nn.Module, given: Any, found: Any) -> None:
        self.found[name] = found
        self.layers[name] += len(self.attention.layers)


def find_route(model: nn.Module) -> Route:
    """How hidden states go through a model. Raises ModelError when it cannot be divided."""
    try:
        calls, repeated, head = _watched(model)
    except (KeyError, AttributeError, RuntimeError) as problem:
        raise _undivided(model, f"its parts are not called as those of others are ({problem})") from problem
    first, last = calls.names.index(repeated[0]), calls.names.index(repeated[-1])
    before, after = calls.names[:first], calls.names[last + 1 : -1]
    if sorted(calls.names) != sorted(set(calls.names)) or calls.names != [*before, *repeated, *after, head]:
        raise _undivided(model, "its units do not run once each, one after the other")
    for name in repeated:
        given, found = calls.given[name], calls.found[name]
        if name in calls.foreign:
            raise _undivided(model, f"{name} is given more than hidden states")
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (given.shape, given.dtype):
            raise _undivided(model, f"{name} does not give hidden states as it is given them")
    for one, other in zip(repeated, repeated[1:], strict=False):
        if calls.given[other] is not calls.found[one]:
            raise _undivided(model, f"between {one} and {other} something is computed")
    for name in (*before, *after):
        _check_absence(model, name, calls)
    if calls.given[head].dtype != calls.given[repeated[0]].dtype:
        raise _undivided(model, "its head is given another dtype than its layers")
    return Route(tuple(before), tuple(repeated), tuple(after), head, tuple(calls.layers[name] for name in repeated))


def _watched(model: nn.Module) -> tuple[_Calls, list[str], str]:
    """The calls of a trial run, the names of the repeated units, and of the head."""
    with on_fake_tensors(measurable(model)) as fake, torch.enable_grad(), ExitStack() as hooks:
        calls, units = _Calls(Discovery()), [unit for unit in find_units(fake) if not unit.encloses]
        head: Any = fake.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        modules = {unit.name: unit.module for unit in units} | {n: m for n, m in fake.named_modules() if m is head}
        for parameter in fake.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for name, module in modules.items():
            entering = module.register_forward_pre_hook(partial(calls.enter, name), with_kwargs=True)
            hooks.callback(entering.remove)
            hooks.callback(module.register_forward_hook(partial(calls.leave, name)).remove)
        ids = torch.zeros((1, 2), dtype=torch.long)
        fake(input_ids=ids, position_ids=ids, use_cache=False, paged=calls.attention)
    (name,) = (name for name, module in modules.items() if module is head)
    return calls, [unit.name for unit in units if unit.repeated], name


def _check_absence(model: nn.Module, name: str, calls: _Calls) -> None:
    """Where another worker has the unit, zeros of an embedding's shape, or what was given, must do in its place."""
    given, found = calls.given[name], calls.found[name]
    embeds = isinstance(model.get_submodule(name), nn.Embedding)
    if not embeds and (not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (given.shape, given.dtype)):
        raise _undivided(model, f"{name} gives another shape than it is given")


def _undivided(model: nn.Module, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} cannot be divided among workers by its layers: {why}. Give it to one, which streams what "
        "does not fit."
    )


def divide(route: Route, units: Sequence[Unit], rooms: Sequence[int]) -> tuple[int, ...]:
    """How many repeated units each worker has: in proportion to the bytes of `rooms` that are left to it beside what only the
    first and the last hold; one at least. Rooms that differ by little are taken for equal: a worker that is started again
    holds some pages more or less, and its keys and values are found by the units that it has.

    Raises OptionError when there are too few."""
    count, rooms = len(route.repeated), list(rooms)
    unit_bytes = {unit.name: sum(parameter.nbytes for _, parameter in unit.parameters) for unit in units}
    rooms[0] -= sum(_weights(units, (*route.before, route.head)).values())
    rooms[-1] -= sum(_weights(units, route.after).values())
    if count < len(rooms):
        raise OptionError(
            f"{count} layers cannot be divided among {len(rooms)} workers. Give --workers {count} or fewer."
        )
    level = leveled([max(room, 1) for room in rooms], NEARLY)
    ends = list(accumulate(unit_bytes[name] for name in route.repeated))
    shares = list(accumulate(level))
    cuts = [0]
    for number, share in enumerate(shares[:-1], 1):
        wanted = bisect_left(ends, ends[-1] * share / shares[-1] - unit_bytes[route.repeated[0]] / 2) + 1
        cuts.append(min(max(wanted, cuts[-1] + 1), count - (len(rooms) - number)))
    return tuple(_differences([*cuts, count]))


def _weights(units: Sequence[Unit], names: Sequence[str]) -> dict[str, int]:
    """Bytes of what these units have; a tied weight counts once."""
    return {name: p.nbytes for unit in units if unit.name in names for name, p in unit.parameters}


def _differences(numbers: Sequence[int]) -> Iterator[int]:
    return (stop - start for start, stop in zip(numbers, numbers[1:], strict=False))
