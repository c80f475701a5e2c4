"""The only owner of bytes. A block has a home; a lease brings it near compute; a commit makes a step durable.

    store.create(block, home="disk")          a place is reserved, nothing is written yet
    with store.lease(name, fresh=True) as l:  a writable copy near compute; written home when the lease ends
    with store.phase("step"): ...             the order of leases is recorded once, then foreseen
    store.commit(step, facts)                 what is at home now is step N, whatever happens next

Near memory is one arena of fixed size. Blocks whose home *is* the near tier live beside it and never move.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any

import torch

from outsize.errors import BudgetError, RunError
from outsize.memory.block import Block, Part
from outsize.memory.clock import Clock
from outsize.memory.foresight import Foresight, Placement, Policy, Resident, Touch, evict_oldest
from outsize.memory.ledger import Ledger
from outsize.memory.tier import Extent, Tier
from outsize.memory.transfer import Ticket, Transfers
from outsize.sizes import format_size


class Residency(Enum):
    """Where a block's current bytes are. Each docstring line says what occupies memory."""

    EMPTY = "empty"  # nowhere: created, never written; at most an extent is reserved at home
    FAR = "far"  # at home only; nothing near
    RESERVED = "reserved"  # as EMPTY or FAR, and a place near that a fresh lease will fill
    COMING = "coming"  # at home, and a place near that is being filled
    NEAR = "near"  # at home and near, both the same
    CHANGED = "changed"  # near only: a lease has written, home is stale
    LEAVING = "leaving"  # near, and on its way home
    STAYING = "staying"  # near is its home


@dataclass
class Entry:
    """A block and where it is. `slots` are its extents at home; a durable block alternates between two of them, so that
    a committed copy is never overwritten."""

    block: Block
    home: Tier
    durable: bool
    residency: Residency
    slots: list[Extent | None] = field(default_factory=lambda: [None, None])
    current: int = 0
    committed: int | None = None
    written: bool = False  # home holds the block's bytes, of some step, or will when its write is through
    offset: int = -1  # in the near arena; -1 when not there
    storage: torch.Tensor | None = None  # the block's bytes near, 1-D uint8
    pins: int = 0
    ticket: Ticket | None = None
    fence: Any = None  # a CUDA event: compute queued before it may still use the bytes
    stale_on_disk: bool = False  # STAYING and durable: changed since it was last committed


