"""Time that passes only when somebody says so: transfers are events, compute advances the clock by its price.

Transfers run as in `outsize.memory.transfer`: some readers share one queue of pieces, one writer keeps the order of
writes. What moves at once shares the way: each direction has its bandwidth, and both together their limit. So do exchanges
with other workers, of which one waits for those that come ahead no longer than it shares the wire with them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch

from outsize.machine.machine import Machine
from outsize.memory.clock import Clock, Span
from outsize.memory.tier import Extent, Tier
from outsize.memory.transfer import PIECE, Then


@dataclass(frozen=True)
class Rates:
    """Bytes a second between a tier and the memory near compute, alone and (`both`) when it reads and writes at once."""

    read: float
    write: float
    both: float
    latency: float
    flush: float = 0.02
    """Seconds until what was written is durable."""
    reading: float = 0.0
    writing: float = 0.0
    """Seconds that a byte takes of a core that computes."""
    handling: float = 0.0
    """And a transfer, however small."""

    @classmethod
    def between(cls, machine: Machine, tier: str, near: str) -> Rates:
        """Those of the direct links of a machine."""
        read, write = machine.link(tier, near), machine.link(near, tier)
        shared = read.shared if read.shared == write.shared else None
        both = machine.limit(shared) if shared is not None else read.bytes_per_second + write.bytes_per_second
        rates = cls(read.bytes_per_second, write.bytes_per_second, both, max(read.latency, write.latency))
        if machine.compute.tier != "host":
            return rates
        reading, writing = (
            0.0 if link.bytes_per_core_second is None else 1 / link.bytes_per_core_second for link in (read, write)
        )
        return replace(rates, reading=reading, writing=writing, handling=HANDLING * machine.compute.operation_seconds)


HANDLING = 45  # small operations that take as long as leasing and releasing a block and carrying it once (docs/log.md)
WIRE, AHEAD = "wire", "exchange"  # lanes: an exchange that the step waits for, and one meanwhile
HALF = 0.5  # of a core, which a thread has beside another
_end = attrgetter("end")
Ways = Mapping[str, Rates]
"""From each tier other than the one that computes."""


def ways_of(machine: Machine, workers: int = 1) -> Ways:
    """How bytes get to where the machine computes, and back, when so many workers share it. To a device they come from its
    host's memory over its own link, all of which may have a limit; and from disk through a buffer there, piece by piece,
    as fast as the slower of both ways lets them."""
    disk = Rates.between(machine, "disk", "host")
    disk = replace(disk, read=disk.read / workers, write=disk.write / workers, both=disk.both / workers)
    if machine.compute.tier == "host":
        return {"disk": disk}
    host = Rates.between(machine, "host", "device")
    if machine.link("host", "device").shared is not None:
        both = host.both / workers
        host = replace(host, read=min(host.read, both), write=min(host.write, both), both=both)
    slower = {name: min(getattr(disk, name), getattr(host, name)) for name in ("read", "write", "both")}
    return {"host": host, "disk": replace(disk, **slower, latency=disk.latency + host.latency)}


@dataclass(eq=False, slots=True)
class Transfer:
    """A piece on its way: seconds of latency, bytes, and seconds of a `core` that it takes, all as they were still to go when
    the clock was last settled."""

    tier: str
    direction: str
    left: float
    latency: float
    finish: Callable[[], None]
    core: float = 0.0
    rate: float = 0.0
    slower: float = 1.0
    """Than it would be, as it wants more of a core than it gets."""
    carried: bool = False
    """By the step itself, not by a thread for transfers."""
    end: float = 0.0
    """When it will be there, if nothing else comes or goes."""

    @property
    def seconds(self) -> float:
        """That it would take yet: no less than of a core."""
        return max(self.latency + self.left / self.rate, self.core)

    @property
    def wanted(self) -> float:
        """Of a core, meanwhile."""
        return self.core / self.seconds if self.core > 0 else 0.0

    def go_on(self, seconds: float) -> None:
        """For so long."""
        self.core = max(self.core - self.wanted * seconds / self.slower, 0.0)
        late = min(self.latency, seconds / self.slower)
        self.latency -= late
        self.left = max(self.left - (seconds / self.slower - late) * self.rate, 0.0)


class SimulatedClock(Clock):
    """Seconds since the beginning. `spend` lets time pass in compute, `wait` until the next transfer ends.

    Transfers take time from compute. Its threads each have their part of an operation, and who is done waits for the
    last: what transfers take of one core they take of all. But two threads on one core have half of it each, so that
    compute keeps a half; and what moves, and would take more than the other half, takes longer till compute waits."""

    def __init__(self, ways: Ways, readers: int = 2) -> None:
        super().__init__()
        self.ways, self.time = {**ways, WIRE: Rates(1.0, 1.0, 1.0, 0.0)}, 0.0  # seconds of exchange a second
        self.spans: list[Span] = []
        self.seconds: dict[str, float] = {}
        self._last: dict[str, int] = {}  # the last span of each lane
        self._free = {"read": readers, "write": 1, WIRE: 1, AHEAD: 1}
        self._queues: dict[str, deque[Transfer]] = {direction: deque() for direction in self._free}
        self._moving: list[Transfer] = []
        self._wanted = 0.0  # of a core, by what moves
        self._computing = False
        self._settled = 0.0

    def now(self) -> float:
        return self.time

    def wait(self, condition: threading.Condition) -> None:
        self.step()

    def step(self) -> None:
        """Let time pass until a transfer ends."""
        assert self._moving, "the step waits for a transfer, and none is under way"
        started = self.time
        self._end_first()
        self._note("waiting", started)

    def spend(self, lane: str, seconds: float) -> None:
        """`lane` (compute or update) works for so long by itself; transfers go on meanwhile, and take their part."""
        started = self.time
        self._compute(True)
        while True:
            pace = 1.0 - min(self._wanted, HALF)
            end = self.time + seconds / pace
            if not self._moving or (first := min(transfer.end for transfer in self._moving)) > end:
                break
            seconds = max(seconds - pace * (first - self.time), 0.0)
            self._end_first()
        self.time = end
        self._compute(False)
        self._note(lane, started)

    def _compute(self, now: bool) -> None:
        """Whether the cores have other work than to move what moves."""
        self._computing = now
        if self._wanted > HALF:
            self.settle()
            self._pace()

    def exchange(self, seconds: float, ahead: bool, busy: float = 0.0) -> SimulatedTicket:
        """With other workers, of so many seconds if nothing else is on the wire, in which so much of a core is `busy`."""
        ticket = SimulatedTicket(self, None, 1)
        self._submit(Transfer(WIRE, AHEAD if ahead else WIRE, seconds, 0.0, ticket.piece_done, busy * seconds))
        return ticket

    def carry(self, lane: str, tier: str, direction: str, nbytes: int) -> None:
        """`lane` copies so many bytes itself, beside what moves, and does nothing else meanwhile."""
        started, ticket = self.time, SimulatedTicket(self, None, 1)
        latency = self.ways[tier].latency
        self.settle()
        self._moving.append(Transfer(tier, direction, float(nbytes), latency, ticket.piece_done, carried=True))
        self._pace()
        while not ticket.done:
            self._end_first()
        self._note(lane, started)

    def finish(self, ticket: SimulatedTicket) -> None:
        """Let time pass until an exchange is done."""
        started = self.time
        while not ticket.done:
            self._end_first()
        self._note(WIRE, started)

    def submit(
        self, tier: str, direction: str, nbytes: int, finish: Callable[[], None], latency: float | None = None
    ) -> None:
        way = self.ways[tier]
        core = way.handling + nbytes * (way.reading if direction == "read" else way.writing)
        latency = way.latency if latency is None else latency
        self._submit(Transfer(tier, direction, float(nbytes), latency, finish, core))

    def _submit(self, transfer: Transfer) -> None:
        self._queues[transfer.direction].append(transfer)
        if self._free[transfer.direction]:
            self.settle()
            self._start(transfer.direction)

    def settle(self) -> None:
        """Reckon how far what moves has come, and note it."""
        seconds = self.time - self._settled
        self._settled = self.time
        if seconds <= 0.0:
            return
        for transfer in self._moving:
            transfer.go_on(seconds)
        for direction in {transfer.direction for transfer in self._moving} - {WIRE}:
            self._append((direction, self.time - seconds, self.time))

    def _start(self, direction: str) -> None:
        """Begin what can be. The clock is settled."""
        queue = self._queues[direction]
        while queue and self._free[direction]:
            self._moving.append(queue.popleft())
            self._free[direction] -= 1
        self._pace()

    def _pace(self) -> None:
        """How fast everything moves from now on. What moves on one way in one direction shares its bandwidth; both directions
        together keep to theirs. The clock is settled."""
        for transfer in self._moving:
            way = self.ways[transfer.tier]
            beside = [other.direction for other in self._moving if other.tier == transfer.tier]
            share = beside.count(transfer.direction)
            scale = min(1.0, way.both / (way.read + way.write)) if len(beside) > share else 1.0
            transfer.rate = (way.read if transfer.direction == "read" else way.write) * scale / share
        self._wanted = sum(transfer.wanted for transfer in self._moving)
        slower = max(self._wanted / HALF, 1.0) if self._computing else 1.0
        for transfer in self._moving:
            transfer.slower = slower if transfer.core else 1.0
            transfer.end = self.time + transfer.seconds * transfer.slower

    def _end_first(self) -> None:
        first = min(self._moving, key=_end)
        self.time = max(self.time, first.end)
        self.settle()
        self._moving.remove(first)
        self._free[first.direction] += not first.carried
        self._start(first.direction)
        first.finish()

    def _note(self, lane: str, started: float) -> None:
        if self.time > started:
            self._append((lane, started, self.time))

    def note(self, what: str, started: float) -> float:
        """The clock has seen for itself what took time."""
        return self.time - started

    def _append(self, span: Span) -> None:
        """Keep a span, joined to the one before it in its lane when it goes on where that ended."""
        lane, start, end = span
        self.seconds[lane] = self.seconds.get(lane, 0.0) + end - start
        index = self._last.get(lane)
        if index is not None and start - self.spans[index][2] < 1e-9:
            self.spans[index] = (lane, self.spans[index][1], end)
            return
        self._last[lane] = len(self.spans)
        self.spans.append(span)

    def forget_spans(self) -> None:
        """What was noted is left to those who have it."""
        self.settle()
        self.spans = []
        self._last.clear()


@dataclass
class SimulatedTicket:
    """A transfer's receipt, as `outsize.memory.transfer.Ticket`; waiting lets simulated time pass."""

    clock: SimulatedClock
    then: Then | None
    left: int
    done: bool = False

    def wait(self) -> None:
        while not self.done:
            self.clock.step()

    def piece_done(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.done = True
            if self.then is not None:
                self.then(None)


@dataclass
class SimulatedTransfers:
    """The interface of `outsize.memory.transfer.Transfers`; nothing is carried but time."""

    clock: SimulatedClock
    bytes: dict[str, int] = field(default_factory=lambda: {"read": 0, "write": 0})

    def read(
        self, tier: Tier, extent: Extent, offset: int, target: torch.Tensor, then: Then | None = None, fence: Any = None
    ) -> SimulatedTicket:
        nbytes = target.numel()
        starts = range(0, max(nbytes, 1), PIECE)
        ticket = SimulatedTicket(self.clock, then, len(starts))
        self.bytes["read"] += nbytes
        for start in starts:
            self.clock.submit(tier.name, "read", min(PIECE, nbytes - start), ticket.piece_done)
        return ticket

    def write(
        self, tier: Tier, extent: Extent, offset: int, source: torch.Tensor, then: Then | None = None, fence: Any = None
    ) -> SimulatedTicket:
        ticket = SimulatedTicket(self.clock, then, 1)
        self.bytes["write"] += source.numel()
        self.clock.submit(tier.name, "write", source.numel(), ticket.piece_done)
        return ticket

    def after_writes(self, function: Callable[[], None]) -> SimulatedTicket:
        """`function` runs when all writes before it are through and made durable."""
        ticket = SimulatedTicket(self.clock, None, 1)

        def finish() -> None:
            function()
            ticket.piece_done()

        self.clock.submit("disk", "write", 0, finish, latency=self.clock.ways["disk"].flush)
        return ticket

    def drain(self) -> None:
        self.after_writes(lambda: None).wait()

    def close(self) -> None:
        """Nothing to end."""
