"""What a step asks of the store, written down once and played again and again.

A script is everything that passed between the engine and the store in one rehearsed step, with the seconds of compute
between: it does not depend on where blocks live or on how much memory there is, only on the module, the request and
which units recompute. So other placements, arenas and disks are tried by playing it (`outsize.planner.play`), without
torch running a single operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from outsize.memory.block import Block
from outsize.memory.store import Lease, Store
from outsize.plan import Plan

ENDLESS = 1 << 60
Key = tuple[int, int]
HomeOf = Callable[[str], str]
"""From a block's name to the tier that is its home."""


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
    """Compute or update took so long; and `beside` more while blocks stream."""

    lane: str
    seconds: float
    floating_operations: float = 0.0
    beside: float = 0.0

    def __add__(self, other: Spend) -> Spend:
        operations = self.floating_operations + other.floating_operations
        return Spend(self.lane, self.seconds + other.seconds, operations, self.beside + other.beside)


@dataclass(frozen=True)
class Stepped:
    """The update of a chunk, whose state is the block `name`, took as `here` says on the device. On its host it would take
    `there` seconds, and so many bytes of gradient and of weight, which belong to the block `weight`, pass the link."""

    name: str
    weight: str
    here: Spend
    there: float
    gradient_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Exchanged:
    """Bytes of a kind went to other workers and came from them, over the links to `tier`, which took so long, and
    `busy` of a core. The step waited for it; or, of what comes `ahead`, did not yet."""

    tier: str
    kind: str
    sent: int
    received: int
    seconds: float
    busy: float = 0.0
    ahead: bool = False


@dataclass(frozen=True)
class Awaited:
    """The step waits for the first so many of the exchanges that went ahead."""

    count: int


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


Event = Create | Touched | Rows | Spend | Stepped | Exchanged | Awaited | Live | Begin | Mark


@dataclass(frozen=True)
class HostUpdates:
    """Weights that are updated on a device's host, by a worker `alone` or by one of several."""

    names: frozenset[str] = frozenset()
    alone: bool = True

    @classmethod
    def of(cls, plan: Plan) -> HostUpdates:
        return cls(plan.host_updates, plan.sharers == 1)

    def have(self, block: str) -> bool:
        """It is of such a weight, or of its state."""
        weight = block.partition(":")[2].split("@")[0]
        return bool(self.names) and not self.names.isdisjoint((weight, weight.rpartition(":")[0]))

    def keep(self, block: str) -> bool:
        """It is state that is leased there."""
        return block.startswith("state:") and self.have(block)

    def change_both(self, block: str) -> bool:
        """It is changed near and, if it lives there, also there."""
        return self.alone and block.startswith("weight:") and self.have(block)


NO_HOST_UPDATES = HostUpdates()


@dataclass(frozen=True)
class Script:
    """`setup` brings the weights in; `steps` are a run's first ones, of which the last is also every later one."""

    setup: tuple[Event, ...]
    steps: tuple[tuple[Event, ...], ...]

    def step(self, number: int) -> tuple[Event, ...]:
        return self.steps[min(number, len(self.steps) - 1)]

    @cached_property
    def lean(self) -> Script:
        """Without the tensors that come and go."""
        return Script(_lean(self.setup), tuple(_lean(step) for step in self.steps))

    @cached_property
    def bare(self) -> Script:
        """What asks something of the store, without what takes time and what tensors come and go."""
        return Script(_bare(self.setup), tuple(map(_bare, self.steps)))

    @cached_property
    def work(self) -> float:
        """Seconds of compute, update and exchange of one step, which no placement makes shorter; but for what comes ahead."""
        spent = (event for event in self.steps[-1] if isinstance(event, Spend | Exchanged))
        stepped = (event for event in self.steps[-1] if isinstance(event, Stepped))
        work = sum(event.seconds for event in spent if isinstance(event, Spend) or not event.ahead)
        return work + sum(min(event.here.seconds, event.there) for event in stepped)

    @cached_property
    def floating_operations(self) -> float:
        """Of one step."""
        return sum(event.floating_operations for event in self.steps[-1] if isinstance(event, Spend))


def _lean(events: Iterable[Event]) -> tuple[Event, ...]:
    """Stretches of one lane, between which nothing is left, are one."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, Spend) and found and isinstance(found[-1], Spend) and found[-1].lane == event.lane:
            found[-1] = found[-1] + event
        elif not isinstance(event, Live):
            found.append(event)
    return tuple(found)


def _bare(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(event for event in events if not isinstance(event, Spend | Stepped | Exchanged | Awaited | Live))


class Scribe(Store):
    """A store that writes its script. All blocks stay near: where they live is for those who play the script."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[Event] = []
        super().__init__(*args, **kwargs)

    def create(self, block: Block, home: str, durable: bool = True, stays: bool = False) -> None:
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

    def alias(self, lease: Lease) -> Any:
        return self._allocate_near(lease.bytes.numel())

    def _change(self, entry: Any) -> None:
        self.events.append(Touched("change", entry.block.name))
        super()._change(entry)

    def _give(self, entry: Any, touch: Any) -> None:
        self.events.append(Touched(touch.value, entry.block.name))
        super()._give(entry, touch)

    def read_rows(self, name: str, part: str, rows: list[int], out: Any) -> None:
        self.events.append(Rows(name, part, tuple(rows)))
        super().read_rows(name, part, rows, out)

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def spent(self, lane: str, seconds: float, floating_operations: float = 0.0, beside: float = 0.0) -> None:
        last = self.events[-1] if self.events else None
        spend = Spend(lane, seconds, floating_operations, beside)
        if isinstance(last, Spend) and last.lane == lane:
            self.events.pop()
            spend = last + spend
        self.events.append(spend)
