"""The only owner of bytes. A block has a home; a lease brings it near compute; a commit makes a step durable.

    store.create(block, home="disk")          a place is reserved, nothing is written yet
    with store.lease(name, fresh=True) as l:  a writable copy near compute; written home when the lease ends
    with store.phase("step"): ...             the order of leases is recorded once, then foreseen
    store.commit(step, facts)                 what is at home now is step N, whatever happens next

Near memory is one arena of fixed size. Blocks at home near live beside it and never move. Where a device computes, blocks
may live in its host's memory: they come and go as from disk, or are leased there, and a commit writes what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from outsize.errors import BudgetError
from outsize.memory.arena import Arena
from outsize.memory.block import Block, Part, runs
from outsize.memory.device import fence_of
from outsize.memory.entry import Entry, Residency
from outsize.memory.foresight import Touch
from outsize.memory.homes import Committed, Homes
from outsize.memory.layout import Policy, evict_oldest
from outsize.memory.lease import Lease
from outsize.memory.ledger import Ledger
from outsize.memory.shared import Shared
from outsize.memory.tier import Extent, Moves, Tier
from outsize.memory.transfer import Ticket, Transfers
from outsize.memory.turn import Turn
from outsize.sizes import format_size


class Store:
    """Blocks over tiers. `near_bytes` is the arena for leases of blocks whose home is elsewhere.

    `allocate_near(nbytes)` returns 1-D uint8 tensors near compute (host slabs, or memory of the device).
    The tier `disk` is where durable blocks are committed; `checked`: with checksums, which `commit` reports. With `shared`
    durable blocks whose home is near lie there, and may have their bytes from the start."""

    def __init__(
        self,
        tiers: dict[str, Tier],
        near_bytes: int,
        allocate_near: Callable[[int], torch.Tensor],
        transfers: Transfers,
        near: str = "host",
        policy: Policy = evict_oldest,
        checked: bool = False,
        shared: Shared | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.tiers, self.near, self.shared, self.clock = tiers, near, shared, transfers.clock
        self.ledger, self.transfers = ledger or Ledger(), transfers
        self.entries: dict[str, Entry] = {}
        self.homes = Homes(tiers, near, self.entries, self.ledger, checked)
        self._stale: dict[str, Entry] = {}  # durable, at home in memory: changed since the last commit, in that order
        self._allocate_near = allocate_near
        self._arena = Arena(allocate_near(near_bytes), near, self.entries, self.ledger, policy, self._fetch)
        self._turn = Turn(self.clock)
        self._last_commit: Ticket | None = None
        self._used: Any = None  # a CUDA event: compute queued before it may still use what was leased

    @property
    def waiting_seconds(self) -> dict[str, float]:
        """How long leases and rows waited for reads, and for writes or room."""
        return self._turn.waiting_seconds

    # -- blocks ---------------------------------------------------------------------------------------------------

    def create(self, block: Block, home: str, durable: bool = True, stays: bool = False) -> None:
        """Reserve a place for `block`. Durable blocks get two extents on disk: those that `recover` announced, with the
        bytes committed there, or new ones. With `stays` one at home in a device's host's memory is leased there.

        Raises StorageError when the tier is full, RunError when what was committed under this name is another block."""
        if block.name in self.entries:
            raise ValueError(f"block {block.name} exists already")
        with self._turn:
            self.homes.settle(entry := Entry(block, self.tiers[home], durable, Residency.EMPTY))
            self.entries[block.name] = entry
        if home == self.near:
            self._settle_near(entry)
        elif entry.slot is not None:
            if entry.written:
                self._bring_back(entry, entry.slot)
            if stays:
                entry.residency, entry.storage = Residency.STAYING, entry.home.view(entry.slot)

    def _settle_near(self, entry: Entry) -> None:
        """Give a block whose home is near its memory, and begin to read the bytes committed for it, if any."""
        entry.residency = Residency.STAYING
        shared = self.shared if entry.durable else None
        entry.storage = self._allocate_near(entry.block.nbytes) if shared is None else shared.place(entry.block)
        entry.copies = 1 if shared is None else 2
        self.ledger.hold(self.near, entry.block.bytes_by_kind, entry.copies)
        if shared is not None and shared.published:
            self._stale[entry.block.name], entry.written = entry, True
        elif entry.written:
            with self._turn:
                self._fetch(entry)

    def _bring_back(self, entry: Entry, slot: Extent) -> None:
        """Fill a block's place in memory from where it was committed."""
        assert entry.extent is not None
        self.ledger.move(self.homes.tier(entry).name, entry.home.name, entry.block.bytes_by_kind)
        self.transfers.read(self.homes.moves(entry), entry.extent, 0, entry.home.view(slot)).wait()

    def remove(self, name: str) -> None:
        """Forget a block that nobody leases, and free what it occupied."""
        if self._last_commit is not None:
            self._last_commit.wait()  # which may still write it
        with self._turn:
            entry = self.entries[name]
            self._wait(entry, "write")
            assert entry.pins == 0, f"{name} is leased"
            if entry.offset >= 0:
                self._arena.vacate(entry)
                self._arena.rebuild()
            del self.entries[name]
            self._stale.pop(name, None)
            self.homes.leave(entry)
            if entry.residency is Residency.STAYING and not entry.stays_apart:
                self.ledger.hold(self.near, entry.block.bytes_by_kind, -entry.copies)

    # -- leases ---------------------------------------------------------------------------------------------------

    def lease(self, name: str, fresh: bool = False) -> Lease:
        """Bring the block near and pin it; one that was never written is all zeros. `fresh`: the caller writes every byte,
        nothing is read.

        Raises BudgetError when pinned leases leave no room, StorageError when a transfer failed."""
        with self._turn:
            entry = self.entries[name]
            if entry.residency is Residency.COMING and entry.home.name == self.near:
                self._wait(entry, "read")
            if entry.residency is Residency.STAYING:
                entry.pins += 1
                if not entry.written and not fresh and entry.storage is not None:
                    entry.storage.zero_()
            else:
                self._take(entry, Touch.FRESH if fresh else Touch.TAKE)
            if fresh:
                self._change(entry)
            return Lease(self, entry)

    def alias(self, lease: Lease) -> torch.Tensor:
        """A lease's bytes as a storage of their own, so that one can ask whether anybody uses it."""
        return torch.from_dlpack(lease.bytes)

    def _take(self, entry: Entry, touch: Touch) -> None:
        try:
            self._foresee(entry, touch, lambda: self._arena.foresight.behind or self._arena.awaits(entry))
        except BaseException:
            self._arena.foresight.withdraw()
            self._arena.rebuild()
            raise
        if touch is Touch.TAKE and entry.residency is Residency.RESERVED:
            assert not entry.written and entry.storage is not None, f"{entry.block.name} was not read"
            entry.storage.zero_()
        entry.pins += 1  # before the trace moves on, so that nothing foreseen can take its place
        self._arena.foresight.passed()
        if entry.residency is Residency.COMING:
            self._wait(entry, "read")
        self._arena.look_ahead()

    def _foresee(self, entry: Entry, touch: Touch, early: Callable[[], bool]) -> None:
        """Come to a touch of the block, not while that is too early."""
        if not self._arena.foresight.expect((touch, entry.block.name)):
            self._arena.rebuild()
        while early():
            self._arena.look_ahead()
            if early():
                self._wait_for_room(entry)

    def _wait_for_room(self, entry: Entry) -> None:
        in_flight = any(other.ticket is not None for other in self._arena.residents.values())
        if self._arena.foresight.stuck or not in_flight:
            pinned = sum(other.block.nbytes for other in self._arena.residents.values() if other.pins)
            raise BudgetError(
                f"No room near compute for block {entry.block.name} ({format_size(entry.block.nbytes)}): of "
                f"{format_size(self._arena.memory.numel())} leases hold {format_size(pinned)}. Give more memory, "
                "or a shorter sequence."
            )
        self._turn.wait("write")

    def _wait(self, entry: Entry, direction: str) -> None:
        """Until nothing is on its way from or to the block. Raises what went wrong with any transfer, though it be over."""
        self._turn.wait_while(lambda: entry.ticket is not None, direction)

    def _change(self, entry: Entry) -> None:
        with self._turn:
            self._wait(entry, "write")
            if entry.residency is Residency.STAYING:
                self._turn.wait_while(lambda: entry.saving is not None, "write")
                entry.written = True
                if entry.durable:
                    self._stale.setdefault(entry.block.name, entry)
                    if self.shared is not None:
                        self.shared.save(entry.block.name)
            else:
                entry.residency = Residency.CHANGED

    def _change_both(self, entry: Entry) -> torch.Tensor | None:
        with self._turn:
            self._wait(entry, "write")
            if entry.slot is None or entry.residency is not Residency.NEAR:
                self._change(entry)
                return None
            self._turn.wait_while(lambda: entry.saving is not None, "write")
            self._stale.setdefault(entry.block.name, entry)
            return entry.home.view(entry.slot)

    def _give(self, entry: Entry, touch: Touch) -> None:
        with self._turn:
            assert entry.pins > 0, f"{entry.block.name} was released twice"
            self._used = fence_of(self._arena.memory)
            if entry.residency is Residency.STAYING:
                entry.pins -= 1
                entry.written = entry.written and touch is not Touch.DROP
                return
            self._foresee(entry, touch, lambda: self._arena.foresight.behind)
            self._arena.foresight.passed()
            if touch is Touch.DROP:
                self._wait(entry, "write")
            entry.pins -= 1  # not before: until now nothing foreseen may take its place
            if entry.pins == 0:
                self._left(entry, touch)
            self._arena.look_ahead()

    def _left(self, entry: Entry, touch: Touch) -> None:
        if touch is Touch.DROP:
            entry.written = False
            self._arena.vacate(entry)
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
                self._used = fence_of(self._arena.memory)  # nobody has leased what was read
                return
            tier, moves, extent = self.homes.source(entry)
        row_bytes = place.nbytes // place.shape[0]
        target = out.view(-1).view(torch.uint8)
        self.ledger.move(tier.name, self.near, {place.kind: len(rows) * row_bytes})
        # What is queued on a device may still use what `out` lies in.
        begin = partial(self.transfers.read, moves, extent, fence=fence_of(self._arena.memory))
        tickets = [
            begin(place.offset + rows[first] * row_bytes, target[first * row_bytes : last * row_bytes])
            for first, last in runs(rows)
        ]
        started = self.clock.now()
        for ticket in tickets:
            ticket.wait()
        self._turn.waited("read", started)

    def _copy_rows(self, place: Part, storage: torch.Tensor, rows: list[int], out: torch.Tensor) -> None:
        torch.index_select(place.view(storage), 0, torch.tensor(rows, device=storage.device), out=out)

    def has_bytes(self, name: str) -> bool:
        """Something was written into the block, near or at home."""
        entry = self.entries[name]
        return entry.written or entry.residency in (Residency.CHANGED, Residency.LEAVING)

    # -- transfers ---------------------------------------------------------------------------------------------------

    def _fetch(self, entry: Entry) -> None:
        """Begin to fill a block's place near from its home; of one that stays near, from where it was committed."""
        tier, moves, extent = self.homes.source(entry)
        entry.residency = Residency.COMING
        self.ledger.move(tier.name, self.near, entry.block.bytes_by_kind)
        entry.ticket = self._begin(self.transfers.read, entry, moves, extent)

    def _begin(self, move: Callable[..., Ticket], entry: Entry, moves: Moves, extent: Extent) -> Ticket:
        """Not before what is queued on a device is through with the place, whoever had it before."""
        assert entry.storage is not None
        return move(moves, extent, 0, entry.storage, then=lambda error: self._arrived(entry, error), fence=self._used)

    def _send_home(self, entry: Entry) -> None:
        """Write a changed block to its home, where no commit needs what is there."""
        tier, moves, extent = self.homes.target(entry)
        if entry.residency is not Residency.STAYING:
            entry.residency = Residency.LEAVING
        entry.written = True
        if entry.durable and entry.slot is not None:
            self._stale.setdefault(entry.block.name, entry)
        self.ledger.move(self.near, tier.name, entry.block.bytes_by_kind)
        entry.ticket = self._begin(self.transfers.write, entry, moves, extent)

    def _save(self, entry: Entry) -> None:
        """Write what has changed in memory to disk. Of what has a slot, the writer takes nothing into it before that is
        there."""
        if entry.slot is None:
            self._send_home(entry)
            return
        extent, tier = self.homes.place(entry), self.homes.tier(entry)
        self.ledger.move(entry.home.name, tier.name, entry.block.bytes_by_kind)
        source, then = entry.home.view(entry.slot), partial(self._saved, entry)
        entry.saving = self.transfers.write(self.homes.moves(entry), extent, 0, source, then=then)

    def _saved(self, entry: Entry, error: BaseException | None) -> None:
        """A transfer thread reports: what a commit wants of the slot is on disk."""
        with self._turn:
            entry.saving = None
            self._turn.notify(error)

    def _arrived(self, entry: Entry, error: BaseException | None) -> None:
        """A transfer thread reports: the block is the same at home and near."""
        with self._turn:
            entry.ticket = None
            if error is None and entry.residency is not Residency.STAYING:
                entry.residency = Residency.STAYING if entry.home.name == self.near else Residency.NEAR
            try:
                self._arena.look_ahead()
            except BaseException as failure:
                error = error or failure
            self._turn.notify(error)

    @contextmanager
    def phase(self, name: str, again: bool = False) -> Iterator[None]:
        """Leases inside follow one order every time; `again`: the same phase comes next."""
        with self._turn:
            if not self._arena.foresight.begin(name, again):
                self._arena.rebuild()
        try:
            yield
        finally:
            with self._turn:
                if not self._arena.foresight.end():
                    self._arena.rebuild()

    def need_room(self, phase: str) -> None:
        """Raises BudgetError unless a phase that was recorded will find room near compute whatever came before it."""
        if not self._arena.foresight.fits(phase):
            size = format_size(self._arena.memory.numel())
            raise BudgetError(f"{size} near compute are too few for what is leased at once. Give more memory.")

    # -- whole store ----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Wait until nothing is on its way. Raises what went wrong with a transfer."""
        with self._turn:
            for entry in self.entries.values():
                self._wait(entry, "write")

    def commit(
        self,
        write_manifest: Callable[[dict[str, Committed]], None],
        wait: bool = False,
        keep: str | None = None,
        drop: Iterable[str] = (),
    ) -> Ticket:
        """What is at home now becomes the committed state, once `write_manifest(places by block)` has returned. `keep`
        also keeps it under a name, and kept states in `drop` are let go: `write_manifest` makes that durable too.

        Blocks that stay near are written from where they are, in the order in which they changed and will again: each
        waits in `Lease.change` for its own. Those in a device's host's memory are written from there. The transfer thread
        writes the manifest after every write before it is durable; nothing of the next step can overtake it. Waits for
        the commit before, and raises its failure."""
        if self._last_commit is not None:
            self._last_commit.wait()
        with self._turn:
            self._used = fence_of(self._arena.memory)
            for entry in self._stale.values():
                self._save(entry)
            self._stale = {}
            places = self.homes.commit(keep, drop)

        def finish() -> None:
            self.tiers["disk"].flush()
            write_manifest(places())

        ticket = self._last_commit = self.transfers.after_writes(finish)
        if wait:
            ticket.wait()
        return ticket

    def check(self) -> None:
        """Integrity: call when nothing is leased. Raises AssertionError naming the block that is wrong."""
        with self._turn:
            self._turn.check()
            self._arena.check()
            for name, entry in self.entries.items():
                entry.check(resident=name in self._arena.residents)
            near = (entry for entry in self.entries.values() if entry.storage is not None and not entry.stays_apart)
            held = sum(entry.block.nbytes * entry.copies for entry in near)
            assert held == self.ledger.held_by_store(self.near), "the ledger and the store disagree on what is near"
            for tier in self.tiers.values():
                tier.check()

    def close(self) -> None:
        self.transfers.close()
        for tier in self.tiers.values():
            tier.close()
        if self.shared is not None:
            self.shared.close()
