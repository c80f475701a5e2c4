"""Parameters as blocks of the store: one block each, or a run of rows each for a vocabulary's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from outsize.distributed.shard import ShardedStore
from outsize.distributed.shares import Shares, cut_shares
from outsize.memory.block import make_block
from outsize.memory.store import Store

WEIGHT = "weight"  # the one part of a weight's block


@dataclass(frozen=True)
class RowBlock:
    """Rows [start, stop) of a parameter, which a lease of block `name` brings near. A parameter in one block has all its
    rows here. Of its elements this worker updates its share. The block `home` has its bytes at home: `name` itself, or,
    of a weight that is split over the workers, a block with what this one has at `stage` of its shares."""

    name: str
    start: int
    stop: int
    shares: Shares
    home: str
    stage: int

    @property
    def split(self) -> bool:
        return self.home != self.name

    @property
    def kept(self) -> range:
        """Elements that `home` has."""
        return self.shares.at(self.stage)

    @property
    def own_at_home(self) -> slice:
        """Where this worker's share is in `home`."""
        return slice(self.shares.own.start - self.kept.start, self.shares.own.stop - self.kept.start)


@dataclass(eq=False)
class Weight:
    """A parameter that lives in the store. `dtype` is what compute sees; `shape` what the module declared."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype
    home: str
    blocks: tuple[RowBlock, ...]
    trainable: bool

    @property
    def whole(self) -> bool:
        return len(self.blocks) == 1

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def row_elements(self) -> int:
        return prod(self.shape[1:])

    def block_shape(self, block: RowBlock) -> tuple[int, ...]:
        return self.shape if self.whole else (block.stop - block.start, *self.shape[1:])


def make_weight(
    name: str,
    parameter: nn.Parameter,
    dtype: torch.dtype,
    home: str,
    rows_per_block: int | None = None,
    shares_of: Callable[[int], Shares] = cut_shares,
    stage: int | None = None,
) -> Weight:
    """Describe where a parameter will live. `rows_per_block` cuts its first dimension; None keeps it in one block.
    `shares_of` tells who of several workers updates which of so many elements, `stage` what of it each has at home: at that
    stage of its shares; None: all."""
    shape = tuple(parameter.shape)
    rows = shape[0] if shape else 1
    step = rows_per_block or rows
    starts = range(0, rows, step) if step < rows else range(1)

    def block(start: int) -> RowBlock:
        stop = min(start + step, rows)
        whole = f"{WEIGHT}:{name}" + (f":{start}" if step < rows else "")
        shares = shares_of((stop - start) * prod(shape[1:]))
        last = len(shares.stages) - 1
        kept = stage if stage is not None and shares.divided else last
        return RowBlock(whole, start, stop, shares, whole if kept == last else f"{whole}@{shares.at(kept).start}", kept)

    return Weight(name, parameter, shape, dtype, home, tuple(map(block, starts)), parameter.requires_grad)


def create_blocks(store: Store, weight: Weight, durable: bool = True) -> None:
    """Reserve the store's blocks; `durable` ones can be committed."""
    for block in weight.blocks:
        whole = make_block(block.name, [(WEIGHT, "weight", weight.dtype, weight.block_shape(block))])
        if block.split:
            assert isinstance(store, ShardedStore)
            shard = make_block(block.home, [(WEIGHT, "weight", weight.dtype, (len(block.kept),))])
            store.split(whole, shard, block.shares, block.stage, weight.home)
        else:
            store.create(whole, weight.home, durable)


def fill_blocks(store: Store, weight: Weight, read: Callable[[int, int], torch.Tensor], put: Put) -> None:
    """Bring a parameter from its source into the store, block by block: memory held is one block and its source rows.

    `read(start, stop)` gives source rows, `put(block, source, target)` writes the compute copy of what is at home."""
    for block in weight.blocks:
        source = read(block.start, block.stop).reshape(-1)
        if block.split:
            source = source[block.kept.start : block.kept.stop]
        with store.lease(block.home, fresh=True) as lease:
            put(block, source, lease.tensors[WEIGHT].view(-1))


def leave_meta(model: nn.Module, device: torch.device) -> None:
    """Replace parameters on the meta device by placeholders on `device`, tied ones by one: a parameter cannot change its
    kind of device, and autograd asks it for its true shape."""
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in replaced:
                    bare = _unusable(tuple(parameter.shape), parameter.dtype, device)
                    replaced[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]


def bring_buffers(model: nn.Module, device: torch.device) -> None:
    """A module computes where its buffers are, too."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


Put = Callable[[RowBlock, torch.Tensor, torch.Tensor], None]


def plain_put(block: RowBlock, source: torch.Tensor, target: torch.Tensor) -> None:
    """The compute copy is the source rounded to the block's dtype as torch does."""
    target.copy_(source)


def placeholder(weight: Weight, device: torch.device) -> torch.Tensor:
    """A tensor of the true shape that occupies one element. It is NaN, so that using it unleased cannot go unseen; of
    integers the least, which no weight is."""
    return _unusable(weight.shape, weight.dtype, device)


def _unusable(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
