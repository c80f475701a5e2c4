"""The optimizer, streamed: each weight's master and state come near in chunks, are stepped, and go home again.

Any `torch.optim.Optimizer` class works. One whose arithmetic is elementwise is stepped in chunks of a block; any other
sees its whole parameter. Either way a chunk has state and step counters of its own, so that the class cannot tell that
its parameters pass through one by one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch.optim import Optimizer

from outsize.distributed.group import Group
from outsize.distributed.shares import Shares
from outsize.memory.block import make_block
from outsize.memory.codec import join_master, split_master, stochastic_round
from outsize.memory.store import Lease, Store
from outsize.model.attach import place_of
from outsize.model.weights import WEIGHT, RowBlock, Weight
from outsize.plan import Plan
from outsize.train.host_side import HostSide
from outsize.train.optimizers import OptimizerRule, StateLayout, is_elementwise, state_layout
from outsize.train.precision import Precision
from outsize.train.scalars import again, plain, revived

CHUNK = 1 << 22  # elements stepped at once; each transfer of their state costs its threads a fifth of a millisecond
PIECE = 1 << 20  # elements joined, stepped and split before the next ones: as many as the caches hold


@dataclass
class Kind:
    """One optimizer class with one set of options: an instance that steps every chunk of its weights in turn."""

    cls: type[Optimizer]
    options: dict[str, Any]
    optimizer: Optimizer = field(init=False)
    initial_group: dict[str, Any] = field(init=False)
    layouts: dict[tuple[int, ...], StateLayout] = field(default_factory=dict)
    weights: list[Weight] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = self.cls([torch.nn.Parameter(torch.zeros(1, 1))], **self.options)
        train = getattr(self.optimizer, "train", None)  # schedulefree steps in training mode only
        if train is not None:
            train()
        self.initial_group = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}

    def layout(self, shape: tuple[int, ...]) -> StateLayout:
        if shape not in self.layouts:
            self.layouts[shape] = state_layout(self.cls, self.options, shape, torch.float32)
        return self.layouts[shape]

    def evolving(self, layout: StateLayout) -> set[str]:
        """Entries of the parameter group that steps change, and that therefore belong to each chunk."""
        return {*layout.group, *({"train_mode"} & self.initial_group.keys())}


def shares_for(
    rule: OptimizerRule, name: str, parameter: torch.Tensor, group: Group, parts: tuple[int, ...] = ()
) -> Callable[[int], Shares]:
    """Who updates what of a parameter's blocks, in proportion to the workers' `parts`: shares of each, or all of a block
    where the optimizer must see that."""
    divided = not parameter.requires_grad or is_elementwise(rule(name, parameter)[0])
    return partial(group.shares if divided else group.undivided, parts=parts)


def stage_at_home(plan: Plan, name: str, group: Group) -> int | None:
    """At which stage of its shares a worker has a weight at home; None: it has all of it.

    Raises OptionError when the workers cannot have as many copies of it as the plan says."""
    return group.arrangement.stage_of(plan.weight_copies) if name in plan.split_weights else None


def find_kind(kinds: list[Kind], cls: type[Optimizer], options: dict[str, Any]) -> Kind:
    """The one among `kinds`; made and added when there is none."""
    for kind in kinds:
        if kind.cls is cls and kind.options == options:
            return kind
    kinds.append(Kind(cls, options))
    return kinds[-1]


@dataclass
class Chunk:
    """Elements [start, stop) of a weight's block, within this worker's share, and what its optimizer remembers besides
    tensors."""

    block: RowBlock
    state: str
    start: int
    stop: int
    shape: tuple[int, ...]
    kind: Kind
    layout: StateLayout
    on_host: bool = False
    """Its state stays in a device's host's memory, and is stepped there."""
    stepped: bool = False
    scalars: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)


class Updater:
    """Steps weights held in `store`, of each the own share among the workers of `group`. `moment_dtype` bf16 rounds the
    optimizer's tensors between steps (approximate)."""

    def __init__(
        self,
        store: Store,
        precision: Precision,
        rule: OptimizerRule,
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
        group: Group | None = None,
    ) -> None:
        self.store, self.precision, self.rule, self.seed = store, precision, rule, seed
        self.kinds: list[Kind] = []
        self.chunks: dict[str, list[Chunk]] = {}
        self.group = group or Group()
        self.step_number = 0
        self.seconds = 0.0  # spent in `update`, not counting waits for state
        self._moment_dtype = moment_dtype
        self._host = HostSide(store)
        self._scratch: dict[tuple[str, torch.device], torch.Tensor] = {}

    # -- what there is --------------------------------------------------------------------------------------------

    def add(self, weight: Weight, home: str, on_host: bool = False) -> None:
        """Reserve the state of a trainable weight, to be stepped `on_host` if it lives in a device's host's memory. Raises
        OptionError when the optimizer refuses its shape."""
        kind = find_kind(self.kinds, *self.rule(weight.name, weight.parameter))
        kind.weights.append(weight)
        for block in weight.blocks:
            shape = weight.block_shape(block)
            self.chunks[block.name] = list(self._cut(block, shape, kind))
            for chunk in self.chunks[block.name]:
                parts = self._parts(chunk)
                if parts:
                    chunk.on_host = on_host
                    self.store.create(make_block(chunk.state, parts), home, stays=on_host)

    def _cut(self, block: RowBlock, shape: tuple[int, ...], kind: Kind) -> Iterator[Chunk]:
        name, own = block.name.replace(WEIGHT, "state", 1), block.shares.own
        if not is_elementwise(kind.cls):
            if block.shares.all_own:
                yield Chunk(block, name, 0, prod(shape), shape, kind, kind.layout(shape))
            return
        for start in range(own.start, own.stop, CHUNK):
            stop = min(start + CHUNK, own.stop)
            yield Chunk(block, f"{name}@{start}", start, stop, (stop - start,), kind, kind.layout((stop - start,)))

    def _parts(self, chunk: Chunk) -> list[tuple[str, str, torch.dtype, tuple[int, ...]]]:
        parts = []
        if self.precision.master == "split":
            parts.append(("low", "master", torch.int16, (chunk.stop - chunk.start,)))
        for name, shape, dtype in chunk.layout.tensors:
            rounded = self._moment_dtype if dtype is torch.float32 else None
            parts.append((f"state.{name}", "moment", rounded or dtype, shape))
        return parts

    # -- bringing weights in ----------------------------------------------------------------------------------------

    def put(self, block: RowBlock, source: torch.Tensor, target: torch.Tensor) -> None:
        """Store source numbers (any float dtype, 1-D, on the host) as the compute weight `target` and, if split, their low
        bits; both are those of `block.home`."""
        if self.precision.master != "split" or block.name not in self.chunks:
            target.copy_(source)
            return
        own, first = block.shares.own, block.kept.start
        for others in (target[: own.start - first], target[own.stop - first :]):
            if others.numel():
                start = others.storage_offset() - target.storage_offset()
                self._put_high(source[start : start + others.numel()], others)
        for chunk in self.chunks[block.name]:
            low = torch.empty(chunk.stop - chunk.start, dtype=torch.int16, device=target.device)
            span = slice(chunk.start - first, chunk.stop - first)
            master = torch.empty(chunk.stop - chunk.start, device=target.device).copy_(source[span])
            split_master(master, target[span], low)
            if source.dtype is not torch.bfloat16:
                with self.store.lease(chunk.state, fresh=True) as lease:
                    lease.bytes.zero_()
                    lease.tensors["low"].copy_(low)

    def _put_high(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Of another worker's share, only the compute weight."""
        for start in range(0, source.numel(), CHUNK):
            piece = source[start : start + CHUNK]
            split_master(piece.to(target.device, torch.float32, copy=True), target[start : start + CHUNK], None)

    def masters(self, block: RowBlock, weight: torch.Tensor) -> torch.Tensor:
        """The block's numbers in fp32 (1-D), joined from `weight` (its compute copy, 1-D) and the state's low bits."""
        if self.precision.master != "split" or block.name not in self.chunks:
            return weight.float()
        assert block.shares.all_own, f"low bits of {block.name} are with several workers"
        out = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
        for chunk in self.chunks[block.name]:
            span = slice(chunk.start, chunk.stop)
            with self.store.lease(chunk.state) as lease:
                low = lease.tensors["low"].to(weight.device)
                join_master(weight[span], low, out[span], torch.empty_like(out[span]))
        return out

    # -- stepping ---------------------------------------------------------------------------------------------------

    def update(
        self, block: RowBlock, gradient: torch.Tensor, weight: Lease, groups: list[dict[str, Any]], scale: float | None
    ) -> None:
        """Apply `gradient` (1-D, of the own share, any float dtype, times `scale`) to the share's state and to `weight`, a
        lease of `block.home`. What of it others have updated comes from them.

        `groups` are the hyper-parameters of each kind now."""
        waited, started = sum(self.store.waiting_seconds.values()), self.store.clock.now()
        chunks = self.chunks[block.name]
        both = None
        if self.group.size == 1 and any(chunk.on_host for chunk in chunks):
            both = weight.change_both()
        else:  # what others have updated comes near alone, and goes home from there
            weight.change()
        elements = weight.tensors[WEIGHT].view(-1)
        own = elements[block.own_at_home]
        for chunk in chunks:
            span = slice(chunk.start - block.shares.own.start, chunk.stop - block.shares.own.start)
            twin = None if both is None else both[WEIGHT].view(-1)[span]
            self._visit(chunk, own[span], gradient[span], groups, scale, "step", twin)
        waited = sum(self.store.waiting_seconds.values()) - waited
        self.seconds += self.store.clock.note("update", started) - waited
        self.group.gather(elements, block.shares, last=block.stage)

    def visit_all(self, method: str, groups: list[dict[str, Any]]) -> None:
        """Call the optimizer's own `method` ("train" or "eval", as schedulefree has them) on every chunk."""
        for blocks in [
            weight.blocks for kind in self.kinds if hasattr(kind.optimizer, method) for weight in kind.weights
        ]:
            for block in blocks:
                with self.store.lease(block.home) as lease:
                    lease.change()
                    elements = lease.tensors[WEIGHT].view(-1)
                    for chunk in self.chunks[block.name]:
                        if chunk.stepped:
                            span = elements[chunk.start - block.kept.start : chunk.stop - block.kept.start]
                            self._visit(chunk, span, None, groups, None, method)
                    self.group.gather(elements, block.shares, last=block.stage)

    @property
    def by_pieces(self) -> bool:
        """Every optimizer steps elements one by one, and so sees no more than PIECE of them at once."""
        return all(is_elementwise(kind.cls) for kind in self.kinds)

    @property
    def has_modes(self) -> bool:
        """The optimizer keeps other numbers for training than for evaluation."""
        return any(hasattr(kind.optimizer, "eval") for kind in self.kinds)

    def _visit(
        self,
        chunk: Chunk,
        weight: torch.Tensor,
        gradient: torch.Tensor | None,
        groups: list[dict[str, Any]],
        scale: float | None,
        method: str,
        twin: torch.Tensor | None = None,
    ) -> None:
        if not self._parts(chunk):
            self._step(chunk, weight, gradient, dict, groups, scale, method)
            return
        with self.store.lease(chunk.state) as lease:
            lease.change()
            self._step(chunk, weight, gradient, lambda: lease.tensors, groups, scale, method, twin)

    def _step(
        self,
        chunk: Chunk,
        weight: torch.Tensor,
        gradient: torch.Tensor | None,
        state_of: Callable[[], dict[str, torch.Tensor]],
        groups: list[dict[str, Any]],
        scale: float | None,
        method: str,
        twin: torch.Tensor | None = None,
    ) -> None:
        """A piece after the other, where the arithmetic allows it: what was joined is still in the cache when it is split.
        On a device's host in place in the `twin`, the same numbers at home there, or in a copy."""
        held = state_of()
        size = PIECE if is_elementwise(chunk.kind.cls) else max(weight.numel(), 1)
        scalars, group = chunk.scalars, chunk.group
        for start in range(0, weight.numel(), size):
            piece = slice(start, start + size)
            low = held["low"][piece] if "low" in held else None
            state = {name[6:]: tensor[piece] for name, tensor in held.items() if name.startswith("state.")}
            numbers, given = weight[piece], None if gradient is None else gradient[piece]
            if chunk.on_host:
                numbers = self._host.bring("weight", numbers) if twin is None else twin[piece]
                given = None if given is None else self._host.bring("gradient", given)
            master = self._master(numbers, low)
            scalars, group = self._call(chunk, master, self._gradient(given, scale), state, groups, method)
            self._keep(f"{chunk.state} {start}", master, numbers, low)
            if chunk.on_host:
                self._host.give_back("weight", numbers, weight[piece])
        chunk.stepped, chunk.scalars, chunk.group = True, scalars, group

    def _master(self, weight: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
        if self.precision.master == "same":
            return weight
        master = self._buffer("master", weight)
        if low is None:
            master.copy_(weight)
        else:
            join_master(weight, low, master, self._buffer("spare", weight))
        return master

    def _gradient(self, gradient: torch.Tensor | None, scale: float | None) -> torch.Tensor | None:
        if gradient is None or (gradient.dtype is torch.float32 and scale is None):
            return gradient
        buffer = self._buffer("gradient", gradient).copy_(gradient)
        return buffer if scale is None else buffer.mul_(scale)

    def _buffer(self, name: str, like: torch.Tensor) -> torch.Tensor:
        buffer = self._scratch.get((name, like.device))
        if buffer is None or buffer.numel() < like.numel():
            buffer = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
            self._scratch[name, like.device] = buffer
        return buffer[: like.numel()]

    def _call(
        self,
        chunk: Chunk,
        master: torch.Tensor,
        gradient: torch.Tensor | None,
        state: dict[str, torch.Tensor],
        groups: list[dict[str, Any]],
        method: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Let the optimizer see a piece of this chunk as its only parameter, and take back what it has changed. Returns
        what it remembers besides tensors: of the parameter, and of the group."""
        optimizer = chunk.kind.optimizer
        group = optimizer.param_groups[0]
        evolving = chunk.kind.evolving(chunk.layout)
        group.update(chunk.kind.initial_group)
        group.update({k: v for k, v in groups[self.kinds.index(chunk.kind)].items() if k not in evolving})
        group.update(chunk.group)
        parameter = group["params"][0]
        shape = chunk.shape if master.numel() == prod(chunk.shape) else master.shape
        parameter.data = master.view(shape)
        parameter.grad = None if gradient is None else gradient.view(shape)
        optimizer.state.clear()
        dtypes = {name: dtype for name, _, dtype in chunk.layout.tensors}
        if chunk.stepped:
            scalars = {name: again(name, value, group, master.device) for name, value in chunk.scalars.items()}
            optimizer.state[parameter] = scalars | {k: t.to(dtypes[k]) for k, t in state.items()}
        getattr(optimizer, method)()
        kept = optimizer.state[parameter]
        for name, home in state.items():
            if place_of(kept[name]) != place_of(home):
                home.copy_(kept[name])
        scalars = {name: value for name, value in kept.items() if name not in state}
        optimizer.state.clear()
        parameter.grad = None
        return scalars, {name: group[name] for name in evolving}

    def _keep(self, name: str, master: torch.Tensor, weight: torch.Tensor, low: torch.Tensor | None) -> None:
        if self.precision.master == "split":
            split_master(master, weight, low)
        elif self.precision.master == "none":
            seed = zlib.crc32(f"{self.seed} {self.step_number} {name}".encode())
            stochastic_round(master, weight, torch.Generator(weight.device).manual_seed(seed))

    # -- what the manifest keeps --------------------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        """What optimizers remember besides tensors, as plain JSON; chunks that agree share one entry."""
        found: dict[str, dict[str, Any]] = {}
        for chunk in self._all_chunks():
            if chunk.stepped:
                fact = {"scalars": plain(chunk.scalars), "group": plain(chunk.group)}
                found.setdefault(repr(fact), {**fact, "chunks": []})["chunks"].append(chunk.state)
        return list(found.values())

    def restore(self, facts: list[dict[str, Any]]) -> None:
        """The inverse of `facts`."""
        chunks = {chunk.state: chunk for chunk in self._all_chunks()}
        for fact in facts:
            for name in fact["chunks"]:
                chunk = chunks[name]
                chunk.stepped = True
                chunk.scalars, chunk.group = revived(fact["scalars"]), revived(fact["group"])

    def _all_chunks(self) -> Iterator[Chunk]:
        for chunks in self.chunks.values():
            yield from chunks
