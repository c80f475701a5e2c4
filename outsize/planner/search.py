"""Which weights and states stay near, and how much memory is left for what streams: the fastest that fits.

Each candidate is played under the simulated clock. They differ in the size of the arena, in steps between what is just
enough and all that is left, and in what the rest is filled with: weights are read two or three times a step and written
once, state is read and written once, so by bytes saved for each byte held weights come first; but what compute hides
costs nothing, and only playing tells what is hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

from outsize.asked import Request
from outsize.distributed.wire import NO_WIRE, Wire
from outsize.errors import BudgetError
from outsize.machine.caching import ROUND, lasting
from outsize.memory.tier import PAGE, pages
from outsize.plan import NEAR, SPARE, Plan
from outsize.planner.bound import Used
from outsize.planner.clock import Ways
from outsize.planner.convex import values_about_least
from outsize.planner.forecast import Forecast, forecast, with_snapshots
from outsize.planner.keeper import keeper_bytes
from outsize.planner.needs import Needs, gradient_bytes
from outsize.planner.rehearsal import Rehearsed, homes
from outsize.planner.room import need_room
from outsize.planner.script import Create, HostUpdates
from outsize.planner.task import JobSizes

SNAPSHOT_SHARE = 8  # of what a step moves, snapshots of state in memory may add one part in so many
PARTS = 4  # of what lives in a device's host's memory, of which each may be updated there
LONGEST_WITHOUT = 50  # steps between snapshots, at most
TIGHT = 0.05  # by so much a small arena must be faster: where the disk is not as measured it loses more, docs/log.md


@dataclass(frozen=True)
class Placement:
    """What is near, and how much is left for what is not; `filled` says what the rest was filled with first. `host_weights`
    and `host_states` live in the memory of a device's host, and whatever else is not near on disk; `host_updates` are
    updated there."""

    near_weights: frozenset[str]
    near_states: frozenset[str]
    arena_bytes: int
    gradient_home: str
    filled: str
    shared: bool = False
    """All blocks lie in memory that outlives the process, each with a twin."""
    host_weights: frozenset[str] = frozenset()
    host_states: frozenset[str] = frozenset()
    host_updates: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """`tight`: something streams, and through less than a good arena."""

    placement: Placement
    forecast: Forecast
    tight: bool = False

    @property
    def cost(self) -> float:
        """Seconds of a step, by which choices are compared."""
        return self.forecast.seconds * (1 + TIGHT * self.tight)


class Search:
    def __init__(
        self,
        bare: Plan,
        job: JobSizes,
        needs: Needs,
        request: Request,
        ways: Ways,
        rehearsed: Rehearsed,
        wire: Wire = NO_WIRE,
    ) -> None:
        self.bare, self.job, self.needs, self.request = bare, job, needs, request
        self.ways, self.rehearsed, self.wire = ways, rehearsed, wire
        self.tried: list[Choice] = []

    def within(self, memory_bytes: int) -> Search:
        """The same for another budget."""
        bare, request = replace(self.bare, memory_bytes=memory_bytes), replace(self.request, memory_bytes=memory_bytes)
        return Search(bare, self.job, self.needs, request, self.ways, self.rehearsed, self.wire)

    def loosened(self, only_fitting: bool = False) -> Search:
        """With the least arena as large as a step needs in which everything streams: between leases of several sizes, which
        end in another order than they begin, there are gaps that no block fits. `only_fitting`: as far as the budget goes;
        else to tell what would do."""
        found = self.within(self.request.memory_bytes)
        while found.fits or not only_fitting:
            try:
                found.need_room(found.streaming)
                return found
            except BudgetError:
                found = found._larger()
        return found

    def streamed(self, only_fitting: bool = False) -> Search:
        """As `loosened`, and in which everything is tried to stream."""
        found = self.loosened(only_fitting)
        while found.fits or not only_fitting:
            try:
                found.tried.append(found.choice(found.streaming))
                return found
            except BudgetError:
                found = found._larger().loosened(only_fitting)
        return found

    def _larger(self) -> Search:
        found = self.within(self.request.memory_bytes)
        larger = pages(int(1.1 * self.needs.least_arena))
        found.needs = replace(self.needs, least_arena=larger, good_arena=max(larger, self.needs.good_arena))
        return found

    @property
    def streaming(self) -> Placement:
        """Nothing near but what must be, and the least arena."""
        always = frozenset(self.job.always)
        return Placement(always, always, self.needs.least_arena, "disk", "nothing")

    @property
    def wall(self) -> int:
        """Bytes of the memory that computes."""
        return self.request.device_bytes or self.request.memory_bytes

    @property
    def room(self) -> int:
        """Bytes of it for the arena and for what may stay near; some are left for what was not foreseen."""
        spare = min(int(SPARE * self.wall), self.wall - self.needs.least)
        return self.wall - self.needs.fixed - spare

    @property
    def host_room(self) -> int:
        """Bytes of a device's host's memory for what may live there; negative where it has too little. 0 where the host
        computes."""
        beside = self.needs.beside
        return 0 if beside is None else int((1 - SPARE) * self.request.memory_bytes) - beside.fixed

    @property
    def fits(self) -> bool:
        """With everything on disk that can be there."""
        return self.least <= self.wall and self.host_room >= 0

    def near_sizes(self, name: str) -> tuple[int, int]:
        """What a weight and its state take near compute."""
        size = self.job.sizes[name]
        if self.bare.device_bytes:
            return size.weight_on_device, size.state_on_device
        return size.bytes, size.state_bytes

    @cached_property
    def used(self) -> Used:
        """What a step needs and changes, wherever it lives."""
        return Used.by(self.rehearsed.asked, homes(self.bare, self.job.always), self.bare.near)

    def moving(self, room: int) -> float:
        """Seconds that the disk takes at least for blocks that come and go with no more room near, where no activations move.
        What lives in the memory of a device's host may be updated there, so that no more is told of it."""
        return self.used.seconds(room + self.host_room, self.ways["disk"])

    @cached_property
    def waiting(self) -> bool:
        """Gradients wait for others of the same step, or for its end."""
        return self.job.hold or self.request.accumulate > 1

    def gradient_bytes(self, taken: Callable[[int], int] = pages) -> int:
        """Of gradients that have blocks of their own: all, where they wait; else those of tables, to which rows are added.
        `taken`: by a block of so many bytes."""
        if self.waiting:
            return gradient_bytes(self.job.sizes, taken)
        created = (event.block for step in self.rehearsed.script.steps for event in step if isinstance(event, Create))
        return sum({b.name: taken(b.nbytes) for b in created if "gradient" in b.bytes_by_kind}.values())

    @cached_property
    def near_gradients(self) -> int:
        """Bytes of those, near compute."""
        return self.gradient_bytes(lasting if self.bare.device_bytes else pages)

    @cached_property
    def twins(self) -> int:
        """Bytes beside the state that a keeper takes, if one is asked for."""
        return keeper_bytes(self.request, self.job.sizes)

    @property
    def everything(self) -> int:
        """Bytes with which nothing needs to stream, beside what is fixed."""
        placed = sum(sum(self.near_sizes(name)) for name in self.job.sizes.keys() - self.job.always)
        return placed + self.near_gradients + (self.needs.least_arena if self.moves else pages(1))

    @property
    def least(self) -> int:
        """The smallest budget with which this works: a keeper is for state that stays near, all of it."""
        if not self.twins:
            return self.needs.least
        return int((self.needs.fixed + self.everything + self.twins) / (1 - SPARE)) + 1

    @property
    def moves(self) -> bool:
        """Activations pass through the arena, or weights that workers gather."""
        return bool(self.job.split) or any(choice.home != NEAR for _, choice in self.bare.activations)

    def candidates(self) -> Iterator[Placement]:
        """Placements that fit, no two alike."""
        if self.everything + self.twins <= self.room:
            names, arena = frozenset(self.job.sizes), self.needs.least_arena if self.moves else pages(1)
            yield Placement(names, names, arena, self.bare.near, "everything", shared=self.twins > 0)
            return
        good, least = self.needs.good_arena, self.needs.least_arena
        tried = [("weights", good), ("weights", 2 * good), ("weights", least), ("states", good), ("states", least)]
        seen = set()
        for order, arena in tried:
            found = self.filled(min(arena, self.room) // self.grain * self.grain, order)
            key = replace(found, filled="")
            if key not in seen:
                seen.add(key)
                yield found

    def filled(self, arena: int, order: str) -> Placement:
        """An arena of this size, and the rest filled with the last units' weights or states first: those are needed
        again soonest."""
        room = self.room - arena
        weights, states = set(self.job.always), set(self.job.always)
        for chosen, what in ((weights, 0), (states, 1)) if order == "weights" else ((states, 1), (weights, 0)):
            for name in reversed(self.job.sizes):
                if name not in self.job.always and (nbytes := self.near_sizes(name)[what]) <= room:
                    chosen.add(name)
                    room -= nbytes
        found = Placement(frozenset(weights), frozenset(states), arena, "disk", order)
        return self._beside(found) if self.bare.device_bytes else found

    def _beside(self, placement: Placement, less: int = 0) -> Placement:
        """With what is not near in the memory of the device's host, as far as that goes, but for so much `less`: first
        weights, which else would pass the disk most often, then gradients that wait, all or none, then states."""
        room, sizes = self.host_room - less, self.job.sizes
        gradients = self.gradient_bytes()
        weights, states = set[str](), set[str]()
        for name, size in reversed(sizes.items()):
            if name not in placement.near_weights and size.bytes <= room:
                weights.add(name)
                room -= size.bytes
        home = "host" if gradients <= room else "disk"
        room -= gradients if home == "host" else 0
        for name, size in reversed(sizes.items()):
            if name not in placement.near_states and size.state_bytes <= room:
                states.add(name)
                room -= size.state_bytes
        return replace(placement, gradient_home=home, host_weights=frozenset(weights), host_states=frozenset(states))

    @property
    def grain(self) -> int:
        """Bytes of which an arena is a multiple."""
        return ROUND if self.bare.device_bytes else PAGE

    def best(self, known: float = inf) -> Choice:
        """The fastest candidate, or the first that waits for hardly anything; one with a tight arena must be clearly the
        fastest. `known`: what another search has found. Raises BudgetError when every arena is too small for what is leased
        at once."""
        problem: BudgetError | None = None
        for placement in self.candidates():
            try:
                self.tried.append(self.choice(placement))
            except BudgetError as error:
                problem = error
            else:
                if self.tried[-1].forecast.hides_all:
                    break
        self.tried = self.tried or self.streamed(only_fitting=True).tried
        if not self.tried:
            raise problem or BudgetError("No placement fits; give more memory.")
        best = self._fastest
        # An exact plan stays exact; and of a pipeline both ends may hold one table, which they must update alike.
        if best.placement.host_states and not best.forecast.hides_all and self.job.blocked and not self.request.legs:
            self._try_host_updates(best.placement, known)
        return self._fastest

    @property
    def _fastest(self) -> Choice:
        return min(self.tried, key=lambda choice: choice.cost)

    def _try_host_updates(self, placement: Placement, known: float) -> None:
        """Let the device's host update all, or a part, of what lives in its memory. Seconds are taken for convex in the part,
        for the more of it the host updates, the longer that takes, and the less passes the link."""
        beside = self.needs.beside
        assert beside is not None
        placement = self._beside(placement, beside.updating)

        def cost_of(part: int) -> float:
            names = self._spread_out(placement.host_states, part / PARTS)
            try:
                self.tried.append(self.choice(replace(placement, host_updates=names)))
            except BudgetError:
                return inf
            return self.tried[-1].cost

        values_about_least(cost_of, self._fastest.cost, PARTS, known)

    def _spread_out(self, names: frozenset[str], part: float) -> frozenset[str]:
        """So much of these states, by bytes, evenly over the model; of those whose update on a host has a price."""
        chosen, taken, passed = set[str](), 0, 0
        for name, size in self.job.sizes.items():
            if name in names and size.state_bytes and size.elementwise:
                passed += size.state_bytes
                if taken + size.state_bytes / 2 <= part * passed:
                    chosen.add(name)
                    taken += size.state_bytes
        return frozenset(chosen)

    def choice(self, placement: Placement) -> Choice:
        """What it comes to. Raises BudgetError as `foretell`."""
        tight = placement.filled != "everything" and placement.arena_bytes < self.needs.good_arena
        return Choice(placement, self.foretell(placement), tight)

    def plan(self, placement: Placement) -> Plan:
        return replace(
            self.bare,
            arena_bytes=placement.arena_bytes,
            near_weights=placement.near_weights,
            near_states=placement.near_states,
            host_weights=placement.host_weights,
            host_states=placement.host_states,
            host_updates=placement.host_updates,
            gradient_home=placement.gradient_home,
            headroom_bytes=(self.needs.beside or self.needs).headroom,
            shared_bytes=self.job.all_bytes if placement.shared else 0,
        )

    def need_room(self, placement: Placement) -> None:
        """Raises BudgetError when leases find no room in the arena; of a long script, too, all units count."""
        plan = self.plan(placement)
        home_of = homes(plan, self.job.always)
        need_room(self.rehearsed.asked, plan.arena_bytes, home_of, plan.near, HostUpdates.of(plan))

    def foretell(self, placement: Placement, closely: bool = False) -> Forecast:
        plan = self.plan(placement)
        home_of = homes(plan, self.job.always)
        on_host = HostUpdates.of(plan)
        found = forecast(self.rehearsed, plan.arena_bytes, home_of, self.ways, closely, plan.near, on_host)
        return with_snapshots(found, self.snapshot(placement), self.commit_every(placement, found), self.ways)

    def snapshot(self, placement: Placement) -> dict[tuple[str, str], int]:
        """Bytes by tier and kind that a commit copies out of memory: of what is at home there, all that a step changes."""
        found: Counter[tuple[str, str]] = Counter()
        plan = self.plan(placement)
        for name, size in self.job.sizes.items():
            home, state_home = plan.home_of(name), plan.home_of_state(name)
            if size.weight.trainable and home != "disk":
                found[home, "weight"] += size.bytes
            if state_home != "disk":
                found.update({(state_home, kind): nbytes for kind, nbytes in size.state_kinds.items()})
        return dict(found)

    def commit_every(self, placement: Placement, found: Forecast) -> int:
        """State on disk is committed by writing it, every step. State in memory is copied out, and how often is what
        bounds the traffic: a small part of what steps move anyway, or else now and then."""
        if self.request.commit_every is not None:
            return self.request.commit_every
        snapshot = sum(self.snapshot(placement).values())
        device = self.bare.device_bytes > 0  # to which most comes over links that no commit takes time of
        moved = sum(nbytes for (*ends, _), nbytes in found.moved.items() if not device or "disk" in ends)
        return max(1, min(-(-SNAPSHOT_SHARE * snapshot // max(moved, 1)), LONGEST_WITHOUT))
