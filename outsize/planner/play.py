"""A script played from any placement: the real store, on tiers that hold nothing, under a clock that only events move."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from outsize.memory.clock import Span
from outsize.memory.entry import Residency
from outsize.memory.foresight import Touch
from outsize.memory.null import NullTier
from outsize.memory.store import Lease, Store
from outsize.memory.tier import Tier
from outsize.planner.clock import SimulatedClock, SimulatedTicket, SimulatedTransfers, Ways
from outsize.planner.script import (
    ENDLESS,
    NO_HOST_UPDATES,
    Awaited,
    Begin,
    Create,
    Event,
    Exchanged,
    HomeOf,
    HostUpdates,
    Live,
    Mark,
    Rows,
    Script,
    Spend,
    Stepped,
    Touched,
)
from outsize.planner.thrashed import THRASHING


class Nothing:
    """Stands for memory of which only the size matters."""

    is_cuda = False

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def numel(self) -> int:
        return self._nbytes

    def __getitem__(self, span: slice) -> Nothing:
        return Nothing((self._nbytes if span.stop is None else span.stop) - (span.start or 0))

    def view(self, *_: Any) -> Nothing:
        return self

    def zero_(self) -> None: ...


@dataclass(frozen=True)
class PlayedStep:
    """What one step did. `moved` is as the ledger counts it: (source, destination, kind) -> bytes."""

    moved: Counter[tuple[str, str, str]]
    began: float
    seconds: float
    lanes: dict[str, float]
    """Seconds of compute, update, wire (which is waited for) and waiting, and how long the disk read and wrote, and how long
    workers exchanged meanwhile."""
    waiting: dict[str, float]
    """Seconds in which compute waited, for reads and for writes."""
    accesses: tuple[tuple[str, str], ...] = field(repr=False)
    live: tuple[tuple[float, int], ...] = field(repr=False)
    """(seconds, bytes of tensors alive from then on)."""
    noted: list[Span] = field(repr=False)
    """By the clock, in its seconds: of this step alone."""

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple((lane, max(start - self.began, 0.0), end - self.began) for lane, start, end in self.noted)


@dataclass(frozen=True)
class Played:
    """What the steps of a script did under a placement, and how much of the disk is taken at their end."""

    steps: tuple[PlayedStep, ...]
    disk_bytes: int

    @property
    def moved(self) -> Counter[tuple[str, str, str]]:
        """By all steps together."""
        return sum((step.moved for step in self.steps), Counter())


def play(
    script: Script,
    arena_bytes: int,
    home_of: HomeOf,
    ways: Ways,
    steps: int = 3,
    commit_every: int | None = None,
    near: str = "host",
    on_host: HostUpdates = NO_HOST_UPDATES,
    foretold: bool = False,
) -> Played:
    """Play a run of `steps` steps on the tier `near`, with updates `on_host`; after the last nothing follows. Without
    `commit_every` nothing is committed. `foretold`: nothing is recorded; from the first on all steps are like a later one,
    and their leases known.

    Raises BudgetError where the run itself would, in these steps or any later one: when leases leave no room in the
    arena."""
    clock = SimulatedClock(ways)
    tiers: dict[str, Tier] = {name: NullTier(name, ENDLESS) for name in {near, "host", "disk"}}
    empty: Any = Nothing
    transfers: Any = SimulatedTransfers(clock)
    player = _Player(_Bare(tiers, arena_bytes, empty, transfers, near), clock, home_of, commit_every, on_host)
    player.run(script.setup)
    player.store.flush()
    if foretold:
        player.foretell(script)
    first = len(script.steps) - 1 if foretold else 0
    played = tuple(player.step(script.step(first + number), again=number + 1 < steps) for number in range(steps))
    for phase in {event.phase for event in script.steps[-1] if isinstance(event, Begin)}:
        player.store.need_room(phase)
    return Played(played, player.store.tiers["disk"].used)


class _Player:
    def __init__(
        self,
        store: _Bare,
        clock: SimulatedClock,
        home_of: HomeOf,
        commit_every: int | None,
        on_host: HostUpdates,
    ) -> None:
        self.store, self.clock, self.home_of, self.commit_every = store, clock, home_of, commit_every
        self.on_host = on_host
        self._both: set[str] = set()  # weights that are changed at home, too
        self.accesses: list[tuple[str, str]] = []
        self.live: list[tuple[float, int]] = []
        self._live = self._steps = 0
        self._lane, self._due = "compute", 0.0
        self._streaming = 0.0  # how much of what the caches held is gone by what streams through them
        self._leases: dict[str, list[Lease]] = {}
        self._ahead: deque[SimulatedTicket] = deque()  # exchanges that were begun, and not waited for yet
        self._act: dict[type, Callable[[Any], None]] = {
            Create: self._create,
            Touched: self._touch,
            Rows: self._rows,
            Spend: self._spend,
            Stepped: self._step,
            Exchanged: self._exchange,
            Awaited: self._await,
            Begin: self._begin,
            Mark: self._mark,
        }
        self._again = False
        self._phase: Any = None

    def foretell(self, script: Script) -> None:
        """The store is told in which order a step will lease blocks, all of which are there from now on. What streams then
        streamed before it."""
        for event in chain(*script.steps):
            if isinstance(event, Create):
                self._create(event)
        traces: dict[str, list[tuple[Touch, str]]] = {}
        for event in script.steps[-1]:
            if isinstance(event, Begin):
                trace = traces.setdefault(event.phase, [])
            elif isinstance(event, Touched) and event.what != "change" and self.store.streams(event.name):
                trace.append((Touch(event.what), event.name))
        for phase, trace in traces.items():
            self.store.foretell(phase, trace)
        entries = [self.store.entries[name] for name in {name for trace in traces.values() for _, name in trace}]
        self._thrash(sum(entry.block.nbytes for entry in entries if entry.home.name == "disk"))

    def _thrash(self, nbytes: int) -> None:
        """So many bytes passed the caches in a step."""
        self._streaming = min(nbytes / THRASHING, 1.0)

    def step(self, events: Iterable[Event], again: bool) -> PlayedStep:
        """`again`: another follows at once."""
        store, clock = self.store, self.clock
        clock.forget_spans()
        moved, waited, spent = Counter(store.ledger.moved), dict(store.waiting_seconds), dict(clock.seconds)
        self.accesses.clear()
        self.live.clear()
        self._live, self._again, started = 0, again, clock.time
        self.run(events)
        clock.settle()
        moved = store.ledger.moved - moved
        self._thrash(sum(nbytes for (*ways, _), nbytes in moved.items() if "disk" in ways))
        return PlayedStep(
            moved=moved,
            began=started,
            seconds=clock.time - started,
            lanes={lane: total - spent.get(lane, 0.0) for lane, total in clock.seconds.items()},
            waiting={name: total - waited[name] for name, total in store.waiting_seconds.items()},
            accesses=tuple(self.accesses),
            live=tuple((time - started, nbytes) for time, nbytes in self.live),
            noted=clock.spans,
        )

    def run(self, events: Iterable[Event]) -> None:
        """Stretches of one lane between two events of the store are one: time passes only where somebody may look."""
        for event in events:
            if isinstance(event, Spend) and event.lane == self._lane:
                self._due += self._takes(event)
            elif isinstance(event, Live):
                self._live += event.nbytes
                self.live.append((self.clock.time + self._due, self._live))
            else:
                self._pass_time()
                self._act[type(event)](event)
        self._pass_time()

    def _spend(self, event: Spend) -> None:
        self._lane, self._due = event.lane, self._takes(event)

    def _step(self, event: Stepped) -> None:
        if not self.on_host.have(event.name):
            self._spend(event.here)
            return
        if event.weight not in self._both:
            self._carry("write", "weight", event.weight_bytes)
        self._carry("write", "gradient", event.gradient_bytes)
        self.clock.spend("update", event.there)
        self._carry("read", "weight", event.weight_bytes)

    def _carry(self, direction: str, kind: str, nbytes: int) -> None:
        """Between the memory that computes and its host's, while the update waits."""
        near = self.store.near
        self.store.ledger.move(*(("host", near) if direction == "read" else (near, "host")), {kind: nbytes})
        self.clock.carry("update", "host", direction, nbytes)

    def _takes(self, event: Spend) -> float:
        return event.seconds + self._streaming * event.beside

    def _exchange(self, event: Exchanged) -> None:
        self.store.ledger.move(self.store.near, event.tier, {event.kind: event.sent})
        self.store.ledger.move(event.tier, self.store.near, {event.kind: event.received})
        ticket = self.clock.exchange(event.seconds, event.ahead, event.busy)
        if event.ahead:
            self._ahead.append(ticket)
        else:
            self.clock.finish(ticket)

    def _await(self, event: Awaited) -> None:
        for _ in range(event.count):
            self.clock.finish(self._ahead.popleft())

    def _pass_time(self) -> None:
        if self._due:
            self.clock.spend(self._lane, self._due)
            self._due = 0.0

    def _create(self, event: Create) -> None:
        if event.block.name not in self.store.entries:  # a gradient's block outlives the step that made it
            name = event.block.name
            self.store.create(event.block, self.home_of(name), event.durable, self.on_host.keep(name))

    def _touch(self, event: Touched) -> None:
        leases = self._leases.setdefault(event.name, [])
        if event.what in ("take", "fresh"):
            self.accesses.append((event.what, event.name))
            leases.append(self.store.lease(event.name, event.what == "fresh"))
        elif event.what == "change" and self.on_host.change_both(event.name):
            changed = self._both.discard if leases[-1].change_both() is None else self._both.add
            changed(event.name)
        elif event.what == "change":
            leases[-1].change()
        else:
            self.accesses.append((event.what, event.name))
            lease = leases.pop()
            lease.drop() if event.what == "drop" else lease.release()

    def _rows(self, event: Rows) -> None:
        part = self.store.entries[event.name].block.part(event.part)
        out: Any = Nothing(len(event.rows) * (part.nbytes // part.shape[0]))
        self.store.read_rows(event.name, event.part, list(event.rows), out)

    def _begin(self, event: Begin) -> None:
        self._phase = self.store.phase(event.phase, self._again)
        self._phase.__enter__()

    def _mark(self, event: Mark) -> None:
        if event is Mark.END:
            self._phase.__exit__(None, None, None)
        else:
            self._steps += 1
            if self.commit_every and self._steps % self.commit_every == 0:
                self.store.commit(lambda slots: None)


class _Bare(Store):
    """A store over nothing."""

    def streams(self, name: str) -> bool:
        """The block comes near when it is leased, and goes."""
        return self.entries[name].residency is not Residency.STAYING

    def foretell(self, phase: str, trace: list[tuple[Touch, str]]) -> None:
        """Blocks of which nobody wrote anything yet come as if somebody had."""
        self._arena.foresight.foretell(phase, trace)
        for entry in (self.entries[name] for _, name in trace):
            if entry.residency is Residency.EMPTY:
                entry.residency, entry.written = Residency.FAR, True

    def _copy_rows(self, place: Any, storage: Any, rows: list[int], out: Any) -> None:
        pass
