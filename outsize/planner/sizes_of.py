"""What a model's weights and optimizer state occupy, block by block, without any of them existing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from outsize.memory.null import NullTier
from outsize.memory.store import Store
from outsize.memory.transfer import Transfers
from outsize.model.weights import Weight, create_blocks, make_weight
from outsize.train.optimizers import OptimizerRule
from outsize.train.precision import find_precision
from outsize.train.update import Updater


@dataclass(frozen=True)
class WeightSize:
    """Bytes of one weight's blocks, of its optimizer state by kind, and of the largest single block of each."""

    weight: Weight
    bytes: int
    largest_block: int
    state_kinds: dict[str, int]
    largest_state: int
    largest_gradient: int

    @property
    def state_bytes(self) -> int:
        return sum(self.state_kinds.values())


def sizes_of(
    model: nn.Module, rule: OptimizerRule, precision: str, moments: str, table_rows: dict[str, int]
) -> dict[str, WeightSize]:
    """Sizes by weight, from the very blocks that a run would create, on tiers that hold nothing.

    Raises OptionError when the optimizer refuses a weight."""
    endless = 1 << 60
    transfers = Transfers(readers=0)
    store = Store(
        {"host": NullTier("host", endless), "disk": NullTier("disk", endless)},
        0,
        lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, device="meta"),
        transfers,
    )
    kind = find_precision(precision)
    updater = Updater(store, kind, rule, torch.bfloat16 if moments == "bf16" else None)
    found = {}
    for name, parameter in model.named_parameters():
        dtype = kind.compute if parameter.requires_grad else parameter.dtype
        weight = make_weight(name, parameter, dtype, "disk", table_rows.get(name))
        create_blocks(store, weight)
        if weight.trainable:
            updater.add(weight, "disk")
        found[name] = _size(store, updater, weight)
    transfers.close()
    return found


def _size(store: Store, updater: Updater, weight: Weight) -> WeightSize:
    blocks = [store.entries[block.name].block.nbytes for block in weight.blocks]
    chunks = [chunk.state for block in weight.blocks for chunk in updater.chunks.get(block.name, [])]
    states = [store.entries[name].block for name in chunks if name in store.entries]
    kinds = sum((Counter(block.bytes_by_kind) for block in states), Counter())
    gradient = max(torch.Size(weight.block_shape(block)).numel() * 4 for block in weight.blocks)
    largest_state = max((block.nbytes for block in states), default=0)
    return WeightSize(weight, sum(blocks), max(blocks), dict(kinds), largest_state, gradient)
