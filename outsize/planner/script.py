"""What a step asks of the store, written down once and played again and again.

A script is everything that passed between the engine and the store in one rehearsed step, with the seconds of compute
between: it does not depend on where blocks live or on how much memory there is, only on the module, the request and
which units recompute. So other placements, arenas and disks are tried by playing it, on the store itself, without torch
running a single operation. And since units of one shape do the same, two of them stand for all (`spread`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from outsize.memory.block import Block
from outsize.memory.clock import Span
from outsize.memory.null import NullTier
from outsize.memory.store import Lease, Store
from outsize.memory.tier import Tier
from outsize.planner.clock import Rates, SimulatedClock, SimulatedTransfers

ENDLESS = 1 << 60
Key = tuple[int, int]


@dataclass(frozen=True)
class Create:
    block: Block
    home: str
    durable: bool


@dataclass(frozen=True)
class Touched:
    """A lease of `name` begins (`take`, `fresh`), is written to (`change`) or ends (`give`, `drop`)."""

    what: str
    name: str


@dataclass(frozen=True)
class Rows:
    """Rows of a table's block were copied out without a lease."""

    name: str
    part: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Spend:
    """Compute or update took so long."""

    lane: str
    seconds: float
    floating_operations: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        operations = self.floating_operations + other.floating_operations
        return Spend(self.lane, self.seconds + other.seconds, operations)


@dataclass(frozen=True)
class Live:
    """A tensor's storage of so many bytes came (positive) or went (negative); `key` tells storages apart."""

    key: Key
    nbytes: int


@dataclass(frozen=True)
class Begin:
    """A phase of the store."""

    phase: str


class Mark(Enum):
    """The phase ended, or a step was complete and may be committed."""

    END = "end"
    COMPLETE = "complete"


Event = Create | Touched | Rows | Spend | Live | Begin | Mark


@dataclass(frozen=True)
class Script:
    """`setup` brings the weights in; `steps` are a run's first ones, of which the last is also every later one."""

    setup: tuple[Event, ...]
    steps: tuple[tuple[Event, ...], ...]

    def step(self, number: int) -> tuple[Event, ...]:
        return self.steps[min(number, len(self.steps) - 1)]

    @property
    def floating_operations(self) -> float:
        """Of one step."""
        return sum(event.floating_operations for event in self.steps[-1] if isinstance(event, Spend))

    @property
    def compute_seconds(self) -> float:
        """Compute and update of one step, if nothing were ever waited for."""
        return sum(event.seconds for event in self.steps[-1] if isinstance(event, Spend))


