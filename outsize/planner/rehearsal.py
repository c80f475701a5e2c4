"""A training run without bytes: the engine that will train, on null tiers, fake tensors and a simulated clock.

`bind` and `Job.train_step` are the real ones. What depends on token ids alone is computed for real, since shapes depend
on it (which rows of a table a batch needs); every other tensor is fake. Each torch operation advances the clock by its
price, and each storage is counted while it lives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from outsize.distributed.arrangement import Arrangement
from outsize.distributed.group import Group, Imagined
from outsize.distributed.shard import ShardedStore
from outsize.distributed.wire import NO_WIRE, Wire
from outsize.machine.devices import CPU
from outsize.memory.null import NullTier
from outsize.memory.tier import pages
from outsize.model.activations import ACTIVATION
from outsize.model.route import holder_of
from outsize.model.units import find_units
from outsize.plan import KEEP, NEAR, Plan
from outsize.planner.clock import Rates, SimulatedClock, SimulatedTransfers
from outsize.planner.fakes import Fakes, bare_copy, fake_copy
from outsize.planner.live import LiveBytes
from outsize.planner.overlapped import overlapped
from outsize.planner.priced_update import priced_updater
from outsize.planner.prices import Prices, is_view, nothing
from outsize.planner.repeated import Repeated
from outsize.planner.script import ENDLESS, Event, Exchanged, HomeOf, Mark, Scribe, Script
from outsize.planner.spread import spread
from outsize.train.job import Job, bind
from outsize.train.optimizers import OptimizerRule

Batch = dict[str, torch.Tensor]
FEWEST = 6  # units, from which on four stand for all


class Priced(TorchDispatchMode):
    """Tells `spent` what every operation costs, and `live` what it touches and leaves behind, and so which operands of
    later ones are cold."""

    def __init__(
        self, prices: Prices, spent: Callable[[str, float, float, float], None], live: LiveBytes | None = None
    ) -> None:
        super().__init__()
        self._prices, self._spent, self._live = prices, spent, live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked ten thousand times a step
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1  # a loss, a norm, whether all is finite
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        live = None if is_view(func) else self._live
        if live is not None:
            live.see(result)
        price = self._prices.of(func, args, kwargs, result, nothing if live is None else live.is_cold)
        if live is not None:
            live.touch((args, kwargs, result))
        self._spent("compute", price.seconds, price.floating_operations, price.beside)
        return result


class ShardedScribe(ShardedStore, Scribe):
    """Writes down what leases of split weights lease, too."""


class Rehearsal:
    """A job on fake tensors, whose store writes down what it is asked."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        rule: OptimizerRule,
        prices: Prices,
        source_dtype: torch.dtype,
        block_class: str | None = None,
        wire: Wire = NO_WIRE,
    ) -> None:
        self.mode, self.prices = Fakes(allow_non_fake_inputs=True), prices
        self.group = self._group(Arrangement.of(plan.rank, plan.workers, plan.nodes, plan.close), wire)
        self.scribe = self._store(self.group.row(plan.sharers), plan.near)
        self.live = LiveBytes(self.scribe.tell)
        self.priced = Priced(prices, self.scribe.spent, self.live)
        self.job = self._bind(model, plan, rule, source_dtype, block_class)

    def _group(self, arrangement: Arrangement, wire: Wire) -> Group:
        if arrangement.size == 1:
            return Group()
        return Imagined(arrangement, wire, lambda *told: self.scribe.events.append(Exchanged(*told)), self._allocate)

    def _store(self, group: Group, near: str) -> Scribe:
        clock = SimulatedClock({"disk": Rates(1.0, 1.0, 1.0, 0.0)})
        tiers = {name: NullTier(name, ENDLESS) for name in {near, "host", "disk"}}
        transfers: Any = SimulatedTransfers(clock)
        return ShardedScribe(group, tiers, 0, self._allocate, transfers, near)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        """Memory of the store, which is nobody's tensor."""
        with _disable_current_modes(), self.mode:
            slab = torch.empty(pages(nbytes), dtype=torch.uint8)
        if nbytes:
            self.live.ignore([slab])
        return slab

    def _bind(
        self, model: nn.Module, plan: Plan, rule: OptimizerRule, source_dtype: torch.dtype, block_class: str | None
    ) -> Job:
        twin = fake_copy(model, self.mode)
        shapes = {name: parameter.shape for name, parameter in twin.named_parameters()}

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return torch.empty((stop - start, *shapes[name][1:]) if shapes[name] else (), dtype=source_dtype)

        with self.mode:
            units = find_units(twin, block_class)
            updater = priced_updater(self.prices)
            job = bind(twin, units, plan, rule, self.scribe, read, CPU, make_updater=updater, group=self.group)
        self.live.ignore([*twin.parameters(), *twin.buffers()])
        job.repeat = Repeated(self.scribe, self.live, self.mode)
        job.on_complete = lambda step: self.scribe.events.append(Mark.COMPLETE)
        return job

    @contextmanager
    def modes(self) -> Iterator[None]:
        """What steps run within."""
        with self.mode, self.priced:
            yield

    def run(self, micro_batches: list[Batch]) -> Script:
        """As many steps as it takes until the next does what every later one does: a held update is applied a step late,
        and blocks for what moves are made in the first step and used again in the others."""
        steps = []
        setup, plan = self._taken(), self.job.plan
        moves = any(choice.home != NEAR for _, choice in plan.activations)
        for _ in range(1 + plan.hold + moves):
            with self.modes():
                self.job.train_step(micro_batches)
            steps.append(self._taken())
        return Script(setup, tuple(steps))

    def _taken(self) -> tuple[Event, ...]:
        events = tuple(self.scribe.events)
        self.scribe.events.clear()
        return events


