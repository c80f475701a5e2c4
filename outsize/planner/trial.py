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
from torch.utils._pytree import tree_leaves

from outsize.model.units import Unit
from outsize.planner.live import LiveBytes
from outsize.planner.rehearsal import Batch, Fakes, bare_copy, fake_copy, same_shape, shortened
from outsize.planner.script import Live


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the module without bytes; within it every new tensor is without bytes too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode, torch.no_grad():
        yield fake


def measurable(model: Any) -> nn.Module:
    """What to run on fake tensors in the model's place: torch's fake product of experts knows bf16 only."""
    return bare_copy(model).to(torch.bfloat16) if model._can_set_experts_implementation() else model


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
    """What forward makes in the repeated units and leaves for backward, where it is kept: at least so much. Four stand for
    all; 0 where they cannot."""
    names = [unit.name for unit in units if unit.repeated]
    if len(names) < 4 or not same_shape(model, names):
        return 0
    mode = Fakes(allow_non_fake_inputs=True)
    try:
        fake = fake_copy(shortened(model, names[4:]), mode)
        saved = _Saved()
        for unit in map(fake.get_submodule, names[:4]):
            unit.register_forward_pre_hook(saved.enter, with_kwargs=True)
            unit.register_forward_hook(saved.leave)
        with mode, saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            fake(**batch)
    except (ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return 0  # it counts on all of its units, or on numbers
    return saved.nbytes(fake) * len(names) // 4


class _Saved:
    """What autograd keeps within units of what they make: neither weights nor what is given to several of them."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._given: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self._inside = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _storages((args, kwargs))
        self._given |= {key: storage for key, storage in given.items() if key not in self._made}
        self._inside = True

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._made |= _storages(output)
        self._inside = False

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._inside:
            self._kept |= _storages(tensor)
        return tensor

    def nbytes(self, model: nn.Module) -> int:
        others = self._given | _storages([*model.parameters(), *model.buffers()])
        return sum(storage.nbytes() for key, storage in self._kept.items() if key not in others)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Held, so that no other gets the address of one."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
