"""Plans for a pipeline: which of a model's units each worker has, and how it holds them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from torch import nn

from outsize.asked import PipelineRequest
from outsize.distributed.pipeline import BACKWARD, order_of
from outsize.distributed.shares import in_proportion
from outsize.divided import HALVES, LOOP, V, leg_of, worker_of
from outsize.errors import BudgetError, ModelError, OptionError
from outsize.model.route import Leg, Route, keep_legs, shared_with_head
from outsize.model.units import Unit, find_units
from outsize.plan import Plan, Predicted
from outsize.planner.fakes import bare_copy
from outsize.planner.legs import find_route
from outsize.planner.task import Task
from outsize.planner.training import plan_training
from outsize.planner.turns import play_turns, stretch_of
from outsize.planner.workers import Worker, as_slow
from outsize.sizes import format_size
from outsize.train.precision import find_precision

TRIES = 3  # to divide the units better, when each worker has room for what it has
SEARCHED = 6  # and when one has not

Known = dict[tuple[int, tuple[Leg, ...], str, int | None], Plan | BudgetError]
"""What was found for a worker and its legs under a schedule, where all are to commit every so many steps."""


def lines_of(task: Task, workers: int, nodes: int, asked: PipelineRequest, begun: tuple[int, ...] = ()) -> list[Task]:
    """The job as each pipeline that so many workers can be and that has what was `asked`, the simplest first, each with even
    legs or those it has `begun` with.

    Raises OptionError when there is none, ModelError where the model cannot be divided."""
    route, found, refused = _route(task), [], []
    for legs, shape, zero_bubble in asked.ways(workers):
        try:
            request = replace(task.request, legs_shape=shape, zero_bubble=zero_bubble)
            own = begun or even_legs(replace(task, request=request), route, legs)
            found.append(replace(task, request=request.in_line(own, workers, nodes)))
        except OptionError as problem:
            refused.append(problem)
    if not found:
        raise refused[0]
    return found


def even_legs(task: Task, route: Route, legs: int) -> tuple[int, ...]:
    """How many of the repeated units each of so many legs has, so that all multiply about as many weights; one at least.

    Raises OptionError when there are too few."""
    count = len(route.repeated)
    if count < legs:
        returns = task.request.legs_shape == V
        fewer = f"--workers {count // 2}, or fewer" if returns else f"--legs or --workers {count}, or fewer"
        raise OptionError(f"{count} layers cannot be divided into {legs} legs. Give {fewer}.")
    sizes = [_elements(task.model, name) for name in route.repeated]
    ends, whole = list(accumulate(sizes)), sum(sizes) + _elements(task.model, route.head)
    cuts = [0]
    for number in range(1, legs):
        wanted = bisect_left(ends, whole * number / legs - sizes[0] / 2) + 1
        cuts.append(min(max(wanted, cuts[-1] + 1), count - (legs - number)))
    return tuple(stop - start for start, stop in pairwise([*cuts, count]))


def plan_line(tasks: Sequence[Task], workers: Sequence[Worker], settled: bool = False) -> list[Plan]:
    """A plan for each worker, as the fastest for whom there is room of the pipelines that `tasks` are, in legs of so many of
    the repeated units as that says; those of one leg have the plan of who has least memory. Unless legs are `settled`, units
    go from one to another until all have room for what they have, and then as long as steps become shorter.

    Raises BudgetError naming a worker who has too little, and as `plan_training`."""
    route, known, tries = _route(tasks[0]), {}, 0
    task, found, said = _best(tasks, route, workers, known)
    while not settled and tries < (SEARCHED if found.lacking else TRIES):
        moved = (_line(_with(task, legs), route, workers, known) for legs in found.eased())
        better = next((line for line in moved if line.cost < found.cost), None)
        if better is None:
            break
        found, tries = better, tries + 1
    return found.told(*said)


def fullest(plans: Sequence[Plan]) -> Plan:
    """Of the worker who needs the most of what memory it may use."""
    return max(plans, key=lambda plan: _predicted(plan).host_peak_bytes / (plan.memory_bytes or 1))


def leave_legs(model: nn.Module, plan: Plan, block_class: str | None) -> list[Unit]:
    """Leave of `model` what the worker of `plan` has. Returns its units."""
    route = find_route(model)
    legs = route.legs_to_train(plan.legs, plan.own_legs, shared_with_head(model, route))
    keep_legs(model, legs, find_precision(plan.precision).compute)
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
            f"{shared[0]} and {route.head} have one weight, the two gradients of which only --loss blocked brings together "
            "in a pipeline. Leave out --loss module, or --pipeline."
        )
    return route


def _elements(model: nn.Module, name: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(name).parameters())


def _with(task: Task, legs: tuple[int, ...]) -> Task:
    return replace(task, request=replace(task.request, legs=legs))


@dataclass(frozen=True)
class _Line:
    """What a worker of each leg would do, where these have so many of the repeated units: its plan, or what it would need
    beyond its budget. `said`: which units those are. `sharers`: workers of a leg. Of more legs than workers each has some,
    as their `shape` says."""

    legs: tuple[int, ...]
    sharers: int
    budgets: tuple[int, ...]
    found: tuple[Plan | BudgetError, ...]
    said: tuple[str, ...]
    shape: str = LOOP

    @property
    def own(self) -> list[float]:
        """Seconds that each worker for whom there is room would take for a step alone."""
        return [_seconds(plan) for plan in self.found if isinstance(plan, Plan)]

    @property
    def work(self) -> float:
        """Seconds that each worker would compute and update, on average, if nothing were computed again; 0 where some have no
        room."""
        plans = [plan for plan in self.found if isinstance(plan, Plan)]
        if len(plans) < len(self.found):
            return 0.0
        done = [(_predicted(plan), _again(plan, n)) for plan, n in zip(plans, self._units, strict=True)]
        return sum((p.compute_seconds or 0.0) * 3 / (3 + a) + (p.update_seconds or 0.0) for p, a in done) / len(done)

    @cached_property
    def seconds(self) -> float:
        """Of a step in which each worker does what it would do alone, in the order of the schedule. Where some have no room
        it says little."""
        plans = [plan for plan in self.found if isinstance(plan, Plan)]
        if len(plans) < len(self.found):
            return max(self.own, default=0.0)
        count, laps = len(plans), len(self.legs) // len(plans)
        layer = [_seconds(plan) / (n * plan.accumulate) for plan, n in zip(plans, self._units, strict=True)]

        def turn(worker: int, what: int, lap: int) -> float:
            """Backward multiplies twice as many matrices as forward, half of them for weights, and those of forward again
            where it recomputes."""
            again = _again(plans[worker], self._units[worker])
            parts = 1 + again if what == BACKWARD else 1
            if what == BACKWARD and plans[worker].schedule != HALVES:
                parts += 1
            return self.legs[leg_of(worker, lap, count, self.shape)] * layer[worker] * parts / (3 + again)

        orders = [order_of(plan.schedule, count, n, plan.accumulate, laps) for n, plan in enumerate(plans)]
        return play_turns(orders, turn, self.shape)

    @property
    def _whose(self) -> list[int]:
        """Who has each leg, by their place in line."""
        return [worker_of(leg, len(self.found), self.shape) for leg in range(len(self.legs))]

    @property
    def _units(self) -> list[int]:
        """How many of the repeated units each worker has."""
        pairs = list(zip(self.legs, self._whose, strict=True))
        return [sum(n for n, who in pairs if who == worker) for worker in range(len(self.found))]

    @cached_property
    def lacking(self) -> int:
        """Bytes that they need beyond what they may use."""
        pairs = zip(self.found, self.budgets, strict=True)
        return sum(_least(one, budget) - budget for one, budget in pairs if isinstance(one, BudgetError))

    @property
    def cost(self) -> tuple[int, float]:
        return self.lacking, self.seconds

    def eased(self) -> Iterator[tuple[int, ...]]:
        """Other legs: so many units each as it would do in the same time, if all took as long as its own do now; and those
        of now, but for one unit of the slowest at a neighbour."""
        loads, units, whose = self._loads(), self._units, self._whose
        if not self.lacking and max(loads) - min(loads) <= min(load / n for n, load in zip(units, loads, strict=True)):
            return  # whoever gets one more would take as long
        speeds = [n / max(load, 1e-9) for n, load in zip(units, loads, strict=True)]
        yield in_proportion(sum(self.legs), [speeds[who] for who in whose])
        slowest = loads.index(max(loads))
        for leg in (leg for leg, who in enumerate(whose) if who == slowest):
            for other in (leg - 1, leg + 1):
                if 0 <= other < len(self.legs) and self.legs[leg] > 1:
                    yield tuple(n - (number == leg) + (number == other) for number, n in enumerate(self.legs))

    def _loads(self) -> list[float]:
        """Seconds; of who has too little room as many more than of all others as it needs more room."""
        longest = max(self.own, default=1.0)
        return [
            _seconds(one) if isinstance(one, Plan) else longest * _least(one, budget) / budget
            for one, budget in zip(self.found, self.budgets, strict=True)
        ]

    def told(self, *reasons: str) -> list[Plan]:
        """The plans of all workers, with `reasons` for what they have in common. Raises BudgetError."""
        for leg, one in enumerate(self.found):
            if isinstance(one, BudgetError):
                raise BudgetError(f"Worker {leg * self.sharers}: {one}", one.least) from one
        plans = [plan for plan in self.found if isinstance(plan, Plan)]
        idle = 1 - sum(self.own) / len(self.own) / max(self.seconds, 1e-9)
        bubble = (
            f"bubble: of {self.seconds:.2f} s a step workers wait {idle:.0%} on average: for the first micro-batch to come, "
            "the last to go, and who takes longest"
        )
        if plans[0].schedule == HALVES:
            bubble += (
                "; in a leg where a module uses a weight twice, backward is in one piece, and they wait for longer"
            )
        said = [self._say(leg, plan) for leg, plan in enumerate(plans)]
        slowed = [as_slow(plan, self.seconds, *reasons, *said, bubble) for plan in plans]
        each = [replace(plan, rank=plan.rank + other) for plan in slowed for other in range(self.sharers)]
        assert [plan.rank for plan in each] == list(range(len(each))), "a worker has another's plan"
        return each

    def _say(self, leg: int, plan: Plan) -> str:
        predicted, who = _predicted(plan), f"worker {plan.rank}"
        if self.sharers > 1:
            who = f"workers {plan.rank}-{plan.rank + self.sharers - 1}"
        return (
            f"{who}: {self.said[leg]}; peaks at {format_size(predicted.host_peak_bytes)} of "
            f"{format_size(self.budgets[leg])}, {format_size(predicted.disk_bytes)} of disk; alone it would take "
            f"{_seconds(plan):.2f} s for a step"
        )


def _best(
    tasks: Sequence[Task], route: Route, workers: Sequence[Worker], known: Known
) -> tuple[Task, _Line, list[str]]:
    """The line with the shortest step of all that have room, and why. The last of `tasks` comes first: those after it wait
    longer, and have no less to do. Which is estimated to take longer (if legs were equal, and nobody waited for a disk or
    the wire) is not planned."""
    tried: list[tuple[Task, _Line]] = []
    said: list[str] = []
    for task in reversed(tasks):
        line = min((line for _, line in tried), key=lambda line: line.cost, default=None)
        least = tried[0][1].work * stretch_of(task.request) if tried else 0.0
        if line is not None and not line.lacking and least >= line.seconds:
            said.append(f"{_named(task)} {least:.2f} s by estimate")
            continue
        tried.append((task, _line(task, route, workers, known)))
        found = tried[-1][1]
        said.append(
            f"{_named(task)} " + (f"lacks {format_size(found.lacking)}" if found.lacking else f"{found.seconds:.2f} s")
        )
    best = min(reversed(tried), key=lambda pair: pair[1].cost)
    why = f"schedule: {_named(best[0])}; a step with legs as even as can be: {', '.join(reversed(said))}"
    return *best, [why] if len(tasks) > 1 else []


def _named(task: Task) -> str:
    request = task.request
    return request.schedule + (f" of {request.laps} laps" if request.laps > 1 and request.legs_shape == LOOP else "")


def _predicted(plan: Plan) -> Predicted:
    assert plan.predicted is not None
    return plan.predicted


def _again(plan: Plan, units: int) -> float:
    """Which part of forward is computed again, reckoned by matrix products with weights."""
    return sum(choice.saved in ("attention", "input") for _, choice in plan.activations) / units


def _seconds(plan: Plan) -> float:
    return _predicted(plan).seconds_per_step or 0.0


def _least(problem: BudgetError, budget: int) -> int:
    """Bytes of memory that would do; of a disk that is too small nobody says."""
    return max(problem.least or 2 * budget, budget + 1)


def _line(task: Task, route: Route, workers: Sequence[Worker], known: Known) -> _Line:
    """The first worker's plan says how often all commit."""
    legs, sharers = task.request.legs, task.request.sharers
    shared, found, said, budgets = shared_with_head(task.model, route), [], [], []
    for first in range(0, len(workers), sharers):
        worker = _least_of(workers[first : first + sharers])
        task = replace(task, request=replace(task.request, memory_bytes=worker.memory_bytes, rank=first))
        own = route.legs_to_train(legs, task.request.own_legs, shared)
        key = (first, own, task.request.schedule, task.request.commit_every)
        if key not in known:
            known[key] = _planned(_part(task, own), worker)
        one = known[key]
        found.append(replace(one, legs=legs) if isinstance(one, Plan) else one)
        said.append(" and ".join(map(str, own)))
        budgets.append(worker.memory_bytes)
        if first == 0 and isinstance(one, Plan):
            task = replace(task, request=replace(task.request, commit_every=one.commit_every))
    return _Line(legs, sharers, tuple(budgets), tuple(found), tuple(said), task.request.legs_shape)


def _least_of(sharers: Sequence[Worker]) -> Worker:
    """One with no more than any of them has."""
    least = min(sharers, key=lambda one: one.memory_bytes)
    disk = min(one.place.disk_free_bytes for one in sharers)
    return replace(least, place=least.place.beside(least.place.machine, disk))


def _part(task: Task, legs: Sequence[Leg]) -> Task:
    """What a worker of these legs has of the job."""
    model = bare_copy(task.model)
    keep_legs(model, legs, find_precision(task.request.precision).compute)
    units = find_units(model, task.block_class)
    return replace(task, model=model, units=units, micro_batches=task.batches, whole=task)


def _planned(task: Task, worker: Worker) -> Plan | BudgetError:
    try:
        return plan_training(task, worker.place)
    except BudgetError as problem:
        return problem
