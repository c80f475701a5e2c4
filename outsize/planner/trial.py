"""A module run once on fake tensors, forward only, as it is: nothing streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from outsize.model.activations import ATTENTION
from outsize.model.units import Unit
from outsize.planner.fakes import Fakes, bare_copy, fake_copy
from outsize.planner.live import LiveBytes
from outsize.planner.prices import Prices, is_view
from outsize.planner.rehearsal import Batch, Priced, same_shape, shortened
from outsize.planner.script import Live


@contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of the module without bytes; within it every new tensor is without bytes too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = fake_copy(model, mode)
    with mode, torch.no_grad():
        yield fake


def note_calls(model: nn.Module, called: set[str]) -> None:
    """From here on the names of modules that are called go to `called`."""
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(_note, called, name))


def _note(called: set[str], name: str, module: nn.Module, args: Any) -> None:
    called.add(name)


def calls_of(model: nn.Module, batch: Batch) -> set[str]:
    """Names of the modules that a forward pass calls, told on fake tensors; of none, where that goes by numbers."""
    called = set[str]()
    try:
        with on_fake_tensors(model) as fake, torch.random.fork_rng(devices=[]):
            note_calls(fake, called)
            fake(**batch)
    except (ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return set()
    return called


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


@dataclass(frozen=True)
class Made:
    """Bytes, and the seconds in which they were made."""

    nbytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Left:
    """What forward makes in all repeated units and leaves for backward, where it is kept: at least so many bytes. To make it
    again takes at least so many seconds. `attention`: what that leaves of it, its results alone."""

    all: Made = Made()
    attention: Made = Made()


def left_behind(model: nn.Module, units: Sequence[Unit], batch: Batch, prices: Prices, dtype: torch.dtype) -> Left:
    """Told by four units, which stand for all, with trained weights of `dtype`; nothing where they cannot."""
    names = [unit.name for unit in units if unit.repeated]
    if len(names) < 4 or not same_shape(model, names):
        return Left()
    mode = Fakes(allow_non_fake_inputs=True)
    try:
        fake = fake_copy(_of(shortened(model, names[4:]), dtype), mode)
        saved = _Saved()
        for unit in map(fake.get_submodule, names[:4]):
            unit.register_forward_pre_hook(saved.enter, with_kwargs=True)
            unit.register_forward_hook(saved.leave)
        timed = _Timed(prices, saved)
        with torch.random.fork_rng(devices=[]), mode, timed, saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            fake(**batch)
    except (ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return Left()  # it counts on all of its units, or on numbers
    attention = Made(saved.attention.nbytes * len(names) // 4, saved.attention.seconds * len(names) / 4)
    return Left(Made(saved.nbytes(fake) * len(names) // 4, saved.seconds * len(names) / 4), attention)


def _of(bare: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in bare.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return bare


class _Timed(Priced):
    """Tells what operations within units cost, but for views: where activations are kept, to bring weights back takes views,
    too."""

    def __init__(self, prices: Prices, saved: _Saved) -> None:
        super().__init__(prices, saved.spent)
        self._saved = saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_view(func) or not self._saved.inside:
            return func(*args, **(kwargs or {}))
        before = self._saved.since
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket in ATTENTION:
            self._saved.attend(result, self._saved.since - before)
        return result


class _Saved:
    """What autograd keeps within units of what they make: neither weights nor what is given to several of them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """From the beginning of each unit to the last that is kept of it: no further is it computed again."""
        self.since = 0.0
        self.attention = Made()
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._given: dict[int, torch.UntypedStorage] = {}
        self._made: dict[int, torch.UntypedStorage] = {}
        self.inside = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _storages((args, kwargs))
        self._given |= {key: storage for key, storage in given.items() if key not in self._made}
        self.inside, self.since = True, 0.0

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._made |= _storages(output)
        self.inside = False

    def spent(self, lane: str, seconds: float, floating_operations: float, beside: float) -> None:
        self.since += seconds

    def attend(self, result: Any, seconds: float) -> None:
        """Attention has been computed."""
        made = sum(storage.nbytes() for storage in _storages(result).values())
        self.attention = Made(self.attention.nbytes + made, self.attention.seconds + seconds)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.inside:
            self._kept |= _storages(tensor)
            self.seconds, self.since = self.seconds + self.since, 0.0
        return tensor

    def nbytes(self, model: nn.Module) -> int:
        others = self._given | _storages([*model.parameters(), *model.buffers()])
        return sum(storage.nbytes() for key, storage in self._kept.items() if key not in others)


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    """Held, so that no other gets the address of one."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
