"""Which weights and states stay near, and how much memory is left for what streams: the fastest that fits.

Each candidate is played under the simulated clock. They differ in the size of the arena, in steps between what is just
enough and all that is left, and in what the rest is filled with: weights are read two or three times a step and written
once, state is read and written once, so by bytes saved for each byte held weights come first; but what compute hides
costs nothing, and only playing tells what is hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from outsize.asked import Request
from outsize.distributed.arrangement import WIRE
from outsize.distributed.wire import NO_WIRE, Wire
from outsize.errors import BudgetError
from outsize.memory.tier import PAGE, pages
from outsize.plan import NEAR, SPARE, Activations, Plan, Predicted
from outsize.planner.clock import Ways
from outsize.planner.forecast import Forecast, forecast, with_snapshots
from outsize.planner.keeper import keeper_bytes, twin_bytes
from outsize.planner.needs import KEPT, PINNED, TENSORS, Needs, gradient_bytes
from outsize.planner.rehearsal import Rehearsed, homes
from outsize.planner.room import need_room
from outsize.planner.script import Create
from outsize.planner.sizes_of import WeightSize

SNAPSHOT_SHARE = 8  # of what a step moves, snapshots of state in memory may add one part in so many
LONGEST_WITHOUT = 50  # steps between snapshots, at most
TIGHT = 0.05  # by so much a small arena must be faster: where the disk is not as measured it loses more, docs/log.md


@dataclass(frozen=True)
class JobSizes:
    """What a job is made of, whatever is decided. `hold`: gradients wait for the step's end. `ahead`: bytes of split weights
    that are gathered before they are needed."""

    sizes: dict[str, WeightSize]
    rows: dict[str, int]
    blocked: bool
    always: set[str]
    hold: bool
    split: frozenset[str] = frozenset()
    copies: int = 1
    ahead: int = 0

    @cached_property
    def everything(self) -> int:
        """Bytes of all weights and states that need not be near, and of their gradients if these wait."""
        held = gradient_bytes(self.sizes) if self.hold else 0
        return held + sum(s.bytes + s.state_bytes for name, s in self.sizes.items() if name not in self.always)

    @cached_property
    def all_bytes(self) -> int:
        """Of all blocks."""
        return sum(size.bytes + size.state_bytes for size in self.sizes.values())

    def plan(self, request: Request, activations: tuple[tuple[str, Activations], ...]) -> Plan:
        """All that is settled before anything is placed."""
        return Plan(
            precision=request.precision,
            arena_bytes=0,
            activations=activations,
            table_rows=tuple(self.rows.items()),
            blocked_loss=self.blocked,
            accumulate=request.accumulate,
            hold=self.hold,
            clip=request.clip,
            moments=request.moments,
            workers=request.workers,
            nodes=request.nodes,
            zero=request.zero,
            split_weights=self.split,
            weight_copies=self.copies,
            gather_ahead_bytes=self.ahead,
            sequences=request.sequences,
            shares=request.shares or (),
            rank=request.rank,
            legs=request.legs,
            legs_shape=request.legs_shape,
            schedule=request.schedule,
            memory_bytes=request.memory_bytes,
        )


@dataclass(frozen=True)
class Placement:
    """What is near, and how much is left for what is not; `filled` says what the rest was filled with first."""

    near_weights: frozenset[str]
    near_states: frozenset[str]
    arena_bytes: int
    gradient_home: str
    filled: str
    shared: bool = False
    """All blocks lie in memory that outlives the process, each with a twin."""


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

    def loosened(self) -> Search:
        """With the least arena as large as a step needs in which everything streams: between leases of several sizes, which
        end in another order than they begin, there are gaps that no block fits. That placement is tried, then."""
        found, always = self.within(self.request.memory_bytes), frozenset(self.job.always)
        while True:
            least = found.needs.least_arena
            placement = Placement(always, always, least, "disk", "nothing")
            try:
                found.need_room(placement)
                found.tried.append(found.choice(placement))
                return found
            except BudgetError:
                larger = pages(int(1.1 * least))
                good = max(larger, found.needs.good_arena)
                found.needs = replace(found.needs, least_arena=larger, good_arena=good)

    @property
    def room(self) -> int:
        """Bytes for the arena and for what may stay near; some are left for what was not foreseen."""
        spare = min(int(SPARE * self.request.memory_bytes), self.request.memory_bytes - self.needs.least)
        return self.request.memory_bytes - self.needs.fixed - spare

    @cached_property
    def twins(self) -> int:
        """Bytes beside the state that a keeper takes, if one is asked for."""
        return keeper_bytes(self.request, self.job.sizes)

    @property
    def everything(self) -> int:
        """Bytes with which nothing needs to stream, beside what is fixed."""
        gradients = gradient_bytes(self.job.sizes) if self.request.accumulate > 1 and not self.job.hold else 0
        return self.job.everything + gradients + (self.needs.least_arena if self.moves else pages(1))

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
            yield Placement(names, names, arena, "host", "everything", shared=self.twins > 0)
            return
        good, least = self.needs.good_arena, self.needs.least_arena
        tried = [("weights", good), ("weights", 2 * good), ("weights", least), ("states", good), ("states", least)]
        seen = set()
        for order, arena in tried:
            found = self.filled(min(arena, self.room) // PAGE * PAGE, order)
            key = replace(found, filled="")
            if key not in seen:
                seen.add(key)
                yield found

    def filled(self, arena: int, order: str) -> Placement:
        """An arena of this size, and the rest filled with the last units' weights or states first: those are needed
        again soonest."""
        room = self.room - arena
        weights, states = set(self.job.always), set(self.job.always)
        fills = [(weights, "bytes"), (states, "state_bytes")]
        for chosen, what in fills if order == "weights" else fills[::-1]:
            for name, size in reversed(self.job.sizes.items()):
                if name not in self.job.always and getattr(size, what) <= room:
                    chosen.add(name)
                    room -= getattr(size, what)
        return Placement(frozenset(weights), frozenset(states), arena, "disk", order)

    def best(self) -> Choice:
        """The fastest candidate, or the first that waits for hardly anything; one with a tight arena must be clearly the
        fastest. Raises BudgetError when every arena is too small for what is leased at once."""
        problem: BudgetError | None = None
        for placement in self.candidates():
            try:
                self.tried.append(self.choice(placement))
            except BudgetError as error:
                problem = error
            else:
                if self.tried[-1].forecast.hides_all:
                    break
        if not self.tried:
            raise problem or BudgetError("No placement fits; give more memory.")
        return min(self.tried, key=lambda choice: choice.cost)

    def choice(self, placement: Placement) -> Choice:
        """What it comes to. Raises BudgetError as `foretell`."""
        good = min(self.needs.good_arena, self.room) // PAGE * PAGE
        tight = placement.filled != "everything" and placement.arena_bytes < good
        return Choice(placement, self.foretell(placement), tight)

    def plan(self, placement: Placement) -> Plan:
        return replace(
            self.bare,
            arena_bytes=placement.arena_bytes,
            near_weights=placement.near_weights,
            near_states=placement.near_states,
            gradient_home=placement.gradient_home,
            headroom_bytes=self.needs.headroom,
            shared_bytes=self.job.all_bytes if placement.shared else 0,
        )

    def need_room(self, placement: Placement) -> None:
        """Raises BudgetError when leases find no room in the arena; of a long script, too, all units count."""
        plan = self.plan(placement)
        need_room(self.rehearsed.asked, plan.arena_bytes, homes(plan, self.job.always))

    def foretell(self, placement: Placement, closely: bool = False) -> Forecast:
        plan = self.plan(placement)
        home_of = homes(plan, self.job.always)
        found = forecast(self.rehearsed, plan.arena_bytes, home_of, self.ways, closely)
        return with_snapshots(found, self.snapshot(placement), self.commit_every(placement, found), self.ways)

    def snapshot(self, placement: Placement) -> dict[str, int]:
        """Bytes by kind that a commit copies out of memory: of what stays near, all that a step changes."""
        found: Counter[str] = Counter()
        for name, size in self.job.sizes.items():
            if size.weight.trainable and name in placement.near_weights:
                found["weight"] += size.bytes
            if name in placement.near_states:
                found += Counter(size.state_kinds)
        return dict(found)

    def commit_every(self, placement: Placement, found: Forecast) -> int:
        """State on disk is committed by writing it, every step. State in memory is copied out, and how often is what
        bounds the traffic: a small part of what steps move anyway, or else now and then."""
        if self.request.commit_every is not None:
            return self.request.commit_every
        snapshot, moved = sum(self.snapshot(placement).values()), sum(found.moved.values())
        return max(1, min(-(-SNAPSHOT_SHARE * snapshot // max(moved, 1)), LONGEST_WITHOUT))

    # -- the plan ---------------------------------------------------------------------------------------------------

    def near_bytes(self, placement: Placement) -> int:
        sizes = self.job.sizes
        near = sum(sizes[n].bytes for n in placement.near_weights) + sum(
            sizes[n].state_bytes for n in placement.near_states
        )
        waiting = self.job.hold or self.request.accumulate > 1
        return near + (gradient_bytes(sizes) if waiting and placement.gradient_home == "host" else 0)

    def disk_bytes(self, placement: Placement, found: Forecast) -> int:
        """Two extents of every weight and state, and one of whatever else waits there."""
        sizes = self.job.sizes
        disk = sum(2 * (size.bytes + size.state_bytes) for size in sizes.values())
        disk += sum(n for (_, target, kind), n in found.moved.items() if (target, kind) == ("disk", "activation"))
        if placement.gradient_home == "host":
            return disk
        if self.job.hold or self.request.accumulate > 1:
            return disk + gradient_bytes(sizes)
        created = [event.block for step in self.rehearsed.script.steps for event in step if isinstance(event, Create)]
        return disk + sum({block.name: block.nbytes for block in created if "gradient" in block.bytes_by_kind}.values())

    def _memory(self, placement: Placement) -> tuple[tuple[str, int], ...]:
        causes = self._causes(placement)
        left = self.request.memory_bytes - sum(nbytes for _, nbytes in causes) - self.needs.headroom
        kept = min(PINNED, left - int(SPARE * self.request.memory_bytes))
        return (*causes, *(((KEPT, kept),) * (kept > 0)))

    def _causes(self, placement: Placement) -> tuple[tuple[str, int], ...]:
        return (
            ("Python, libraries and the process as it stands", self.needs.baseline),
            ("weights, state and gradients that stay near", self.near_bytes(placement)),
            ("the arena for what streams", placement.arena_bytes),
            (TENSORS, self.needs.tensors),
            ("buffers of update and transfers", self.needs.scratch),
            *(
                (("a second copy of what changes, and the process that keeps it", twin_bytes(self.job.sizes)),)
                * placement.shared
            ),
        )

    def predicted(self, choice: Choice) -> Predicted:
        found, memory = choice.forecast, self._memory(choice.placement)
        request = self.request
        tokens = (sum(request.sequences) or request.batch_size * request.accumulate) * request.sequence_length
        read = sum(nbytes for (source, _, _), nbytes in found.moved.items() if source == "disk")
        written = sum(nbytes for (_, target, _), nbytes in found.moved.items() if target == "disk")
        disk = self.disk_bytes(choice.placement, found)
        return Predicted(
            host_peak_bytes=sum(nbytes for _, nbytes in memory),
            device_peak_bytes=0,
            bytes_read=read,
            bytes_written=written,
            disk_bytes=disk,
            seconds_per_step=found.seconds,
            tokens_per_second=tokens / found.seconds,
            compute_seconds=found.lanes.get("compute", 0.0),
            update_seconds=found.lanes.get("update", 0.0),
            read_wait_seconds=found.waiting["read"],
            write_wait_seconds=found.waiting["write"],
            wire_wait_seconds=found.lanes.get("wire", 0.0),
            wire_bytes=sum(nbytes for (source, _, _), nbytes in found.moved.items() if source in WIRE),
            floating_operations=found.floating_operations,
            moved=tuple((*ways, nbytes) for ways, nbytes in sorted(found.moved.items())),
            memory=memory,
            timeline=found.step.spans,
            tensors=thinned(found.step.live),
        )


def thinned(live: tuple[tuple[float, int], ...], points: int = 500) -> tuple[tuple[float, int], ...]:
    """The highest of each of so many runs of (time, bytes)."""
    width = max(1, len(live) // points)
    return tuple(max(live[start : start + width], key=lambda point: point[1]) for start in range(0, len(live), width))
