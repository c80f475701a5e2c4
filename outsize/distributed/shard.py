"""A store whose blocks may be split over the workers: each has a share at home, and a lease gathers the whole.

What will be leased next may be gathered while compute goes on (`outsize.distributed.ahead`). It is near from then on, as if
it were leased already: so all that foresees leases, or plans for them, knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from outsize.distributed.ahead import Act, Ahead
from outsize.distributed.arrangement import PEER
from outsize.distributed.group import Group
from outsize.distributed.shares import Shares
from outsize.errors import RunError
from outsize.memory.block import Block
from outsize.memory.entry import Entry
from outsize.memory.foresight import Touch
from outsize.memory.null import NullTier
from outsize.memory.store import Lease, Store

ENDLESS = 1 << 60


@dataclass(frozen=True)
class Split:
    """The block that holds at home what this worker has of the whole at a stage of `shares`."""

    shard: str
    shares: Shares
    stage: int


class Gathered(Lease):
    """A whole block out of shares. It has no home: what is here when the lease ends is forgotten."""

    def release(self) -> None:
        self.drop()


class ShardedStore(Store):
    """As a store; all workers lease and change split blocks in the same order. Of such that come next they gather up to
    `ahead` bytes."""

    def __init__(self, group: Group, *given: Any, ahead: int = 0, **more: Any) -> None:
        super().__init__(*given, ledger=group.ledger, **more)
        self.tiers[PEER] = NullTier(PEER, ENDLESS)
        self._group = group
        self._splits: dict[str, Split] = {}
        self._wholes: dict[str, str] = {}  # by the name of what is at home
        self._ahead = Ahead(ahead, lambda name: self.entries[name].block.nbytes)
        self._coming: dict[str, Callable[[], None]] = {}  # begun and not leased yet: what waits until it is there

    def split(self, whole: Block, shard: Block, shares: Shares, stage: int, home: str) -> None:
        """Create `whole`, of which this worker has `shard`, its elements at `stage`, at `home`. Both have a single part.
        Raises as `create`."""
        self.create(shard, home)
        self.create(whole, PEER, durable=False)
        self._splits[whole.name] = Split(shard.name, shares, stage)
        self._wholes[shard.name] = whole.name

    def lease(self, name: str, fresh: bool = False) -> Lease:
        if name not in self._splits:
            return super().lease(name, fresh)
        self._forget(self._ahead.see(Act.LEASE, name))
        wait = self._coming.pop(name, None)
        if wait is None:
            self._group.gather(*self._set_out(name))
        else:
            wait()
        while (following := self._ahead.next()) is not None:
            self._coming[following] = self._group.begin_gather(*self._set_out(following))
        return Gathered(self, self.entries[name])

    def _set_out(self, name: str) -> tuple[torch.Tensor, Shares, int]:
        """Give a whole block its place near, with what this worker has of it. Returns what the others' parts go into."""
        split = self._splits[name]
        elements = _elements(super().lease(name, fresh=True))
        with super().lease(split.shard) as own:
            kept = split.shares.at(split.stage)
            elements[kept.start : kept.stop].copy_(_elements(own))
        return elements, split.shares, split.stage

    def _forget(self, names: list[str]) -> None:
        """What was gathered in vain: all workers have begun it, so that it comes; but for one that did not set out."""
        for name in names:
            wait = self._coming.pop(name, None)
            if wait is None:
                self._ahead.ended(name)
            else:
                wait()
                Gathered(self, self.entries[name]).drop()

    def _change(self, entry: Entry) -> None:
        whole = self._wholes.get(entry.block.name)
        if whole is not None:
            self._forget(self._ahead.see(Act.CHANGE, whole))
        super()._change(entry)

    def _give(self, entry: Entry, touch: Touch) -> None:
        if entry.block.name in self._splits:
            self._ahead.ended(entry.block.name)
        super()._give(entry, touch)

    @contextmanager
    def phase(self, name: str, again: bool = False) -> Iterator[None]:
        with super().phase(name, again):
            self._forget(self._ahead.enter(name))
            try:
                yield
            except Exception:
                with suppress(RunError):  # others are lost: what failed first is what to tell
                    self._forget(self._ahead.leave(well=False))
                raise
            self._forget(self._ahead.leave())


def _elements(lease: Lease) -> torch.Tensor:
    (tensor,) = lease.tensors.values()
    return tensor.view(-1)
