"""Plans for several workers: how much of the state each has, and where it has it.

All do the same leases and exchanges in the same order; what stays near is each one's own matter. So workers with less memory,
or a smaller or slower disk, have smaller shares, and a plan of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import gcd

from outsize.distributed.measure import leveled
from outsize.errors import BudgetError
from outsize.machine.machine import Machine
from outsize.plan import KEEP, KEEP_ATTENTION, RECOMPUTE, SPARE, Plan
from outsize.planner.clock import ways_of
from outsize.planner.prices import RatedPrices
from outsize.planner.search import Search
from outsize.planner.task import JobSizes, Task
from outsize.planner.training import SETTLED, Place, Planning, plan_training
from outsize.sizes import format_size

FINE = 16  # parts that an even share is counted as
PASSES = 2  # of what is on disk, in a step: it is read and written
DISK_SPARE = 0.05  # of what a disk has free
NAMES = {
    **{KEEP: "keep", KEEP_ATTENTION: "attention", RECOMPUTE: "recompute"},
    **{how: name for name, how in SETTLED.items()},
}
Make = Callable[[Task, Place], Plan]


@dataclass(frozen=True)
class Worker:
    """Where one is, and how much memory it may use there."""

    memory_bytes: int
    place: Place

    @property
    def disk(self) -> float:
        """Bytes a second, of reading and writing at once, for each of those who share it."""
        return ways_of(self.place.machine)["disk"].both


def plan_workers(task: Task, workers: Sequence[Worker], make: Make = plan_training) -> list[Plan]:
    """A plan for each; those who have the same have the same but for `rank`. Raises BudgetError naming a worker who has too
    little, and as `make`."""
    if task.request.shares is None:
        task = replace(task, request=replace(task.request, shares=shares_of(task, workers)))
    shares = task.request.shares or (1,) * len(workers)
    kinds: dict[object, list[int]] = {}
    for rank, (worker, share) in enumerate(zip(workers, shares, strict=True)):
        kinds.setdefault((worker.memory_bytes, worker.place.disk_free_bytes, worker.disk, share), []).append(rank)
    found: dict[int, Plan] = {}
    for ranks in sorted(kinds.values(), key=lambda ranks: workers[ranks[0]].memory_bytes):
        plan = _plan(task, workers[ranks[0]], ranks[0], make, len(kinds) > 1)
        if not found:  # who has least decides what all must do alike
            task = replace(task, request=replace(task.request, **_settled(plan)))
        found |= {rank: replace(plan, rank=rank) for rank in ranks}
    plans = [found[rank] for rank in range(len(workers))]
    return plans if len(kinds) == 1 else _together(plans)


def _plan(task: Task, worker: Worker, rank: int, make: Make, named: bool) -> Plan:
    try:
        return make(
            replace(task, request=replace(task.request, memory_bytes=worker.memory_bytes, rank=rank)), worker.place
        )
    except BudgetError as problem:
        raise BudgetError(f"Worker {rank}: {problem}", problem.least) if named else problem from problem


def _settled(plan: Plan) -> dict[str, object]:
    """Of a request, what all workers must do alike, as in `plan`."""
    how = NAMES.get(next((choice for _, choice in plan.activations), KEEP), "auto")
    told = ("weight_copies", "gather_ahead_bytes", "parts", "commit_every")
    return {"activations": how, **{name: getattr(plan, name) for name in told}}


def _together(plans: list[Plan]) -> list[Plan]:
    """Each waits for the slowest."""
    seconds = max(plan.predicted.seconds_per_step or 0.0 for plan in plans if plan.predicted is not None)
    said = f"shares: {'; '.join(_say(plans))}"
    return [as_slow(plan, seconds, said) for plan in plans]


def as_slow(plan: Plan, seconds: float, *said: str) -> Plan:
    """With steps of so many seconds, as others take longer. `said` is why."""
    predicted = plan.predicted
    assert predicted is not None and predicted.seconds_per_step is not None
    slower = seconds / predicted.seconds_per_step
    predicted = replace(
        predicted,
        seconds_per_step=seconds,
        tokens_per_second=(predicted.tokens_per_second or 0.0) / slower,
        wire_wait_seconds=(predicted.wire_wait_seconds or 0.0) + seconds - predicted.seconds_per_step,
    )
    return replace(plan, predicted=predicted, reasons=(*plan.reasons, *said))


def _say(plans: list[Plan]) -> list[str]:
    shares = plans[0].shares or (1,) * len(plans)

    def told(rank: int) -> str:
        predicted, budget = plans[rank].predicted, plans[rank].memory_bytes or 0
        assert predicted is not None
        return (
            f"{shares[rank] / sum(shares):.1%} of what is divided, {format_size(predicted.host_peak_bytes)} of "
            f"{format_size(budget)} memory, {format_size(predicted.disk_bytes)} of disk, "
            f"{predicted.seconds_per_step or 0.0:.2f} s a step"
        )

    runs = [(what, list(ranks)) for what, ranks in groupby(range(len(plans)), key=told)]
    return [
        (f"worker {ranks[0]}" if len(ranks) == 1 else f"each of workers {ranks[0]} to {ranks[-1]}") + f" {what}"
        for what, ranks in runs
    ]


def alike_disks(machines: Sequence[Machine | None]) -> list[Machine]:
    """Of each worker: that of the first on its node, who alone has one here; of those whose disks are nearly as fast, the
    same, so that what was measured makes no difference."""
    found: list[Machine] = []
    for machine in machines:
        found.append(found[-1] if machine is None else machine)
    speeds = leveled([ways_of(machine)["disk"].both for machine in found])
    return [found[speeds.index(speed)] for speed in speeds]


# -- how much of the state each has ------------------------------------------------------------------------------------


def shares_of(task: Task, workers: Sequence[Worker]) -> tuple[int, ...]:
    """In which proportion they divide what is divided, so that all have done a step at the same time; (), equally.

    A step takes what it computes, with the update of the own share; and what of this is not near must go through the disk
    meanwhile. So nobody's share differs where memory or disks carry even ones as fast as they are stepped."""
    if len({(worker.memory_bytes, worker.place.disk_free_bytes, worker.disk) for worker in workers}) == 1:
        return ()
    search = Planning(task, workers[0].place).least
    loads = [_Load.of(search, worker) for worker in workers]
    if sum(load.most for load in loads) < len(loads):
        return ()  # no division fits: the plan says what is missing
    low, high = 0.0, 1.0
    while sum(load.share(high) for load in loads) < len(loads):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(load.share(middle) for load in loads) < len(loads) else (low, middle)
    parts = [max(1, round(FINE * load.share(high))) for load in loads]
    return () if len(set(parts)) == 1 else tuple(part // gcd(*parts) for part in parts)


@dataclass(frozen=True)
class _Load:
    """What a share is for a worker, counted in even ones. Seconds: `before` is what a step takes without an update, `update`
    what that of an even share adds. Bytes: `divided` an even share, `room` for shares near, `rate` on disk, a second."""

    before: float
    update: float
    divided: int
    room: float
    rate: float
    most: float
    """That the disk has space for."""

    @classmethod
    def of(cls, search: Search, worker: Worker) -> _Load:
        job, needs, request = search.job, search.needs, search.request
        elements = sum(size.weight.numel for size in job.sizes.values() if size.weight.trainable) / request.workers
        rated = RatedPrices(worker.place.machine).update(int(elements), None, lambda: lambda: None)
        update = worker.place.crowd.memory * rated.seconds
        divided = _divided(job, set(job.sizes))
        away = _divided(job, job.sizes.keys() - job.always)
        beside = needs.beside
        memory = worker.memory_bytes if beside is None else request.device_bytes + worker.memory_bytes - beside.fixed
        room = (1 - SPARE) * memory - needs.fixed - needs.good_arena - (job.everything - away)
        space = (1 - DISK_SPARE) * worker.place.disk_free_bytes / 2 - (job.all_bytes - divided)
        before = max(search.rehearsed.work - update, 0.0)
        return cls(
            before, max(update, 1e-9), max(away, 1), room, worker.disk / PASSES, max(space / max(divided, 1), 0.0)
        )

    def share(self, seconds: float) -> float:
        """The largest that takes no longer."""
        stepped = (seconds - self.before) / self.update
        carried = (seconds * self.rate + self.room) / self.divided
        return max(0.0, min(stepped, carried, self.most))


def _divided(job: JobSizes, names: set[str]) -> int:
    """Bytes of an even share of what workers divide of these weights: states, and weights that are split."""
    return sum(job.sizes[name].state_bytes + (job.sizes[name].bytes if name in job.split else 0) for name in names)
