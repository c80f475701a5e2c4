"""From a request to a Plan for training: what must be near, what may be, and where the rest goes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from time import perf_counter

from outsize.distributed.measure import Crowd
from outsize.distributed.wire import Wire
from outsize.divided import HALVES
from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import give_back
from outsize.machine.describe import process_memory
from outsize.machine.devices import CONTEXT
from outsize.machine.machine import Machine
from outsize.plan import INPUT_TO_HOST, KEEP, KEEP_ATTENTION, MOVE, MOVE_TO_HOST, RECOMPUTE, Activations, Plan
from outsize.planner.beside import LIBRARIES
from outsize.planner.clock import Ways, ways_of
from outsize.planner.known_prices import KnownPrices, prices_file
from outsize.planner.meeting import seconds_of_meeting
from outsize.planner.needs import find_needs
from outsize.planner.prices import (
    CrowdedPrices,
    MeasuredPrices,
    Prices,
    RatedPrices,
    seconds_of_passing,
    yardsticks,
)
from outsize.planner.reasons import finished, of_machine
from outsize.planner.refusals import disk_too_small, no_memory
from outsize.planner.rehearsal import Rehearsed, rehearse
from outsize.planner.samples import PATIENCE, Cooling, Pulse
from outsize.planner.search import Search
from outsize.planner.task import JobSizes, Task
from outsize.planner.thrashed import THRASHING, thrashed
from outsize.planner.trial import Left, left_behind
from outsize.train.precision import find_precision

SETTLED = {
    "move to host": MOVE_TO_HOST,
    "move to disk": MOVE,
    "inputs to host": INPUT_TO_HOST,
}  # by another worker's plan
WORTH = 0.1  # of what is computed again is attention, at least, if a plan that keeps its results is to be tried
LOOKING = 4.0  # seconds, about what it takes to measure the operations of a step


@dataclass(frozen=True)
class Place:
    """Where it will run: the machine, what the process holds there already, and what the disk has free. Several workers on a
    machine are a `crowd`."""

    machine: Machine
    baseline_bytes: int
    disk_free_bytes: int
    wire: Wire = field(default_factory=dict)
    crowd: Crowd = Crowd()
    room_bytes: int = 2 * THRASHING
    """Of memory in which operations may be measured."""
    _resident: int = field(default_factory=lambda: process_memory().resident_bytes, repr=False)

    @property
    def baseline_now(self) -> int:
        """The baseline, and what planning has added to it: libraries' own memory, which stays."""
        return self.baseline_bytes + max(process_memory().resident_bytes - self._resident, 0)

    def beside(self, machine: Machine, disk_free_bytes: int) -> Place:
        """That of another worker, who computes as this one does."""
        found = replace(self, machine=machine, disk_free_bytes=disk_free_bytes)
        vars(found)["prices"] = self.prices  # to measure them takes seconds
        return found

    @cached_property
    def prices(self) -> Prices:
        """Of a machine that is here: measured; but for a device, on which a rehearsal has no tensors."""
        rated = RatedPrices(self.machine)
        there = self.machine.origin == "described" or self.machine.compute.tier == "device"
        found = rated if there else _measured(rated, self.room_bytes)
        return found if self.crowd == Crowd() else CrowdedPrices(found, self.crowd)


def _measured(rated: RatedPrices, room: int) -> MeasuredPrices:
    """With what is known of a time like now. Where nothing is, it is looked again for as long as it takes to measure all
    anew: something may just have come between."""
    file, cooling, pulse = prices_file(rated.machine), Cooling(), Pulse(patience=0.0)
    end = perf_counter() + LOOKING
    while True:
        passing = seconds_of_passing()
        known = KnownPrices.read(file, yardsticks(passing, cooling, pulse))
        if known.then.seconds or not known.others or perf_counter() > end:
            break
    pulse.patience = PATIENCE
    meeting = known.find("meeting", lambda: seconds_of_meeting(cooling))
    cooling.end()  # to hold no more than what follows
    return MeasuredPrices(rated, passing, meeting or 0.0, known, thrashed(room, known, pulse), cooling, pulse)


def plan_training(task: Task, place: Place) -> Plan:
    """The fastest plan within `task.request.memory_bytes`.

    Raises BudgetError, with the smallest budget that works, when the job does not fit memory or disk."""
    return Planning(task, place).within(task.request.memory_bytes)


