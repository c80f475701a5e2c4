"""An updater that leases what a real one leases, and whose arithmetic costs its price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from outsize.model.weights import RowBlock
from outsize.planner.prices import Prices
from outsize.planner.script import Spend, Stepped
from outsize.train.update import Chunk, Kind, Updater


def priced_updater(prices: Prices) -> type[Updater]:
    class PricedUpdater(Updater):
        def put(self, block: RowBlock, source: torch.Tensor, target: torch.Tensor) -> None:
            if self.precision.master == "split" and source.dtype is not torch.bfloat16:
                for chunk in self.chunks.get(block.name, []):
                    self.store.lease(chunk.state, fresh=True).release()

        def _step(
            self,
            chunk: Chunk,
            weight: torch.Tensor,
            gradient: torch.Tensor | None,
            state_of: Callable[[], dict[str, torch.Tensor]],
            groups: list[dict[str, Any]],
            scale: float | None,
            method: str,
            twin: torch.Tensor | None = None,
        ) -> None:
            chunk.stepped = True
            group = groups[self.kinds.index(chunk.kind)]
            like = (
                *(chunk.kind.cls, sorted(chunk.kind.options.items()), method, self.precision.name, self._moment_dtype),
                *(chunk.shape, weight.numel(), None if gradient is None else gradient.dtype, scale is None),
            )
            make = partial(_real_step, self, chunk, weight, gradient, state_of, group, scale, method)
            spent: Any = self.store
            elements = chunk.stop - chunk.start
            price = prices.update(elements, like, make)
            if self.store.near == "host" or gradient is None or not self._parts(chunk):
                spent.spent("update", price.seconds, beside=price.beside)
                return
            here, there = Spend("update", price.seconds, beside=price.beside), prices.host_update(elements)
            spent.tell(Stepped(chunk.state, chunk.block.home, here, there, gradient.nbytes, weight.nbytes))

    return PricedUpdater


def _real_step(
    updater: Updater,
    chunk: Chunk,
    weight: torch.Tensor,
    gradient: torch.Tensor | None,
    state_of: Callable[[], dict[str, torch.Tensor]],
    group: dict[str, Any],
    scale: float | None,
    method: str,
) -> Callable[[], None]:
    """The same step of real numbers, all zero, with an optimizer of its own."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    kind = Kind(chunk.kind.cls, chunk.kind.options)
    apart = Updater(updater.store, updater.precision, updater.rule)
    apart.kinds.append(kind)
    bare = replace(chunk, kind=kind, stepped=False, scalars={}, group={})
    near = {name: real(tensor) for name, tensor in state_of().items()}
    given = None if gradient is None else real(gradient)
    return partial(apart._step, bare, real(weight), given, lambda: near, [group], scale, method)
