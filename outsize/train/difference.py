"""What differs between two steps, of one run or of two: settings, parameters, the optimizer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, prod, sqrt
from typing import Any

import torch

from outsize.train.checkpoint import Checkpoint

WINDOW = 1 << 20  # elements compared at once


@dataclass(frozen=True)
class Difference:
    """Of one tensor: the norm of the first, the norm of the difference, and its largest element. `note` is not empty
    when the tensors cannot be subtracted. `what` is "weight" (the fp32 master, where there is one) or the optimizer's key."""

    name: str
    what: str
    norm: float
    distance: float
    largest: float
    note: str = ""

    @property
    def relative(self) -> float:
        """The difference's norm as a part of the first's."""
        return self.distance / self.norm if self.norm else (inf if self.distance else 0.0)


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings with different values, or that only one has (None for the other)."""
    names = [*one, *(name for name in other if name not in one)]
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}


def differences(one: Checkpoint, other: Checkpoint, optimizer: bool = False) -> Iterator[Difference]:
    """Every tensor that is not the same in both. Memory: some windows of a million elements."""
    for name in _either(one.weights, other.weights):
        tensors = [_tensors(checkpoint, name, optimizer) for checkpoint in (one, other)]
        for what in _either(*tensors):
            found = _compare(name, what, *(held.get(what) for held in tensors))
            if found is not None:
                yield found


def _either(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [*one, *(name for name in other if name not in one)]


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    rows: Callable[[int, int], torch.Tensor]


def _tensors(checkpoint: Checkpoint, name: str, optimizer: bool) -> dict[str, _Tensor]:
    """What is compared of a parameter."""
    found = {}
    if name in checkpoint.weights:
        found["weight"] = _Tensor(checkpoint.weights[name].shape, partial(checkpoint.read_master, name))
    if optimizer and name in checkpoint.optimizer:
        for key, entry in checkpoint.optimizer[name].tensors.items():
            found[key] = _Tensor(entry.shape, partial(checkpoint.read, entry))
    return found


def _compare(name: str, what: str, a: _Tensor | None, b: _Tensor | None) -> Difference | None:
    """None when both have the same numbers."""
    if a is None or b is None:
        return Difference(name, what, 0.0, inf, inf, f"only in the {'second' if a is None else 'first'}")
    if a.shape != b.shape:
        return Difference(name, what, 0.0, inf, inf, f"{list(a.shape)} and {list(b.shape)}")
    norm = distance = largest = 0.0
    same, rows = True, a.shape[0] if a.shape else 1
    step = max(1, WINDOW // max(1, prod(a.shape[1:])))
    for start in range(0, rows, step):
        first, second = (tensor.rows(start, min(start + step, rows)).double() for tensor in (a, b))
        apart = (first - second).abs()
        same = same and torch.equal(first, second)
        norm += float(first.square().sum())
        distance += float(apart.square().sum())
        largest = max(largest, float(apart.max())) if apart.numel() else largest
    return None if same else Difference(name, what, sqrt(norm), sqrt(distance), largest)
