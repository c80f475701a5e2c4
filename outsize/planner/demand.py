"""What a step needs besides weights and state, found by running the unchanged module on fake tensors.

Nothing is fitted: every storage that torch would allocate is counted while it lives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from outsize.memory.block import Block
from outsize.model.activations import Mover, run_unit
from outsize.model.units import find_units
from outsize.plan import NEAR, Activations, Plan


@dataclass(frozen=True)
class Demand:
    """Bytes of live tensors other than weights: the peak of one micro-batch's forward and backward, of which `kept` are
    still alive when forward ends (what each further lane adds)."""

    peak: int
    kept: int
    largest: int
    """Bytes of the largest single tensor among them."""
    moved: int = 0
    """Bytes that go to another tier and come back."""
    leased: int = 0
    """Bytes that leases of what was moved pin near compute, at most."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations create, for as long as they live."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._known = known  # storages that are somebody else's: weights and buffers
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0  # bytes that may be alive: what has died since the last look is still counted

    def now(self) -> int:
        self._live = {key: item for key, item in self._live.items() if not item[0].expired()}
        self._most = sum(nbytes for _, nbytes in self._live.values())
        return self._most

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._live:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.largest = max(self.largest, storage.nbytes())
                    self._most += storage.nbytes()
        if self._most > self.peak:
            self.peak = max(self.peak, self.now())
        return result


def measure_demand(
    model: nn.Module,
    dtype: torch.dtype,
    run: Callable[[nn.Module], torch.Tensor],
    activations: Activations,
    gradients: bool = True,
    block_class: str | None = None,
    moved_tensor_bytes: int = Plan.moved_tensor_bytes,
) -> Demand:
    """Run `run(model)`, which gives a loss or an output to start backward from, on fake tensors of `model`'s shapes.

    Weights are taken to be in `dtype`, `activations` to be what is done with those of each repeated unit, and each
    gradient to be taken away as soon as it exists. What waits in another tier, and the copy of it that is leased, is not
    part of the peak."""
    fake = _on_meta(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(fake, dtype)
        known = {t.untyped_storage()._cdata for t in (*fake.parameters(), *fake.buffers())}
        away = _Away()
        if gradients:
            mover = Mover(away, moved_tensor_bytes, known)  # pyright: ignore[reportArgumentType]
            for unit in find_units(fake, block_class):
                if unit.repeated:
                    unit.module.forward = _saving(activations, unit.module.forward, mover)
        for parameter in fake.parameters():
            if parameter.requires_grad and gradients:
                parameter.register_post_accumulate_grad_hook(_forget)
        live = LiveBytes(known | {away.near.untyped_storage()._cdata})
        with live, torch.set_grad_enabled(gradients):
            output = run(fake)
            kept, largest = live.now(), live.largest  # gradients of weights are larger, but few
            if gradients:
                output.backward(torch.ones_like(output))
    return Demand(live.peak, kept, largest, away.moved, away.peak)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without bytes: every parameter on the meta device, tied ones still tied, buffers as they are."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake tensors on the CPU in place of meta parameters and real buffers."""
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    done: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in done:
                    kind = dtype if parameter.requires_grad else parameter.dtype
                    bare = torch.empty(parameter.shape, dtype=kind, device="cpu")
                    done[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
                module._parameters[name] = done[id(parameter)]


def _saving(activations: Activations, forward: Callable[..., Any], mover: Mover) -> Callable[..., Any]:
    def pack(tensor: torch.Tensor) -> Any:
        return tensor if activations.home == NEAR else mover.pack(tensor, activations.home)

    def unpack(saved: Any) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else mover.unpack(saved)

    def run(*args: Any, **kwargs: Any) -> Any:
        return run_unit(activations, forward, lambda: None, pack, unpack, args, kwargs)

    return run


class _Away:
    """Stands in for the store: counts what is moved, and what is leased at once."""

    def __init__(self) -> None:
        self.near = torch.empty(1 << 40, dtype=torch.uint8)  # a fake tensor
        self.moved = self.leased = self.peak = 0
        self._sizes: dict[str, int] = {}

    def create(self, block: Block, home: str, durable: bool) -> None:
        self._sizes[block.name] = block.nbytes

    def lease(self, name: str, fresh: bool = False) -> _Leased:
        return _Leased(self, self._sizes[name])

    def alias(self, lease: _Leased) -> torch.Tensor:
        return lease.bytes


class _Leased:
    def __init__(self, away: _Away, nbytes: int) -> None:
        self.bytes, self._away, self._nbytes = away.near[:nbytes], away, nbytes
        away.leased += nbytes
        away.peak = max(away.peak, away.leased)

    def __enter__(self) -> _Leased:
        return self

    def __exit__(self, *exception: object) -> None:
        self._away.leased -= self._nbytes
        self._away.moved += self._nbytes

    def drop(self) -> None:
        self._away.leased -= self._nbytes


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None