class Lease:
    """A pinned copy of a block near compute, for as long as someone uses it. End it with `release` or `drop`."""

    def __init__(self, store: Store, entry: Entry) -> None:
        self._store, self._entry = store, entry
        assert entry.storage is not None
        self.bytes = entry.storage

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The block's parts by name, as they lie in `bytes`."""
        return self._entry.block.views(self.bytes)

    @property
    def name(self) -> str:
        return self._entry.block.name

    def change(self) -> None:
        """Call before writing: waits until no transfer reads the bytes, and marks them as newer than home."""
        self._store._change(self._entry)

    def release(self) -> None:
        self._store._give(self._entry, Touch.GIVE)

    def drop(self) -> None:
        """Release, and forget the bytes: they are written nowhere."""
        self._store._give(self._entry, Touch.DROP)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Store:
    """Blocks over tiers. `near_bytes` is the arena for leases of blocks whose home is elsewhere.

    `allocate_near(nbytes)` returns 1-D uint8 tensors near compute (host slabs, or memory of the device).
    `disk` is where durable blocks are committed; None for a store that will not outlive the process."""

    def __init__(
        self,
        tiers: dict[str, Tier],
        near_bytes: int,
        allocate_near: Callable[[int], torch.Tensor],
        transfers: Transfers,
        near: str = "host",
        policy: Policy = evict_oldest,
        clock: Clock | None = None,
    ) -> None:
        self.tiers, self.near = tiers, near
        self.clock = clock or Clock()
        self.ledger = Ledger()
        self.transfers = transfers
        self.entries: dict[str, Entry] = {}
        self.waiting_seconds = {"read": 0.0, "write": 0.0}
        self._allocate_near = allocate_near
        self._arena = allocate_near(near_bytes)
        self._in_arena: dict[str, Entry] = {}
        self._foresight = Foresight(near_bytes, lambda name: self.entries[name].block.nbytes, policy)
        self._pending: Placement | None = None
        self._turn = threading.Condition(threading.RLock())
        self._in_phase = False
        self._failure: BaseException | None = None
        self._recovered: dict[str, tuple[tuple[Extent, Extent], int]] = {}

    # -- blocks ---------------------------------------------------------------------------------------------------

    def create(self, block: Block, home: str, durable: bool = True) -> None:
        """Reserve a place for `block`. Durable blocks get two extents on disk: those that `recover` announced, with the
        bytes committed there, or new ones.

        Raises StorageError when the tier is full, RunError when what was committed under this name is another block."""
        if block.name in self.entries:
            raise ValueError(f"block {block.name} exists already")
        staying = home == self.near
        entry = self.entries[block.name] = Entry(block, self.tiers[home], durable, Residency.EMPTY)
        if durable and block.name in self._recovered:
            self._claim(entry, *self._recovered.pop(block.name))
        else:
            for slot in range(2 if durable else 0 if staying else 1):
                self._reserve(entry, slot)
        if staying:
            self._settle_near(entry)

    def recover(self, committed: dict[str, tuple[tuple[Extent, Extent], int]]) -> None:
        """Announce what a manifest says: for each durable block its two extents and the slot that holds the committed
        bytes, or -1. The blocks are then created as usual."""
        self._recovered = dict(committed)

    def _claim(self, entry: Entry, extents: tuple[Extent, Extent], slot: int) -> None:
        tier = self._far_tier(entry)
        assert tier is not None
        for index, extent in enumerate(extents):
            if extent.nbytes != entry.block.nbytes:
                raise RunError(
                    f"Block {entry.block.name} has {entry.block.nbytes} bytes, but {extent.nbytes} were committed: this "
                    "state belongs to another model, optimizer or precision. Use its own settings or another directory."
                )
            tier.claim(extent)
            entry.slots[index] = extent
            self.ledger.hold(tier.name, entry.block.bytes_by_kind())
        if slot >= 0:
            entry.current = entry.committed = slot
            entry.written, entry.residency = True, Residency.FAR

    def _settle_near(self, entry: Entry) -> None:
        """Give a block whose home is near its memory, and the bytes committed for it, if any."""
        entry.storage = self._allocate_near(entry.block.nbytes)
        self.ledger.hold(self.near, entry.block.bytes_by_kind())
        entry.residency = Residency.STAYING
        tier, extent = self._far_tier(entry), entry.slots[entry.current]
        if entry.written and tier is not None and extent is not None:
            self.ledger.move(tier.name, self.near, entry.block.bytes_by_kind())
            self.transfers.read(tier, extent, 0, entry.storage).wait()

    def _reserve(self, entry: Entry, slot: int) -> None:
        tier = self._far_tier(entry)
        if tier is not None and entry.slots[slot] is None:
            entry.slots[slot] = tier.allocate(entry.block.nbytes)
            self.ledger.hold(tier.name, entry.block.bytes_by_kind())

    def _far_tier(self, entry: Entry) -> Tier | None:
        """Where the entry's extents are: its home, or the disk for a durable block that stays near."""
        return self.tiers.get("disk") if entry.home.name == self.near else entry.home

    def remove(self, name: str) -> None:
        """Forget a block that nobody leases, and free what it occupied."""
        with self._turn:
            entry = self.entries[name]
            self._wait(entry, "write")
            assert entry.pins == 0, f"{name} is leased"
            if entry.offset >= 0:
                self._vacate(entry)
                self._rebuild()
            del self.entries[name]
            tier = self._far_tier(entry)
            for extent in entry.slots:
                if extent is not None and tier is not None:
                    tier.free(extent)
                    self.ledger.hold(tier.name, entry.block.bytes_by_kind(), -1)
            if entry.residency is Residency.STAYING:
                self.ledger.hold(self.near, entry.block.bytes_by_kind(), -1)

    # -- leases ---------------------------------------------------------------------------------------------------

    def lease(self, name: str, fresh: bool = False) -> Lease:
        """Bring the block near and pin it. `fresh`: the caller writes every byte, nothing is read.

        Raises BudgetError when pinned leases leave no room, StorageError when a transfer failed."""
        with self._turn:
            entry = self.entries[name]
            if entry.residency is Residency.STAYING:
                entry.pins += 1
            else:
                self._take(entry, Touch.FRESH if fresh else Touch.TAKE)
            if fresh:
                self._change(entry)
            return Lease(self, entry)

    def _take(self, entry: Entry, touch: Touch) -> None:
        assert touch is Touch.FRESH or entry.residency is not Residency.EMPTY, f"{entry.block.name} was never written"
        if not self._foresight.expect((touch, entry.block.name)):
            self._rebuild()
        try:
            while self._foresight.behind or entry.offset < 0:
                self._look_ahead()
                if self._foresight.behind or entry.offset < 0:
                    self._wait_for_room(entry)
        except BaseException:
            self._foresight.withdraw()
            self._rebuild()
            raise
        assert touch is Touch.FRESH or entry.residency is not Residency.RESERVED, f"{entry.block.name} was not read"
        entry.pins += 1  # before the trace moves on, so that nothing foreseen can take its place
        self._foresight.passed()
        if entry.residency is Residency.COMING:
            self._wait(entry, "read")
        self._look_ahead()

    def _wait_for_room(self, entry: Entry) -> None:
        in_flight = any(other.ticket is not None for other in self._in_arena.values())
        if self._foresight.stuck or not in_flight:
            pinned = sum(other.block.nbytes for other in self._in_arena.values() if other.pins)
            raise BudgetError(
                f"No room near compute for block {entry.block.name} ({format_size(entry.block.nbytes)}): of "
                f"{format_size(self._arena.numel())} leases hold {format_size(pinned)}. Give more memory, "
                "or a shorter sequence."
            )
        started = self.clock.now()
        self.clock.wait(self._turn)
        self._raise_failure()
        self.waiting_seconds["write"] += self.clock.now() - started

    def _wait(self, entry: Entry, direction: str) -> None:
        started = self.clock.now()
        while entry.ticket is not None:
            self.clock.wait(self._turn)
            self._raise_failure()
        self.waiting_seconds[direction] += self.clock.now() - started

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _change(self, entry: Entry) -> None:
        with self._turn:
            self._wait(entry, "write")
            if entry.residency is Residency.STAYING:
                entry.stale_on_disk = entry.written = True
            else:
                entry.residency = Residency.CHANGED

    def _give(self, entry: Entry, touch: Touch) -> None:
        with self._turn:
            assert entry.pins > 0, f"{entry.block.name} was released twice"
            entry.fence = self._fence()
            if entry.residency is Residency.STAYING:
                entry.pins -= 1
                entry.written = entry.written and touch is not Touch.DROP
                return
            if not self._foresight.expect((touch, entry.block.name)):
                self._rebuild()
            while self._foresight.behind:
                self._look_ahead()
                if self._foresight.behind:
                    self._wait_for_room(entry)
            self._foresight.passed()
            if touch is Touch.DROP:
                self._wait(entry, "write")
            entry.pins -= 1  # not before: until now nothing foreseen may take its place
            if entry.pins == 0:
                self._left(entry, touch)
            self._look_ahead()

    def _left(self, entry: Entry, touch: Touch) -> None:
        if touch is Touch.DROP:
            entry.written = False
            self._vacate(entry)
        elif entry.residency is Residency.CHANGED:
            self._send_home(entry)

    def read_rows(self, name: str, part: str, rows: list[int], out: torch.Tensor) -> None:
        """Copy the given rows (ascending) of one part into `out` `[len(rows), *row shape]`, without a lease: for a
        vocabulary's table, of which a batch needs few rows."""
        entry = self.entries[name]
        place = entry.block.part(part)
        with self._turn:
            if entry.storage is not None and entry.residency not in (Residency.COMING, Residency.RESERVED):
                self._copy_rows(place, entry.storage, rows, out)
                return
            extent = entry.slots[entry.current]
            assert extent is not None
        row_bytes = place.nbytes // place.shape[0]
        target = out.view(-1).view(torch.uint8)
        self.ledger.move(entry.home.name, self.near, {place.kind: len(rows) * row_bytes})
        tickets = []
        for first, last in _runs(rows):
            span = target[first * row_bytes : last * row_bytes]
            tickets.append(self.transfers.read(entry.home, extent, place.offset + rows[first] * row_bytes, span))
        started = self.clock.now()
        for ticket in tickets:
            ticket.wait()
        self.waiting_seconds["read"] += self.clock.now() - started

    def _copy_rows(self, place: Part, storage: torch.Tensor, rows: list[int], out: torch.Tensor) -> None:
        torch.index_select(place.view(storage), 0, torch.tensor(rows), out=out)

    def has_bytes(self, name: str) -> bool:
        """Something was written into the block, near or at home."""
        entry = self.entries[name]
        return entry.written or entry.residency in (Residency.CHANGED, Residency.LEAVING)

    # -- near memory ----------------------------------------------------------------------------------------------

    def _look_ahead(self) -> None:
        """Carry out placements in trace order, as many as the real run has made possible."""
        while True:
            if self._pending is None:
                self._pending = self._foresight.next_placement()
            if self._pending is None or not self._make_way(self._pending):
                return
            placement, self._pending = self._pending, None
            self._bring(placement)

    def _make_way(self, placement: Placement) -> bool:
        """Evict whatever lies where the placement goes, and the block's own older bytes, if they are elsewhere in the
        arena; False while any of it is still needed."""
        end = placement.offset + placement.nbytes
        inside = [
            entry
            for entry in self._in_arena.values()
            if (entry.offset < end and entry.offset + entry.block.nbytes > placement.offset)
            or entry.block.name == placement.name
        ]
        for entry in inside:
            wanted = self._foresight.ahead[entry.block.name] - (entry.block.name == placement.name)
            settled = entry.residency in (Residency.NEAR, Residency.RESERVED)
            if entry.pins or not settled or wanted > 0:
                return False
        for entry in inside:
            self._vacate(entry)
        return True

    def _vacate(self, entry: Entry) -> None:
        entry.offset, entry.storage = -1, None
        entry.residency = Residency.FAR if entry.written else Residency.EMPTY
        del self._in_arena[entry.block.name]
        self.ledger.hold(self.near, entry.block.bytes_by_kind(), -1)

    def _bring(self, placement: Placement) -> None:
        entry = self.entries[placement.name]
        entry.offset = placement.offset
        entry.storage = self._arena[placement.offset : placement.offset + placement.nbytes]
        self._in_arena[placement.name] = entry
        self.ledger.hold(self.near, entry.block.bytes_by_kind())
        if placement.fresh:
            entry.residency = Residency.RESERVED
            return
        extent = entry.slots[entry.current]
        assert extent is not None
        entry.residency = Residency.COMING
        self.ledger.move(entry.home.name, self.near, entry.block.bytes_by_kind())
        entry.ticket = self.transfers.read(
            entry.home, extent, 0, entry.storage, then=lambda error: self._arrived(entry, error), fence=entry.fence
        )

    def _send_home(self, entry: Entry) -> None:
        """Write a changed block to its home, to the slot that no commit needs."""
        assert entry.storage is not None
        if entry.durable and entry.current == entry.committed:
            entry.current = 1 - entry.current
        extent = entry.slots[entry.current]
        assert extent is not None
        if entry.residency is not Residency.STAYING:
            entry.residency = Residency.LEAVING
        entry.written = True
        tier = self._far_tier(entry)
        assert tier is not None
        self.ledger.move(self.near, tier.name, entry.block.bytes_by_kind())
        entry.ticket = self.transfers.write(
            tier, extent, 0, entry.storage, then=lambda error: self._arrived(entry, error), fence=entry.fence
        )

    def _arrived(self, entry: Entry, error: BaseException | None) -> None:
        """A transfer thread reports: the block is the same at home and near."""
        with self._turn:
            entry.ticket = None
            if error is not None:
                self._failure = self._failure or error
            elif entry.residency is not Residency.STAYING:
                entry.residency = Residency.NEAR
            try:
                self._look_ahead()
            except BaseException as failure:
                self._failure = self._failure or failure
            self._turn.notify_all()

    def _fence(self) -> Any:
        return torch.cuda.current_stream().record_event() if self._arena.is_cuda else None

    def _rebuild(self) -> None:
        """The trace did not foretell what happens: start foreseeing from what is really near."""
        self._pending = None
        for entry in [e for e in self._in_arena.values() if e.residency is Residency.RESERVED]:
            self._vacate(entry)
        residents = [
            Resident(entry.offset, entry.block.nbytes, name, entry.pins) for name, entry in self._in_arena.items()
        ]
        self._foresight.rebuild(residents)

    @contextmanager
    def phase(self, name: str, again: bool = False) -> Iterator[None]:
        """Leases inside follow one order every time; `again`: the same phase comes next."""
        with self._turn:
            if not self._foresight.begin(name, again):
                self._rebuild()
        try:
            yield
        finally:
            with self._turn:
                if not self._foresight.end():
                    self._rebuild()

    # -- whole store ----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until nothing is on its way."""
        with self._turn:
            for entry in self.entries.values():
                self._wait(entry, "write")

    def commit(self, write_manifest: Callable[[dict[str, int]], None], wait: bool = False) -> Ticket:
        """What is at home now becomes the committed state, once `write_manifest(slot by block)` has returned.

        The manifest is written by the transfer thread after every write before it is durable; nothing that the step
        after this one writes can overtake it."""
        with self._turn:
            disk = self.tiers["disk"]
            for entry in self.entries.values():
                if entry.durable and entry.residency is Residency.STAYING and entry.stale_on_disk:
                    self._wait(entry, "write")
                    self._send_home(entry)
                    entry.stale_on_disk = False
            durable = {name: entry for name, entry in self.entries.items() if entry.durable}
            slots = {name: entry.current if entry.written else -1 for name, entry in durable.items()}
            for entry in durable.values():
                entry.committed = entry.current

        def finish() -> None:
            disk.flush()
            write_manifest(slots)

        ticket = self.transfers.after_writes(finish)
        if wait:
            ticket.wait()
        return ticket

    def check(self) -> None:
        """Integrity: call when nothing is leased. Raises AssertionError naming the block that is wrong."""
        with self._turn:
            self._raise_failure()
            spans = sorted((e.offset, e.offset + e.block.nbytes, n) for n, e in self._in_arena.items())
            for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
                assert end <= start, f"{name} and {other} overlap near compute"
            for name, entry in self.entries.items():
                assert entry.pins == 0, f"{name} is still leased {entry.pins} times"
                elsewhere = entry.residency in (Residency.EMPTY, Residency.FAR, Residency.STAYING)
                assert elsewhere != (name in self._in_arena), f"{name} is {entry.residency.value} but not in its place"
            held = sum(entry.block.nbytes for entry in self.entries.values() if entry.storage is not None)
            assert held == self.ledger.held_in(self.near), "the ledger and the store disagree on what is near"
            for tier in self.tiers.values():
                tier.check()

    def close(self) -> None:
        self.transfers.close()
        for tier in self.tiers.values():
            tier.close()


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Index ranges of `rows` in which each row follows the one before."""
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            yield first, index
            first = index
