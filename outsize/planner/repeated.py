"""Work that is done again and again on tensors of the same shapes: rehearsed once, then only written down."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from outsize.planner.live import LiveBytes
from outsize.planner.script import Event, Key, Live, Scribe, Spend


@dataclass(frozen=True)
class Done:
    """What was written: stretches of work, and the storages that came and went, or (`None`) came and was the result."""

    events: tuple[Spend | Live | None, ...]
    touched: int
    """Bytes, by which all else is longer ago."""
    result: tuple[torch.Size, torch.dtype] | None


class Repeated:
    """As `outsize.train.loss.Repeat`: `work` computes with a weight that is leased already, asks nothing of the store, and
    gives one tensor or none."""

    def __init__(self, scribe: Scribe, live: LiveBytes, mode: FakeTensorMode) -> None:
        self._scribe, self._live, self._mode = scribe, live, mode
        self._done: dict[Hashable, Done] = {}

    def __call__(self, key: Hashable, work: Callable[[], Any]) -> Any:
        if key in self._done:
            return self._again(self._done[key])
        before, self._scribe.events = self._scribe.events, []
        passed = self._live.passed
        result = work()
        written, self._scribe.events = self._scribe.events, before
        before += written
        self._done[key] = Done(_own(written), self._live.passed - passed, _look(result))
        return result

    def _again(self, done: Done) -> torch.Tensor | None:
        keys: dict[Key, Key] = {}
        result = None
        self._live.passed += done.touched
        for event in done.events:
            if event is None and done.result is not None:
                shape, dtype = done.result
                with _disable_current_modes(), self._mode:
                    result = torch.empty(shape, dtype=dtype)
                self._live.see(result)
            elif isinstance(event, Spend):
                self._scribe.spent(event.lane, event.seconds, event.floating_operations, event.beside)
            elif isinstance(event, Live):
                if event.key not in keys:
                    keys[event.key] = self._live.number()
                self._scribe.tell(Live(keys[event.key], event.nbytes))
        return result


def _look(result: torch.Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if result is None else (result.shape, result.dtype)


def _own(written: list[Event]) -> tuple[Spend | Live | None, ...]:
    """Without storages that came before; in place of one that stays, which is the result, None."""
    gone = {event.key for event in written if isinstance(event, Live) and event.nbytes < 0}
    came = {event.key for event in written if isinstance(event, Live) and event.nbytes > 0}
    found: list[Spend | Live | None] = []
    for event in written:
        if isinstance(event, Spend):
            found.append(event)
        elif isinstance(event, Live) and event.key in came:
            found.append(event if event.key in gone else None)
    return tuple(found)
