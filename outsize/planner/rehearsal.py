"""A training run without bytes: the engine that will train, on null tiers, fake tensors and a simulated clock.

`bind` and `Job.train_step` are the real ones. What depends on token ids alone is computed for real, since shapes depend
on it (which rows of a table a batch needs); every other tensor is fake. Each torch operation advances the clock by its
price, and each storage is counted while it lives."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from outsize.memory.null import NullTier
from outsize.memory.store import Store
from outsize.memory.tier import pages
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.clock import Rates, SimulatedClock, SimulatedTransfers, Span
from outsize.planner.prices import Prices
from outsize.train.job import Job, bind
from outsize.train.optimizers import AnyScalar, OptimizerRule
from outsize.train.update import Chunk, Updater

Batch = dict[str, torch.Tensor]
ENDLESS = 1 << 60
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rehearsal:
    """What a plan's steps did. `moved` is by step, as the ledger counts it: (source, destination, kind) -> bytes."""

    moved: tuple[Counter[tuple[str, str, str]], ...]
    seconds: tuple[float, ...]
    """Of each step."""
    spans: tuple[Span, ...]
    """Of the last step, beginning at 0."""
    lanes: dict[str, float]
    """Seconds of the last step by lane: compute, update, waiting, and how long the disk read and wrote."""
    waiting: dict[str, float]
    """Seconds of the last step in which compute waited, for reads and for writes."""
    live: LiveBytes
    accesses: tuple[tuple[str, str], ...]
    """(touch, block) in the order in which the last step leased and gave back blocks."""
    disk_bytes: int
    held: dict[tuple[str, str], int]
    """Bytes by (tier, kind) when the last step ends."""
    floating_operations: float