class Scribe(Store):
    """A store that writes its script. All blocks stay near: where they live is for those who play the script."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[Event] = []
        super().__init__(*args, **kwargs)

    def create(self, block: Block, home: str, durable: bool = True) -> None:
        self.events.append(Create(block, home, durable))
        super().create(block, self.near, durable)

    @contextmanager
    def phase(self, name: str, again: bool = False) -> Iterator[None]:
        self.events.append(Begin(name))
        with super().phase(name, again):
            yield
        self.events.append(Mark.END)

    def lease(self, name: str, fresh: bool = False) -> Lease:
        self.events.append(Touched("fresh" if fresh else "take", name))
        lease = super().lease(name, fresh)
        if fresh:
            self.events.pop()  # the change that belongs to a fresh lease
        return lease

    def _change(self, entry: Any) -> None:
        self.events.append(Touched("change", entry.block.name))
        super()._change(entry)

    def _give(self, entry: Any, touch: Any) -> None:
        self.events.append(Touched(touch.value, entry.block.name))
        super()._give(entry, touch)

    def read_rows(self, name: str, part: str, rows: list[int], out: Any) -> None:
        self.events.append(Rows(name, part, tuple(rows)))
        super().read_rows(name, part, rows, out)

    def spent(self, lane: str, seconds: float, floating_operations: float = 0.0) -> None:
        last = self.events[-1] if self.events else None
        spend = Spend(lane, seconds, floating_operations)
        if isinstance(last, Spend) and last.lane == lane:
            self.events.pop()
            spend = last + spend
        self.events.append(spend)


# -- units that stand for others --------------------------------------------------------------------------------------


def spread(events: Iterable[Event], names: list[str], every: list[str]) -> tuple[Event, ...]:
    """The events of a run over the units called `names`, four of one shape, as they would be over `every`.

    The first and the last stay so; the two between stand in turns for all between. Raises ValueError when the units do
    not pass one after the other."""
    first, one, other, last = range(4)
    middle = [(one if place % 2 else other, place) for place in range(1, len(every) - 1)]
    parts = _by_unit(events, names)
    found: list[Event] = []
    index = 0
    while index < len(parts):
        unit, part = parts[index]
        pair = [parts[index + step][0] if index + step < len(parts) else None for step in range(2)]
        if pair in ([one, other], [other, one]):
            copies = middle if pair == [one, other] else middle[::-1]
            by_unit = {unit: part, parts[index + 1][0]: parts[index + 1][1]}
            for template, place in copies:
                found += _renamed(by_unit[template], names[template], every[place], place)
            index += 2
        elif unit in (one, other):
            raise ValueError("units of one shape do not pass one after the other")
        else:
            place = {first: 0, last: len(every) - 1}.get(unit, -1) if unit is not None else -1
            found += _renamed(part, names[unit], every[place], place) if unit is not None else part
            index += 1
    return tuple(_matched(found))


def _matched(events: list[Event]) -> Iterator[Event]:
    """Let every storage go that came: one may come in one unit and go in another, of which there are as many."""
    alive: dict[int, list[Key]] = {}
    for event in events:
        if isinstance(event, Live):
            keys = alive.setdefault(event.key[0], [])
            if event.nbytes > 0:
                keys.append(event.key)
            elif event.key in keys:
                keys.remove(event.key)
            elif keys:
                event = replace(event, key=keys.pop())
            else:
                continue
        yield event


def _by_unit(events: Iterable[Event], names: list[str]) -> list[tuple[int | None, list[Event]]]:
    """Cut at each event that names a block of another unit than the one before."""
    parts: list[tuple[int | None, list[Event]]] = [(None, [])]
    for event in events:
        name = event.block.name if isinstance(event, Create) else getattr(event, "name", None)
        if name is not None:
            unit = next((index for index, unit in enumerate(names) if f":{unit}." in name), None)
            if unit != parts[-1][0]:
                parts.append((unit, []))
        parts[-1][1].append(event)
    return parts


def _renamed(events: list[Event], old: str, new: str, place: int) -> list[Event]:
    def rename(event: Event) -> Event:
        if isinstance(event, Create):
            return replace(event, block=replace(event.block, name=event.block.name.replace(f":{old}.", f":{new}.")))
        if isinstance(event, Live):
            return replace(event, key=(event.key[0], place))
        if isinstance(event, Touched | Rows):
            return replace(event, name=event.name.replace(f":{old}.", f":{new}."))
        return event

    return [rename(event) for event in events]


# -- playing ----------------------------------------------------------------------------------------------------------


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
class Played:
    """What the steps of a script did under a placement. `moved` is by step, as the ledger counts it: (source,
    destination, kind) -> bytes; `seconds` by step. The rest is of the last step."""

    moved: tuple[Counter[tuple[str, str, str]], ...]
    seconds: tuple[float, ...]
    spans: tuple[Span, ...]
    lanes: dict[str, float]
    """Seconds of compute, update and waiting, and how long the disk read and wrote."""
    waiting: dict[str, float]
    """Seconds in which compute waited, for reads and for writes."""
    accesses: tuple[tuple[str, str], ...]
    disk_bytes: int
    held: dict[tuple[str, str], int]
    live: tuple[tuple[float, int], ...] = field(repr=False, default=())
    """(seconds, bytes of tensors alive from then on)."""


HomeOf = Callable[[str], str]
"""From a block's name to the tier that is its home."""