class Planning:
    """A job at a place, planned within one budget after another. What no budget changes is measured and rehearsed once, so
    that plans differ by their budgets alone."""

    def __init__(self, task: Task, place: Place) -> None:
        self._task, self._place = task, place
        self._searches: dict[tuple[Activations, int, tuple[str, ...], int], Search] = {}

    def within(self, memory_bytes: int) -> Plan:
        """As `plan_training`. Units are leased by parts only where there is no room for whole ones: parts are more leases,
        and less is read ahead."""
        if 2 * self._task.job.all_bytes > self._place.disk_free_bytes:
            raise BudgetError(disk_too_small(2 * self._task.job.all_bytes, self._place.disk_free_bytes))
        problem: BudgetError | None = None
        for wanted in (lambda: self._task.jobs, lambda: self._task.jobs_by_parts):
            jobs = wanted()  # to find what has parts takes a forward pass
            try:
                if found := self._found(jobs, memory_bytes):
                    plan = _fastest(found)
                    check_disk(plan, self._place.disk_free_bytes)
                    return replace(plan, reasons=(*plan.reasons, of_machine(self._place.machine)))
            except BudgetError as error:
                problem = error
        raise problem or self._refusal(memory_bytes)

    def _refusal(self, memory_bytes: int) -> BudgetError:
        """What would do, in the way that needs the least."""
        ways = self._possible([*self._task.jobs, *self._task.jobs_by_parts], memory_bytes)
        tried = [self.search(how, job).within(memory_bytes) for how, job in ways]
        return no_memory(min(tried, key=lambda search: (search.host_room < 0, search.least)).streamed())

    def _possible(self, jobs: list[JobSizes], memory_bytes: int) -> list[tuple[Activations, JobSizes]]:
        """What may fit; or else the last, which needs the least."""
        jobs = [job for job in jobs if self._place.wire or not job.ahead]
        ways = [(how, job) for job in jobs for how in self._considered]
        return [(how, job) for how, job in ways if self._held(how) <= self._wall(memory_bytes)] or ways[-1:]

    def _wall(self, memory_bytes: int) -> int:
        return self._task.request.device_bytes or memory_bytes

    def _fixed(self, how: Activations) -> int:
        """Bytes beside those for what is leased, as far as that way is rehearsed."""
        return min((search.needs.fixed for known, search in self._searches.items() if known[0] == how), default=0)

    def _found(self, jobs: list[JobSizes], memory_bytes: int) -> list[Search]:
        """The searches of all that fits, played."""
        found: list[Search] = []
        fastest = inf
        late = self._keeps_late(memory_bytes)
        ways = sorted(self._possible(jobs, memory_bytes), key=lambda way: late and way[0] == KEEP)
        for how, job in ways:
            if found and how == INPUT_TO_HOST:  # which is for want of room alone
                continue
            if how == RECOMPUTE and self._dear and any(s.job is job and _keeps_attention_easily(s) for s in found):
                continue
            if self._least(how, job, memory_bytes, found) >= fastest:
                continue
            if job.parts and self._fixed(how) > self._wall(memory_bytes):  # what is leased is not what is too much
                continue
            search = self.search(how, job).within(memory_bytes)
            if not search.fits or search.rehearsed.work >= fastest:
                continue
            if search.room < search.needs.good_arena:
                search = search.loosened(only_fitting=True)
            if search.fits:
                found.append(search)
                best = search.best(fastest)
                fastest = min(fastest, best.cost)
                if best.forecast.hides_all and not best.placement.host_updates and not late:
                    break  # what comes computes or exchanges more
        return found

    @cached_property
    def _considered(self) -> list[Activations]:
        """Ways in which activations may wait, the least compute first."""
        request = self._task.request
        device = request.device_bytes > 0
        choices = {"keep": [KEEP], "attention": [KEEP_ATTENTION], "recompute": [RECOMPUTE], "move": [MOVE]}
        if device:
            choices |= {"recompute": [RECOMPUTE, INPUT_TO_HOST], "move": [MOVE_TO_HOST, MOVE]}
        if request.activations in SETTLED:
            return [SETTLED[request.activations]]
        if request.activations not in ("auto", *choices):
            raise OptionError(f"activations {request.activations!r} is unknown; there are auto, {', '.join(choices)}.")
        if request.activations != "auto":
            return choices[request.activations]
        halves = request.schedule == HALVES  # in each of which it would be computed again
        if halves:
            return [KEEP]
        spares = self._dear or self._left.attention.seconds > WORTH * self._left.all.seconds
        return [KEEP, *([KEEP_ATTENTION] if spares else []), *choices["recompute"]]

    @property
    def _dear(self) -> bool:
        """To compute attention again takes longer than its results take the place of: as many bytes of weights would be read
        in forward and backward, and written once a step."""
        micro_batches, made = len(self._task.batches), self._left.attention
        passing = max(2 * micro_batches / way.read + 1 / way.write for way in self._ways.values())
        return micro_batches * made.seconds > self._task.request.underway * made.nbytes * passing

    @property
    def least(self) -> Search:
        """In the way that needs the least memory of the host."""
        return self.search(next(how for how in reversed(self._considered) if how != INPUT_TO_HOST))

    def _held(self, how: Activations) -> int:
        """Bytes without which no budget does, told without a rehearsal."""
        request = self._task.request
        held = CONTEXT if request.device_bytes else self._place.baseline_bytes
        if how not in (KEEP, KEEP_ATTENTION):
            return held
        return held + request.underway * (self._left.all if how == KEEP else self._left.attention).nbytes

    def _least(self, how: Activations, job: JobSizes, memory_bytes: int, found: list[Search]) -> float:
        """Seconds that a step takes at least, told without another rehearsal: what is not kept is computed again, and what is
        kept takes the room of what else would not pass."""
        kept = self._searches.get(_key(KEEP, job))
        if kept is not None and how in (KEEP_ATTENTION, RECOMPUTE):
            return kept.rehearsed.work + self._again(how)
        if how == KEEP:
            room = self._wall(memory_bytes) - self._held(how)
            alike = (s for s in found if s.job is job and _way_of(s) in (KEEP_ATTENTION, RECOMPUTE))
            return max((search.moving(room) for search in alike), default=0.0)
        return 0.0

    def _keeps_late(self, memory_bytes: int) -> bool:
        """To keep all is tried last: what would have to pass for want of room takes longer than to compute all again. That is
        a guess, by which nothing but the order is settled."""
        request, ways = self._task.request, self._ways
        if len(self._considered) == 1 or self._considered[0] != KEEP or request.legs:
            return False
        passing = self._task.job.everything - self._wall(memory_bytes) + self._held(KEEP)
        computing = 4 * self._again(self._considered[1])
        return computing > 0 and passing > computing * sum(way.read for way in ways.values())

    def _again(self, how: Activations) -> float:
        """Seconds of a step in which is computed again what is not kept."""
        spared = self._left.attention.seconds if how == KEEP_ATTENTION else 0.0
        return len(self._task.batches) * (self._left.all.seconds - spared)

    @cached_property
    def _ways(self) -> Ways:
        return ways_of(self._place.machine, self._place.crowd.workers)

    @cached_property
    def _left(self) -> Left:
        """By one micro-batch."""
        task, dtype = self._task, find_precision(self._task.request.precision).compute
        return left_behind(task.model, task.units, task.batches[0], self._place.prices, dtype)

    def search(self, how: Activations, job: JobSizes | None = None) -> Search:
        """Ready to search; it need not fit. `job`: one of the task's."""
        task, job = self._task, job or self._task.job
        key = _key(how, job)
        if key not in self._searches:
            names = [unit.name for unit in task.units if unit.repeated]
            plan = job.plan(task.request, tuple((name, how) for name in names))
            alike = next((found for known, found in self._searches.items() if known[:3] == key[:3]), None)
            self._searches[key] = search_of(task, self._place, job, plan, alike and alike.rehearsed)
        return self._searches[key]