class Fakes(FakeTensorMode):
    """Fake tensors; but what is computed from real ones alone, the token ids, is real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass(frozen=True)
class Change:
    """Bytes of one storage that appeared (positive) or went (negative) at a time; `key` tells storages apart."""

    time: float
    key: int
    nbytes: int


class LiveBytes:
    """All storages that operations created, for as long as they live; those of `known` are somebody else's."""

    def __init__(self) -> None:
        self.now = self.peak = self.largest = 0
        self.changes: list[Change] = []
        self.known: set[int] = set()
        self._count = 0
        self._live: dict[int, tuple[StorageWeakRef, int, int]] = {}

    def ignore(self, tensors: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def see(self, result: Any, time: float) -> None:
        self.sweep(time)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self._live and storage.nbytes():
                    self._count += 1
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), self._count)
                    self._change(time, self._count, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def sweep(self, time: float) -> None:
        """Notice what has gone."""
        gone = [cdata for cdata, (reference, _, _) in self._live.items() if reference.expired()]
        for cdata in gone:
            _, nbytes, key = self._live.pop(cdata)
            self._change(time, key, -nbytes)

    def _change(self, time: float, key: int, nbytes: int) -> None:
        self.now += nbytes
        self.largest = max(self.largest, nbytes)
        self.changes.append(Change(time, key, nbytes))


class Priced(TorchDispatchMode):
    """Lets simulated time pass for every operation, and counts what it leaves behind."""

    def __init__(self, clock: SimulatedClock, prices: Prices, live: LiveBytes) -> None:
        super().__init__()
        self.floating_operations = 0.0
        self._clock, self._prices, self._live = clock, prices, live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        price = self._prices.of(func, args, kwargs or {}, result)
        self.floating_operations += price.floating_operations
        self._live.see(result, self._clock.time)
        self._clock.spend("compute", price.seconds)
        return result


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The module again, without bytes: parameters fake and tied as they were, buffers fake."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        bare = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(bare, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    twin = copy.deepcopy(model, memo)
    with mode:
        done: dict[int, Any] = {}
        for module in twin.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = done.setdefault(id(tensor), _fake(tensor))
    return twin


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


@dataclass(eq=False)
class Stage:
    """Everything a rehearsal plays with."""

    clock: SimulatedClock
    live: LiveBytes
    priced: Priced
    mode: FakeTensorMode
    store: Store
    prices: Prices
    accesses: list[tuple[str, str]] = field(default_factory=list)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What a thread of the engine works within."""
        with ExitStack() as stack:
            for mode in (self.mode, AnyScalar(), self.priced):
                stack.enter_context(mode)
            yield


def set_stage(plan: Plan, prices: Prices, rates: Rates, make_store: Callable[..., Store] = Store) -> Stage:
    clock, live = SimulatedClock(rates), LiveBytes()
    mode = Fakes(allow_non_fake_inputs=True)

    def allocate(nbytes: int) -> torch.Tensor:
        with mode:
            slab = torch.empty(pages(nbytes), dtype=torch.uint8)
        live.ignore([slab])
        return slab

    tiers = {"host": NullTier("host", ENDLESS), "disk": NullTier("disk", ENDLESS)}
    store = make_store(tiers, plan.arena_bytes, allocate, SimulatedTransfers(clock), clock=clock)
    return Stage(clock, live, Priced(clock, prices, live), mode, store, prices)


def make_job(
    model: nn.Module,
    plan: Plan,
    rule: OptimizerRule,
    stage: Stage,
    source_dtype: torch.dtype,
    block_class: str | None = None,
) -> Job:
    """The model's fake twin, bound to the stage's store as the real one will be, from weights in `source_dtype`."""
    twin = fake_copy(model, stage.mode)

    class PricedUpdater(Updater):
        """Leases what an update leases; the arithmetic costs its price."""

        def _change(self, chunk: Chunk, *rest: Any) -> None:
            chunk.stepped = True
            stage.clock.spend("update", stage.prices.update(chunk.stop - chunk.start))

    with stage.mode:
        shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}
        units = find_units(twin, block_class)

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            shape = shapes[name]
            return torch.empty((stop - start, *shape[1:]) if shape else (), dtype=source_dtype)

        job = bind(twin, units, plan, rule, stage.store, read, CPU, make_updater=PricedUpdater)
        stage.live.ignore([*twin.parameters(), *twin.buffers()])
    job.attachment.lanes.around = stage
    return job


def rehearse(
    model: nn.Module,
    plan: Plan,
    rule: OptimizerRule,
    prices: Prices,
    rates: Rates,
    steps: list[list[Batch]],
    source_dtype: torch.dtype = torch.bfloat16,
    block_class: str | None = None,
) -> Rehearsal:
    """Run `steps` (micro-batches of each) of `plan`; after the last nothing follows.

    Raises BudgetError where the real run would: when leases leave no room in the arena."""
    stage = set_stage(plan, prices, rates, _Witness)
    job = make_job(model, plan, rule, stage, source_dtype, block_class)
    job.on_complete = lambda step: _commit(job, step)
    moved: list[Counter[tuple[str, str, str]]] = []
    seconds: list[float] = []
    for number, micro_batches in enumerate(steps):
        before, waited = Counter(stage.store.ledger.moved), dict(stage.store.waiting_seconds)
        started, spent = stage.clock.time, dict(stage.clock.seconds)
        stage.clock.spans.clear()
        stage.live.changes.clear()
        assert isinstance(stage.store, _Witness)
        stage.store.accesses.clear()
        with stage():
            job.train_step(micro_batches, again=number + 1 < len(steps))
        stage.live.sweep(stage.clock.time)
        moved.append(stage.store.ledger.moved - before)
        seconds.append(stage.clock.time - started)
    return Rehearsal(
        tuple(moved),
        tuple(seconds),
        tuple(Span(span.lane, span.start - started, span.end - started) for span in stage.clock.spans),
        {lane: total - spent.get(lane, 0.0) for lane, total in stage.clock.seconds.items()},
        {name: total - waited[name] for name, total in stage.store.waiting_seconds.items()},
        stage.live,
        tuple(stage.store.accesses),
        stage.store.tiers["disk"].used,
        dict(stage.store.ledger.held),
        stage.priced.floating_operations / len(steps),
    )


def _commit(job: Job, step: int) -> None:
    if step % job.plan.commit_every == 0:
        job.store.commit(lambda slots: None)


class _Witness(Store):
    """A store that notes the order in which it is asked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.accesses: list[tuple[str, str]] = []
        super().__init__(*args, **kwargs)

    def lease(self, name: str, fresh: bool = False) -> Any:
        self.accesses.append(("fresh" if fresh else "take", name))
        return super().lease(name, fresh)

    def _give(self, entry: Any, touch: Any) -> None:
        self.accesses.append((touch.value, entry.block.name))
        super()._give(entry, touch)
