"""The way of hidden states through a model, and how its units are divided among workers along it.

Each has a *leg*: a run of the repeated units, and what comes before them, after them, or at the model's head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

HIDDEN_STATES = "hidden_states"  # as transformers call what a unit works on


@dataclass(frozen=True)
class Route:
    """A model's units by name, in the order in which they run. `layers`: how many attend, in each of the `repeated` ones."""

    before: tuple[str, ...]
    repeated: tuple[str, ...]
    after: tuple[str, ...]
    head: str
    layers: tuple[int, ...]

    def leg(self, lengths: Sequence[int], worker: int) -> Leg:
        """Of a worker that serves, where each has so many of the repeated units, in order: the first has the head, too."""
        first = (*self.before, self.head) if worker == 0 else ()
        last = self.after if worker == len(lengths) - 1 else ()
        return self._leg(lengths, worker, first, last)

    def leg_to_train(self, lengths: Sequence[int], number: int, shared: Sequence[str]) -> Leg:
        """As `leg`, the one of that number, of a worker that trains: the last one has the head. What is `shared`
        (`shared_with_head`) the first and the last both have."""
        ends = number == len(lengths) - 1
        first = self.before if number == 0 else tuple(shared) if ends else ()
        last = (*self.after, self.head) if ends else (self.head,) if number == 0 and shared else ()
        return self._leg(lengths, number, first, last)

    def legs_to_train(self, lengths: Sequence[int], numbers: Iterable[int], shared: Sequence[str]) -> tuple[Leg, ...]:
        """Those of these numbers, of one worker: the first and the last share nothing if both are among them."""
        own = tuple(numbers)
        shared = () if {0, len(lengths) - 1} <= {*own} else shared
        return tuple(self.leg_to_train(lengths, number, shared) for number in own)

    def _leg(self, lengths: Sequence[int], worker: int, first: tuple[str, ...], last: tuple[str, ...]) -> Leg:
        start, stop = [0, *accumulate(lengths)][worker : worker + 2]
        before, within = sum(self.layers[:start]), sum(self.layers[start:stop])
        units = frozenset((*first, *self.repeated[start:stop], *last))
        return Leg(self, (start, stop), units, (before, before + within))


@dataclass(frozen=True)
class Leg:
    """`units` of one worker, by name; of the repeated ones it has those from `span[0]` to `span[1]`, which attend in
    `layers` [first, past the last)."""

    route: Route
    span: tuple[int, int]
    units: frozenset[str]
    layers: tuple[int, int]

    def __str__(self) -> str:
        """Its units, in the order in which they run."""
        route, (start, stop) = self.route, self.span
        run = list(route.repeated[start:stop])
        named = f"{run[0]} to {run[-1]}" if len(run) > 1 else run[0]
        return ", ".join([*self._of(route.before), named, *self._of((*route.after, route.head))])

    def _of(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.units]

    @property
    def others(self) -> list[str]:
        """Units of the route that this worker does not have."""
        route = self.route
        return [name for name in (*route.before, *route.repeated, *route.after, route.head) if name not in self.units]

    def has(self, unit: str) -> bool:
        """The worker runs this unit; what is not on the route everybody does."""
        return unit not in self.others


def hidden_of(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a unit is given to work on."""
    return given[0] if given else named[HIDDEN_STATES]


def with_hidden(hidden: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a unit is given, with other hidden states."""
    return ((hidden, *given[1:]), named) if given else (given, named | {HIDDEN_STATES: hidden})


def shared_with_head(model: nn.Module, route: Route) -> tuple[str, ...]:
    """Units before the repeated ones that have a weight of the head's: tied embeddings."""
    head = {id(parameter) for parameter in model.get_submodule(route.head).parameters()}
    return tuple(n for n in route.before if any(id(p) in head for p in model.get_submodule(n).parameters()))


class Absent(nn.Module):
    """In the place of a unit that another worker has: it gives back the hidden states that it is given; of an embedding,
    zeros of their shape, in `dtype` (None: that of its weight). What models ask their layers about themselves it knows."""

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        own = {"training", *self.__dict__}
        self.__dict__ |= {name: value for name, value in vars(module).items() if name not in own}
        self.__dict__.pop("forward", None)
        self._width: int | None = None
        if isinstance(module, nn.Embedding):
            self._width, self._dtype = module.embedding_dim, dtype or module.weight.dtype

    def forward(self, *given: Any, **named: Any) -> Any:
        if self._width is None:
            return hidden_of(given, named)
        return given[0].new_zeros((*given[0].shape, self._width), dtype=self._dtype)


def keep_legs(model: nn.Module, legs: Sequence[Leg], dtype: torch.dtype) -> None:
    """Leave of `model`, whose hidden states are of that dtype, what a worker that trains has: its parameters are those of
    its legs, under the names that they had."""
    for name in legs[0].others:
        if not any(leg.has(name) for leg in legs):
            holder, own = holder_of(model, name)
            holder._modules[own] = Absent(model.get_submodule(name), dtype)


def holder_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds that one, and its name there."""
    holder, _, own = name.rpartition(".")
    return model.get_submodule(holder), own
