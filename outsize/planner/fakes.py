"""A module and its tensors without bytes: what they would be is told by `FakeTensorMode`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

aten = torch.ops.aten
VIEWS = {
    *(aten.view.default, aten.view.dtype, aten.as_strided.default, aten.detach.default, aten.slice.Tensor),
    *(aten.t.default, aten.transpose.int, aten.permute.default, aten.expand.default, aten.unsqueeze.default),
}
"""Of one tensor each, whose shape no numbers in it decide."""


class Fakes(FakeTensorMode):
    """Fake tensors; but what is computed from real ones alone is real: token ids, and where in their sequence they are.
    Modules look at these: text that is one sequence needs no mask, and without one attention is another kernel."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in VIEWS and self._is_own(args[0]):
            with suppress(RuntimeError):  # what cannot be seen so, the mode refuses in its own way
                return self._view(func, args, kwargs or {})
        held = list(_tensors(args))
        if held and not any(isinstance(tensor, FakeTensor) for tensor in held):
            real = not _grows(held)
        else:
            real = not held and _counts(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if real else super().__torch_dispatch__(func, types, args, kwargs)

    def _is_own(self, tensor: torch.Tensor) -> bool:
        return type(tensor) is FakeTensor and tensor.fake_mode is self and tensor.constant is None

    def _view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> FakeTensor:
        """As the mode itself gives it, but for the long look for what a view of one tensor never has. Every second operation
        of a step is one."""
        with in_kernel_invocation_manager(self):
            seen = func(*args, **kwargs)
        return FakeTensor(self, seen, args[0].fake_device)


def _counts(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """It makes positions."""
    whole = all(isinstance(value, int) for value in args) and kwargs.get("dtype") in (None, torch.int64)
    return whole and getattr(function, "overloadpacket", None) is torch.ops.aten.arange


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _grows(held: list[torch.Tensor]) -> bool:
    """Each of some tokens beside each other: a mask, too large to be made for a plan."""
    sizes = [tensor.numel() for tensor in held]
    try:
        return len(held) > 1 and prod(torch.broadcast_shapes(*(tensor.shape for tensor in held))) > max(sizes)
    except RuntimeError:  # no operation of element beside element
        return False


def bare_copy(model: nn.Module) -> nn.Module:
    """The module again, parameters and buffers on the meta device, tied as they were."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, memo)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module again, without bytes: parameters fake and tied as they were, buffers fake."""
    twin = bare_copy(model)
    with mode:
        done: dict[int, Any] = {}
        for module in twin.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = done.setdefault(id(tensor), _fake(tensor))
    return twin


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
