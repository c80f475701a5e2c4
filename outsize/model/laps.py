"""The legs of one worker, of which one at a time runs: what it has of others steps aside meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn

from outsize.model.route import Absent, holder_of
from outsize.model.units import Unit


@dataclass(frozen=True)
class Lap:
    """A leg, for as long as micro-batches go through it. `entrance` and `exit`: the first and the last of its repeated units.
    `aside`: of each unit of the other legs the module that holds it, its name there, and what stands in for it."""

    entrance: nn.Module
    exit: nn.Module
    aside: tuple[tuple[nn.Module, str, Absent], ...]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it the module has the units of this leg alone."""
        units = [(holder, name, holder._modules[name]) for holder, name, _ in self.aside]
        try:
            for holder, name, absent in self.aside:
                holder._modules[name] = absent
            yield
        finally:
            for holder, name, unit in units:
                holder._modules[name] = unit


def laps_of(
    model: nn.Module, units: Sequence[Unit], lengths: Sequence[int], first: bool, last: bool, dtype: torch.dtype
) -> list[Lap]:
    """Of a worker whose legs have so many of the repeated `units` each, in order. All else that it has is the beginning of
    the model if it is the `first` one, and runs in its first lap; otherwise the end, which runs in the last. Who is first and
    `last` has both: embeddings run in the first lap alone, and what else there is runs for nothing in one of them."""
    repeated = [unit for unit in units if unit.repeated]
    if len(lengths) == 1:
        return [Lap(repeated[0].module, repeated[-1].module, ())]
    others = [unit for unit in units if not unit.repeated and not unit.encloses]
    if first and last:
        others = [unit for unit in others if isinstance(unit.module, nn.Embedding)]
    assert sum(lengths) == len(repeated), f"legs of {lengths} are not {len(repeated)} units"
    legs = [repeated[start:stop] for start, stop in pairwise([0, *accumulate(lengths)])]
    ends = [(leg[0].module, leg[-1].module) for leg in legs]
    legs[0 if first else -1] += others
    stands = {unit.name: (*holder_of(model, unit.name), Absent(unit.module, dtype)) for leg in legs for unit in leg}
    asides = (tuple(stands[unit.name] for other in legs if other is not own for unit in other) for own in legs)
    return [Lap(*own, aside) for own, aside in zip(ends, asides, strict=True)]
