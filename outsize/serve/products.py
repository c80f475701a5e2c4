"""Linear layers whose weights stay near, packed: the weight laid out as oneDNN's kernels read it, once, where a plain one
is laid out anew in every call. In bf16 the numbers are the same, bit for bit.

Layers that are called with the same input one after the other (queries, keys and values; gate and up) are one product."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from outsize.memory.ledger import Ledger


def can_pack(dtype: torch.dtype) -> bool:
    """This processor computes in `dtype` by oneDNN."""
    return dtype is torch.bfloat16 and torch.backends.mkldnn.is_available() and _computes_bf16()


def _computes_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Product:
    """One packed weight in place of those of `modules`, whose outputs lie side by side. `weight` [outputs, inputs]."""

    def __init__(self, modules: list[nn.Linear], weight: torch.Tensor, ledger: Ledger) -> None:
        self.modules, self._ledger = modules, ledger
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._product = torch.ops.mkldnn._linear_pointwise.default  # found once, not in every call
        ledger.adopt("host", "weight", self.nbytes)
        self._sizes = [module.out_features for module in modules]
        biases = [module.bias for module in modules if module.bias is not None]
        self._bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []
        for number, module in enumerate(modules):
            forward: Callable[..., Any] = self._multiply if len(modules) == 1 else functools.partial(self._part, number)
            module.forward = forward

    def _multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._product(hidden, self._packed, self._bias, "none", [], "")

    def _part(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """The first that is called with an input computes for all."""
        if hidden is not self._input:
            self._input, self._parts = hidden, list(torch.split_with_sizes(self._multiply(hidden), self._sizes, -1))
        part = self._parts[number]
        if number == len(self._sizes) - 1:
            self._input, self._parts = None, []
        return part

    @property
    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self._packed))

    def remove(self) -> None:
        """The modules multiply by their own weights again."""
        self._ledger.adopt("host", "weight", -self.nbytes)
        for module in self.modules:
            module.__dict__.pop("forward", None)


class LinearCalls:
    """Learns from a trial run which linear layers are called with one input, one after the other. With `beside` their
    outputs are given out as they are when they lie side by side: some module may refuse that."""

    def __init__(self, beside: bool = True) -> None:
        self._beside = beside
        self._calls: list[tuple[str, torch.Tensor]] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        handles = [
            module.register_forward_hook(functools.partial(self._hear, names[id(module.weight)]))
            for module in model.modules()
            if type(module) is nn.Linear
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, name: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        self._calls.append((name, args[0]))
        return torch.cat([output, output], dim=-1)[..., : output.shape[-1]] if self._beside else None

    def groups(self) -> list[tuple[str, ...]]:
        """Of names, in the order of the calls. Layers called more or less than once are not among them."""
        often = Counter(name for name, _ in self._calls)
        once = [(name, given) for name, given in self._calls if often[name] == 1]
        found: list[tuple[str, ...]] = []
        for number, (name, given) in enumerate(once):
            if self._beside and number and once[number - 1][1] is given:
                found[-1] += (name,)
            else:
                found.append((name,))
        return found
