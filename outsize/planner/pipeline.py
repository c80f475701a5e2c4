"""Plans for a pipeline: which of a model's units each worker has, and how it holds them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from torch import nn

from outsize.errors import BudgetError, ModelError, OptionError
from outsize.model.route import Route, keep_leg, shared_with_head
from outsize.model.units import Unit, find_units
from outsize.plan import Plan
from outsize.planner.legs import find_route
from outsize.planner.rehearsal import bare_copy
from outsize.planner.training import Task, plan_training
from outsize.planner.workers import Worker, as_slow
from outsize.train.precision import find_precision

TRIES = 3  # to give the slowest worker less

Known = dict[tuple[int, int, int], Plan]
"""Plans by worker, its first of the repeated units, and the one after its last."""


def even_legs(task: Task, workers: int) -> tuple[int, ...]:
    """How many of the repeated units each worker has, so that all multiply about as many weights; one at least.

    Raises OptionError when there are too few, ModelError where the model cannot be divided."""
    route = _route(task)
    count = len(route.repeated)
    if count < workers:
        raise OptionError(f"{count} layers cannot be divided among {workers} workers. Give --workers {count} or fewer.")
    sizes = [_elements(task.model, name) for name in route.repeated]
    ends, whole = list(accumulate(sizes)), sum(sizes) + _elements(task.model, route.head)
    cuts = [0]
    for number in range(1, workers):
        wanted = bisect_left(ends, whole * number / workers - sizes[0] / 2) + 1
        cuts.append(min(max(wanted, cuts[-1] + 1), count - (workers - number)))
    return tuple(stop - start for start, stop in pairwise([*cuts, count]))


def plan_line(task: Task, workers: Sequence[Worker], settled: bool = False) -> list[Plan]:
    """A plan for each worker, of which each has so many of the repeated units as the `legs` of `task` say. Unless these are
    `settled`, the slowest worker gives one to a neighbour as long as that makes steps shorter.

    Raises BudgetError naming a worker who has too little, and as `plan_training`."""
    route, known = _route(task), {}
    found = _line(task, route, workers, known)
    for _ in range(0 if settled else TRIES):
        moved = [replace(task, request=replace(task.request, legs=legs)) for legs in found.eased()]
        best = min([found, *(_line(other, route, workers, known) for other in moved)], key=lambda line: line.seconds)
        if best is found:
            break
        found = best
    return found.told()


def leave_leg(model: nn.Module, plan: Plan, block_class: str | None) -> list[Unit]:
    """Leave of `model` what the worker of `plan` has. Returns its units."""
    route = find_route(model)
    leg = route.leg_to_train(plan.legs, plan.rank, shared_with_head(model, route))
    keep_leg(model, leg, find_precision(plan.precision).compute)
    return find_units(model, block_class)


def _route(task: Task) -> Route:
    """Raises ModelError where the model cannot be divided; so, too, where embedding and head have one weight that is no
    table, as two workers would have a part of its gradient, and where the loss is made of what all layers say."""
    route = find_route(task.model)
    if getattr(task.model.config, "output_router_logits", False):
        raise ModelError(
            f"{type(task.model).__name__} adds a loss of the routers of all layers, which no worker of a pipeline has. Set "
            "output_router_logits to false in its config.json, or leave out --pipeline."
        )
    shared = shared_with_head(task.model, route)
    if shared and not task.loss[0]:
        raise ModelError(
            f"{shared[0]} and {route.head} have one weight, the gradient of which only --loss blocked brings together from "
            "two workers. Leave out --loss module, or --pipeline."
        )
    return route


def _elements(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


@dataclass(frozen=True)
class _Line:
    """The plans of all workers, and the seconds that each would take for a step alone."""

    plans: tuple[Plan, ...]

    @property
    def own(self) -> list[float]:
        return [plan.predicted.seconds_per_step or 0.0 for plan in self.plans if plan.predicted is not None]

    @property
    def seconds(self) -> float:
        """Of a step: micro-batches follow each other as fast as the slowest worker takes them, and the first has to go
        through all the others."""
        return max(self.own) + (sum(self.own) - max(self.own)) / self.plans[0].accumulate

    def eased(self) -> Iterator[tuple[int, ...]]:
        """The legs, with one unit of the slowest worker at a neighbour."""
        legs, slowest = self.plans[0].legs, self.own.index(max(self.own))
        for other in (slowest - 1, slowest + 1):
            if 0 <= other < len(legs) and legs[slowest] > 1:
                yield tuple(n - (rank == slowest) + (rank == other) for rank, n in enumerate(legs))

    def told(self) -> list[Plan]:
        each = ", ".join(f"{seconds:.2f}" for seconds in self.own)
        idle = 1 - sum(self.own) / len(self.own) / max(self.seconds, 1e-9)
        said = f"line: alone the workers would take {each} s for a step; of {self.seconds:.2f} s they wait {idle:.0%}"
        return [as_slow(plan, self.seconds, said) for plan in self.plans]


def _line(task: Task, route: Route, workers: Sequence[Worker], known: Known) -> _Line:
    """The first worker's plan says how often all commit."""
    ends, plans = [0, *accumulate(task.request.legs)], []
    for rank, worker in enumerate(workers):
        key = (rank, ends[rank], ends[rank + 1])
        if key not in known:
            known[key] = _plan(_part(task, route, rank), worker)
        plans.append(replace(known[key], legs=task.request.legs))
        task = replace(task, request=replace(task.request, commit_every=plans[0].commit_every))
    return _Line(tuple(plans))


def _part(task: Task, route: Route, rank: int) -> Task:
    """What the worker has of the job."""
    model = bare_copy(task.model)
    leg = route.leg_to_train(task.request.legs, rank, shared_with_head(task.model, route))
    keep_leg(model, leg, find_precision(task.request.precision).compute)
    request, units = replace(task.request, rank=rank), find_units(model, task.block_class)
    return replace(task, model=model, units=units, request=request, micro_batches=task.batches, whole=task)


def _plan(task: Task, worker: Worker) -> Plan:
    request = replace(task.request, memory_bytes=worker.memory_bytes)
    try:
        return plan_training(replace(task, request=request), worker.place)
    except BudgetError as problem:
        raise BudgetError(f"Worker {request.rank}: {problem}", problem.least) from problem