@dataclass(frozen=True)
class Rehearsed:
    """Scripts of one module under one plan, whose workers gather up to `ahead` bytes ahead: `plain` is without that. `runs`
    are repeated units that pass one after the other, of each of which the first four stand for all; there is none where every
    unit stands for itself."""

    plain: Script
    runs: tuple[tuple[str, ...], ...]
    ahead: int = 0
    _spread: dict[tuple[str, ...], Script] = field(default_factory=dict, repr=False, compare=False)

    def gathering(self, ahead: int) -> Rehearsed:
        """The same, with so many bytes ahead."""
        return self if ahead == self.ahead else Rehearsed(self.plain, self.runs, ahead)

    @cached_property
    def script(self) -> Script:
        return overlapped(self.plain, self.ahead)

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(chain(*self.runs))

    def over(self, units: Sequence[str]) -> Script:
        """The script as it would be with only these of the units, in order; of each run two or more."""
        every = tuple(units)
        if every not in self._spread:
            found = self.plain
            for run in self.runs:
                known, own = list(run[:4]), [name for name in every if name in run]
                steps = tuple(spread(step, known, own) for step in found.steps)
                found = Script(spread(found.setup, known, own), steps)
            self._spread[every] = overlapped(found, self.ahead)
        return self._spread[every]

    def some(self, number: int) -> list[str]:
        """About so many of the units, evenly taken from each run, its first and its last among them."""
        shares = [max(2, number * len(run) // len(self.units)) for run in self.runs]
        return [name for run, share in zip(self.runs, shares, strict=True) for name in _evenly(run, share)]

    @cached_property
    def work(self) -> float:
        """Seconds of compute, update and exchange in a step of all units."""
        four, known = self.script.work, 4 * len(self.runs)
        if not self.units:
            return four
        few = self.some(FEWEST * len(self.runs))
        return four + (self.over(few).work - four) / (len(few) - known) * (len(self.units) - known)

    @property
    def whole(self) -> Script:
        return self.over(self.units) if self.units else self.script

    @cached_property
    def asked(self) -> Script:
        """What the whole script asks of the store, when is left open."""
        return Rehearsed(self.plain.bare, self.runs, self.ahead).whole


def _evenly(units: Sequence[str], number: int) -> list[str]:
    return [units[round(index * (len(units) - 1) / (number - 1))] for index in range(number)]


def rehearse(
    model: nn.Module,
    plan: Plan,
    rule: OptimizerRule,
    prices: Prices,
    micro_batches: list[Batch],
    source_dtype: torch.dtype = torch.bfloat16,
    block_class: str | None = None,
    wire: Wire = NO_WIRE,
) -> Rehearsed:
    """What the steps of `plan` ask of the store: where blocks live is left open, all else is as the plan says.

    Of units of one shape four are rehearsed and stand for all, where the module lets the others be left out. Random numbers
    that are drawn for prices are taken from nobody: a job's own must not depend on how it was planned."""
    with torch.random.fork_rng(devices=[]):
        return _rehearse(model, plan, rule, prices, micro_batches, source_dtype, block_class, wire)


def _rehearse(
    model: nn.Module,
    plan: Plan,
    rule: OptimizerRule,
    prices: Prices,
    micro_batches: list[Batch],
    source_dtype: torch.dtype,
    block_class: str | None,
    wire: Wire,
) -> Rehearsed:
    units = tuple(unit.name for unit in find_units(model, block_class) if unit.repeated)

    def run(model: nn.Module, plan: Plan = plan) -> Script:
        return Rehearsal(model, plan, rule, prices, source_dtype, block_class, wire).run(micro_batches)

    ahead = plan.gather_ahead_bytes
    runs = runs_of(units, plan) if _alike(model, units, plan) else ()
    if not runs:
        return Rehearsed(run(model), (), ahead)
    others = [name for each in runs for name in each[4:]]
    try:
        found = Rehearsed(run(shortened(model, others), without(plan, others)), runs, ahead)
        found.over(found.some(FEWEST * len(runs)))
        return found
    except (ValueError, IndexError, KeyError, AttributeError):  # a module that counts on all of its units
        return Rehearsed(run(model), (), ahead)


def _alike(model: nn.Module, units: Sequence[str], plan: Plan) -> bool:
    """All of them are of one shape, and leave the same behind: near compute, or of a device also in its host's memory."""
    activations = dict(plan.activations)
    left = {activations.get(name, KEEP) for name in units}
    moved = any(choice.home != NEAR for choice in activations.values())
    alone = plan.device_bytes > 0 and not plan.legs
    return len(left) == 1 and (alone or not moved) and same_shape(model, units)


def runs_of(units: Sequence[str], plan: Plan) -> tuple[tuple[str, ...], ...]:
    """Those that pass one after the other, if they are many enough that four stand for them."""
    lengths = [plan.legs[number] for number in plan.own_legs] if plan.legs else [len(units)]
    runs = (tuple(units[start:stop]) for start, stop in pairwise([0, *accumulate(lengths)]))
    return tuple(run for run in runs if len(run) >= FEWEST)


def same_shape(model: nn.Module, units: Sequence[str]) -> bool:
    """All of them are of one class and shape in one list, and none shares a weight."""

    def shape(name: str) -> Any:
        module = model.get_submodule(name)
        parameters = [(n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters()]
        return type(module), name.rpartition(".")[0], parameters

    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    shared = any(owners[id(p)] > 1 for name in units for p in model.get_submodule(name).parameters())
    return not shared and all(shape(name) == shape(units[0]) for name in units)


def shortened(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """A copy without bytes, and without these units."""
    twin = bare_copy(model)
    for name in units:
        holder, own = holder_of(twin, name)
        del holder._modules[own]
    return twin


def without(plan: Plan, units: Sequence[str]) -> Plan:
    """The plan for a module that lacks these units, all but four of each run."""
    legs = [min(n, 4) if number in plan.own_legs and n >= FEWEST else n for number, n in enumerate(plan.legs)]
    activations = tuple((name, how) for name, how in plan.activations if name not in units)
    return replace(plan, activations=activations, legs=tuple(legs))


def homes(plan: Plan, always: set[str]) -> HomeOf:
    """Where the plan lets each block live, as `bind` and `Gradients` decide it; `always`: weights never let go."""

    def home_of(name: str) -> str:
        kind, _, rest = name.partition(":")
        if kind == "gradient":
            return plan.gradient_home
        if kind == ACTIVATION:
            return rest.partition(":")[0]
        if kind == "weight" and rest in plan.split_weights:
            return "disk"  # of other workers: it comes into the arena, and is forgotten
        weight = rest.split("@")[0]
        names = (weight, weight.rpartition(":")[0])  # of one block, or one of several of a table
        if kind == "weight" and not always.isdisjoint(names):
            return plan.near
        found = {(plan.home_of if kind == "weight" else plan.home_of_state)(name) for name in names}
        return next(home for home in (plan.near, "host", "disk") if home in found)

    return home_of
