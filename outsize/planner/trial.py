"""A module run once on fake tensors, forward only, as it is: nothing streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.planner.rehearsal import LiveBytes, fake_copy
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
