"""What operations cost besides where several micro-batches take turns, each in a thread of its own.

libgomp keeps helpers for each thread that computes. Where they are more than the processors, together, none of them may spin
until there is work, and whoever begins an operation wakes a sleeping one (docs/log.md, Memory)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from outsize.model.lanes import Lanes
from outsize.planner.prices import Price, Prices, is_view, operations_of

GRAIN = 1 << 15  # elements, of which torch computes more in several threads (ATen/TensorIterator.h)
TURNS, OPERATIONS = 12, 10  # of each lane, and done in each turn


@dataclass(frozen=True)
class LanePrices:
    """Prices where lanes take turns, in which an operation of several threads takes so many seconds more, `waking`."""

    prices: Prices
    waking: float

    def of(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Price:
        price = self.prices.of(function, args, kwargs, result)
        wakes = not is_view(function) and (operations_of(function) is not None or _largest(args, result) > GRAIN)
        return Price(price.seconds + self.waking, price.floating_operations) if wakes else price

    def update(self, elements: int, like: Any, make: Callable[[], Callable[[], None]]) -> float:
        return self.prices.update(elements, like, make)

    def keep(self) -> None:
        self.prices.keep()


def seconds_of_waking() -> float:
    """How much longer an operation takes in lanes than in one thread alone: at least, as the system now and then has both
    threads of an operation on one processor for a while."""
    numbers = torch.full((1 << 19,), 0.5, dtype=torch.bfloat16)
    alone, in_turns = [], []

    def turns(lanes: Lanes, into: list[float]) -> None:
        for _ in range(TURNS):
            started = perf_counter()
            for _ in range(OPERATIONS):
                torch.mul(numbers, numbers, out=numbers)
            into.append((perf_counter() - started) / OPERATIONS)
            lanes.pass_turn()

    lanes = Lanes()
    lanes.run([lambda: turns(lanes, alone)])
    lanes.run([lambda: turns(lanes, in_turns)] * 2)
    return max(min(in_turns) - min(alone), 0.0)


def _largest(*values: Any) -> int:
    return max((leaf.numel() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)), default=0)
