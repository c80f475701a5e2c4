"""A module run once on fake tensors, forward only, as it is: nothing streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.model.units import Unit
from outsize.planner.live import LiveBytes
from outsize.planner.rehearsal import Batch, fake_copy, shortened
from outsize.planner.script import Live


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the module without bytes; within it every new tensor is without bytes too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode, torch.no_grad():
        yield fake


class Watched(TorchDispatchMode):
    """Notes in `events` the storages that operations create and let go; those of `held` are somebody else's."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[Live] = []
        self._live = LiveBytes(self.events.append)
        self._live.ignore(held)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live.see(result)
        return result


def kept_bytes(model: nn.Module, units: Sequence[Unit], batch: Batch) -> int:
    """What forward leaves in the repeated units for backward, where it is kept: at least so much. Four stand for all; 0 for
    a module that cannot do with four."""
    names = [unit.name for unit in units if unit.repeated]
    few = names[:4]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fake = fake_copy(shortened(model, names), mode)
        saved = _Saved(fake)
        for unit in map(fake.get_submodule, few):
            unit.register_forward_pre_hook(saved.enter)
            unit.register_forward_hook(saved.leave)
        with mode, saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            fake(**batch)
    except (ValueError, IndexError, KeyError, AttributeError):  # it counts on all of its units
        return 0
    return saved.nbytes * len(names) // max(len(few), 1)


class _Saved:
    """What autograd keeps within units, but for weights."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._inside = False

    def enter(self, *_: Any) -> None:
        self._inside = True

    def leave(self, *_: Any) -> None:
        self._inside = False

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if self._inside and storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())