def play(
    script: Script, arena_bytes: int, home_of: HomeOf, rates: Rates, steps: int = 3, commit_every: int | None = None
) -> Played:
    """Play a run of `steps` steps; after the last nothing follows. Without `commit_every` nothing is committed.

    Raises BudgetError where the run itself would: when leases leave no room in the arena."""
    clock = SimulatedClock(rates)
    tiers: dict[str, Tier] = {"host": NullTier("host", ENDLESS), "disk": NullTier("disk", ENDLESS)}
    empty: Any = Nothing
    transfers: Any = SimulatedTransfers(clock)
    player = _Player(_Bare(tiers, arena_bytes, empty, transfers), clock, home_of, commit_every)
    player.run(script.setup)
    player.store.flush()
    moved, seconds = [], []
    for number in range(steps):
        last = number + 1 == steps
        before, waited = Counter(player.store.ledger.moved), dict(player.store.waiting_seconds)
        started, spent = clock.time, dict(clock.seconds)
        clock.spans.clear()
        player.accesses.clear()
        player.forget_live()
        player.again = not last
        player.run(script.step(number))
        moved.append(player.store.ledger.moved - before)
        seconds.append(clock.time - started)
    return Played(
        tuple(moved),
        tuple(seconds),
        tuple((lane, max(start - started, 0.0), end - started) for lane, start, end in clock.spans),
        {lane: total - spent.get(lane, 0.0) for lane, total in clock.seconds.items()},
        {name: total - waited[name] for name, total in player.store.waiting_seconds.items()},
        tuple(player.accesses),
        player.store.tiers["disk"].used,
        dict(player.store.ledger.held),
        tuple((time - started, nbytes) for time, nbytes in player.live),
    )


class _Player:
    def __init__(self, store: Store, clock: SimulatedClock, home_of: HomeOf, commit_every: int | None) -> None:
        self.store, self.clock, self.home_of, self.commit_every = store, clock, home_of, commit_every
        self.accesses: list[tuple[str, str]] = []
        self.live: list[tuple[float, int]] = []
        self._live = self._steps = 0
        self._lane, self._due = "compute", 0.0
        self._leases: dict[str, list[Lease]] = {}
        self._act: dict[type, Callable[[Any], None]] = {
            Create: self._create,
            Touched: self._touch,
            Rows: self._rows,
            Spend: self._spend,
            Begin: self._begin,
            Mark: self._mark,
        }
        self.again = False
        self._phase: Any = None

    def run(self, events: Iterable[Event]) -> None:
        """Stretches of one lane between two events of the store are one: time passes only where somebody may look."""
        for event in events:
            if isinstance(event, Spend) and event.lane == self._lane:
                self._due += event.seconds
            elif isinstance(event, Live):
                self._live += event.nbytes
                self.live.append((self.clock.time + self._due, self._live))
            else:
                self._pass_time()
                self._act[type(event)](event)
        self._pass_time()

    def forget_live(self) -> None:
        """Another step begins, with tensors of its own."""
        self._live = 0
        self.live.clear()

    def _spend(self, event: Spend) -> None:
        self._lane, self._due = event.lane, event.seconds

    def _pass_time(self) -> None:
        if self._due:
            self.clock.spend(self._lane, self._due)
            self._due = 0.0

    def _create(self, event: Create) -> None:
        if event.block.name not in self.store.entries:  # a gradient's block outlives the step that made it
            self.store.create(event.block, self.home_of(event.block.name), event.durable)

    def _touch(self, event: Touched) -> None:
        leases = self._leases.setdefault(event.name, [])
        if event.what in ("take", "fresh"):
            self.accesses.append((event.what, event.name))
            leases.append(self.store.lease(event.name, event.what == "fresh"))
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
        self._phase = self.store.phase(event.phase, self.again)
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

    def _copy_rows(self, place: Any, storage: Any, rows: list[int], out: Any) -> None:
        pass
