"""What a model's weights and optimizer state occupy, block by block, without any of them existing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from outsize.asked import Request
from outsize.distributed.arrangement import Arrangement
from outsize.distributed.group import Imagined
from outsize.distributed.shard import ShardedStore
from outsize.machine.caching import lasting
from outsize.memory.null import NullTier
from outsize.memory.store import Store
from outsize.memory.transfer import Transfers
from outsize.model.units import Unit
from outsize.model.weights import Weight, create_blocks, make_weight
from outsize.train.job import always_near
from outsize.train.optimizers import OptimizerRule, is_elementwise
from outsize.train.precision import find_precision
from outsize.train.update import Updater, find_kind, shares_for

SMALL = 1 << 16  # elements; so small a weight stays near with its state: reading it costs more than holding it


@dataclass(frozen=True)
class WeightSize:
    """Bytes of one weight's blocks and of its optimizer state by kind, and of the largest single block of its state and
    its gradient; of several workers, of the one that is planned for. `leased` is what a lease of the weight takes near
    compute, of which the weight itself is `whole`, `exchanged` what comes of its gradient from others at once."""

    weight: Weight
    bytes: int
    whole: int
    leased: int
    state_kinds: dict[str, int]
    largest_state: int
    largest_gradient: int
    exchanged: int
    weight_on_device: int
    state_on_device: int
    """What a device's allocator takes for the blocks, when they stay there."""
    elementwise: bool = False
    """Its optimizer takes each element by itself."""

    @property
    def state_bytes(self) -> int:
        return sum(self.state_kinds.values())


def split_weights(
    model: nn.Module, units: list[Unit], rule: OptimizerRule, request: Request, rows: dict[str, int]
) -> frozenset[str]:
    """What ZeRO 3 divides at home too. Small weights stay whole; so do tables, of which each worker needs other rows, and
    what one worker alone may update."""
    if request.sharers == 1 or request.zero < 3:
        return frozenset()
    whole = rows.keys() | always_near(units)
    divided = {
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() > SMALL and name not in whole and is_elementwise(rule(name, parameter)[0])
    }
    return frozenset(divided)


def sizes_of(
    model: nn.Module,
    rule: OptimizerRule,
    request: Request,
    table_rows: dict[str, int],
    split: Collection[str] = (),
    copies: int = 1,
) -> dict[str, WeightSize]:
    """Sizes by weight, from the very blocks that a run would create, on tiers that hold nothing.

    Raises OptionError when the optimizer refuses a weight."""
    endless = 1 << 60
    transfers = Transfers(readers=0)
    everyone = Imagined(Arrangement.of(request.rank, request.workers, request.nodes, request.close))
    group = everyone.row(request.sharers)
    store = ShardedStore(
        group,
        {"host": NullTier("host", endless), "disk": NullTier("disk", endless)},
        0,
        lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta"),
        transfers,
    )
    kind = find_precision(request.precision)
    updater = Updater(store, kind, rule, torch.bfloat16 if request.moments == "bf16" else None, group=group)
    found: dict[str, WeightSize] = {}
    # one of each shape stands for all: of large models there are many, of many blocks
    known: dict[Any, WeightSize] = {}
    summed = request.accumulate > 1 or ((request.hold or request.clip is not None) and request.zero == 1)
    for name, parameter in model.named_parameters():
        dtype = kind.compute if parameter.requires_grad else parameter.dtype
        shares = shares_for(rule, name, parameter, group, request.shares or ())
        stage = group.arrangement.stage_of(copies) if name in split else None
        weight = make_weight(name, parameter, dtype, "disk", table_rows.get(name), shares, stage)
        sent = 4 if summed or name in table_rows else dtype.itemsize
        looks = (
            weight.shape,
            dtype,
            sent,
            _stepped(updater, weight),
            tuple((b.shares, b.stage, b.start) for b in weight.blocks),
        )
        if looks not in known:
            create_blocks(store, weight)
            if weight.trainable:
                updater.add(weight, "disk")
            known[looks] = _size(store, updater, weight, group.arrangement, sent)
        alone = weight.trainable and is_elementwise(rule(name, parameter)[0])
        found[name] = replace(known[looks], weight=weight, elementwise=alone)
    transfers.close()
    return found


def _stepped(updater: Updater, weight: Weight) -> int | None:
    """By which kind of optimizer; None: by none."""
    return id(find_kind(updater.kinds, *updater.rule(weight.name, weight.parameter))) if weight.trainable else None


def _size(store: Store, updater: Updater, weight: Weight, arrangement: Arrangement, sent: int) -> WeightSize:
    """`sent`: bytes of an element of its gradient, as workers exchange it first; over further links sums go, in fp32."""
    blocks = [store.entries[block.home].block.nbytes for block in weight.blocks]
    wholes = [store.entries[block.name].block.nbytes for block in weight.blocks]
    leased = [store.entries[name].block.nbytes for block in weight.blocks for name in {block.name, block.home}]
    chunks = [chunk.state for block in weight.blocks for chunk in updater.chunks.get(block.name, [])]
    states = [store.entries[name].block for name in chunks if name in store.entries]
    kinds = sum((Counter(block.bytes_by_kind) for block in states), Counter())
    gradient = max(torch.Size(weight.block_shape(block)).numel() * 4 for block in weight.blocks)
    largest_state = max((block.nbytes for block in states), default=0)
    first = len(arrangement.levels) - 1
    exchanged = max(
        (
            (sent if stage == first else 4) * (circle - 1) * len(block.shares.at(stage))
            for block in weight.blocks
            for stage, (_, circle) in enumerate(reversed(arrangement.levels))
            if weight.trainable
        ),
        default=0,
    )
    on_device = (sum(map(lasting, blocks)), sum(lasting(block.nbytes) for block in states))
    return WeightSize(
        *(weight, sum(blocks), sum(wholes), sum(leased), dict(kinds), largest_state, gradient, exchanged), *on_device
    )