def _key(how: Activations, job: JobSizes) -> tuple[Activations, int, tuple[str, ...], int]:
    return how, job.copies, job.parts, job.ahead


def _way_of(search: Search) -> Activations:
    """What becomes of the activations of its units, of all alike."""
    return next((how for _, how in search.bare.activations), KEEP)


def _keeps_attention_easily(search: Search) -> bool:
    """With a good arena: with less it may be found to have no room when it is played closely."""
    return _way_of(search) == KEEP_ATTENTION and search.room >= search.needs.good_arena


def _fastest(found: list[Search]) -> Plan:
    """Of what was tried, the fastest that is still found to have room when it is played closely. Where nothing is, so with
    larger arenas."""
    try:
        return _first_with_room(found)
    except BudgetError:
        looser = [search for search in (search.streamed(only_fitting=True) for search in found) if search.fits]
        if not looser:
            raise
    for search in looser:
        search.best()
    return _first_with_room(looser)


def _first_with_room(found: list[Search]) -> Plan:
    problem: BudgetError | None = None
    tried = [(choice, search) for search in found for choice in search.tried]
    for choice, search in sorted(tried, key=lambda pair: pair[0].cost):
        try:
            return finished(search, choice)
        except BudgetError as error:
            problem = error
    assert problem is not None
    raise problem


def search_of(task: Task, place: Place, job: JobSizes, bare: Plan, known: Rehearsed | None = None) -> Search:
    """Rehearse a plan that places nothing yet, if it is not `known` but for what is gathered ahead, and find what it needs.
    What rehearsing leaves in memory counts."""
    found = (known or _rehearsed(task, place, bare)).gathering(bare.gather_ahead_bytes)
    needs = find_needs(
        *(task.units, job.sizes, job.rows, job.always, place.baseline_now, found, bare),
        libraries=LIBRARIES if place.machine.origin == "described" else 0,
    )
    ways = ways_of(place.machine, place.crowd.workers)
    return Search(bare, job, needs, task.request, ways, found, place.wire)


def _rehearsed(task: Task, place: Place, bare: Plan) -> Rehearsed:
    prices = place.prices
    found = rehearse(task.model, bare, task.rule, prices, task.batches, task.source_dtype, task.block_class, place.wire)
    prices.keep()
    give_back()
    return found


def check_disk(plan: Plan, free: int) -> None:
    """Raises BudgetError when the plan's state does not fit the `free` bytes of a disk."""
    assert plan.predicted is not None
    if plan.predicted.disk_bytes > free:
        raise BudgetError(disk_too_small(plan.predicted.disk_bytes, free))
