"""A store whose blocks may be split over the workers: each has a share at home, and a lease gathers the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from outsize.distributed.arrangement import PEER
from outsize.distributed.group import Group
from outsize.distributed.shares import Shares
from outsize.memory.block import Block
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
    """As a store; all workers lease split blocks in the same order."""

    def __init__(self, group: Group, *given: Any, **more: Any) -> None:
        super().__init__(*given, ledger=group.ledger, **more)
        self.tiers[PEER] = NullTier(PEER, ENDLESS)
        self._group = group
        self._splits: dict[str, Split] = {}

    def split(self, whole: Block, shard: Block, shares: Shares, stage: int, home: str) -> None:
        """Create `whole`, of which this worker has `shard`, its elements at `stage`, at `home`. Both have a single part.
        Raises as `create`."""
        self.create(shard, home)
        self.create(whole, PEER, durable=False)
        self._splits[whole.name] = Split(shard.name, shares, stage)

    def lease(self, name: str, fresh: bool = False) -> Lease:
        split = self._splits.get(name)
        if split is None:
            return super().lease(name, fresh)
        whole = super().lease(name, fresh=True)
        elements = _elements(whole)
        with super().lease(split.shard) as own:
            kept = split.shares.at(split.stage)
            elements[kept.start : kept.stop].copy_(_elements(own))
        self._group.gather(elements, split.shares, split.stage)
        return Gathered(self, self.entries[name])


def _elements(lease: Lease) -> torch.Tensor:
    (tensor,) = lease.tensors.values()
    return tensor.view(-1)
