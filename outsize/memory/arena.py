"""Near memory of fixed size, through which blocks stream: where each goes, and whom it replaces when."""

from __future__ import annotations

from collections.abc import Callable

import torch

from outsize.memory.entry import Entry, Residency
from outsize.memory.foresight import Foresight, Placement
from outsize.memory.layout import Policy, Resident, Spans
from outsize.memory.ledger import Ledger


class Arena:
    """`memory` (1-D uint8) and the blocks in it. `foresight` decides; a decision is carried out when the real run has
    made way for it. `fetch(entry)` begins to fill a block's place from its home.

    Not for several threads at once: the store's lock is around every call."""

    def __init__(
        self,
        memory: torch.Tensor,
        tier: str,
        entries: dict[str, Entry],
        ledger: Ledger,
        policy: Policy,
        fetch: Callable[[Entry], None],
    ) -> None:
        self.memory, self.tier = memory, tier
        self.residents: dict[str, Entry] = {}
        self._spans: Spans[Entry] = Spans(memory.numel())
        self.foresight = Foresight(memory.numel(), lambda name: entries[name].block.nbytes, policy)
        self._entries, self._ledger, self._fetch = entries, ledger, fetch
        self._pending: Placement | None = None
        self._in_the_way: list[Entry] = []  # of the pending placement

    def look_ahead(self) -> None:
        """Carry out placements in trace order, as many as the real run has made possible."""
        while True:
            if self._pending is None:
                self._pending = self.foresight.next_placement()
                if self._pending is None:
                    return
                self._in_the_way = self._at(self._pending)
            if not self._make_way(self._pending):
                return
            placement, self._pending = self._pending, None
            self._bring(placement)

    def awaits(self, entry: Entry) -> bool:
        """For its next lease the block is not at its place yet; it may still be where it was before."""
        name = entry.block.name
        pending = self._pending is not None and self._pending.name == name and self.foresight.ahead[name] == 1
        return entry.offset < 0 or pending

    def vacate(self, entry: Entry) -> None:
        """The block is not near any more."""
        self._spans.remove(entry.offset)
        entry.offset, entry.storage = -1, None
        entry.residency = Residency.FAR if entry.written else Residency.EMPTY
        del self.residents[entry.block.name]
        self._ledger.hold(self.tier, entry.block.bytes_by_kind, -1)

    def rebuild(self) -> None:
        """The trace did not foretell what happens: start foreseeing from what is really near."""
        self._pending = None
        for entry in [e for e in self.residents.values() if e.residency is Residency.RESERVED and not e.pins]:
            self.vacate(entry)
        residents = [
            Resident(entry.offset, entry.block.nbytes, name, entry.pins) for name, entry in self.residents.items()
        ]
        self.foresight.rebuild(residents)

    def check(self) -> None:
        """Raises AssertionError naming two blocks that share memory."""
        spans = sorted((e.offset, e.offset + e.block.nbytes, n) for n, e in self.residents.items())
        for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
            assert end <= start, f"{name} and {other} overlap near compute"

    def _at(self, placement: Placement) -> list[Entry]:
        """What lies where the placement goes, and the block's own older bytes, if they are elsewhere in the arena.

        Looked up once: until the placement is carried out, blocks leave the arena and none comes."""
        there = self._spans.between(placement.offset, placement.offset + placement.nbytes)
        older = self.residents.get(placement.name)
        return there if older is None or any(entry is older for entry in there) else [*there, older]

    def _make_way(self, placement: Placement) -> bool:
        """Evict what is in the way; False while any of it is still needed."""
        there = [entry for entry in self._in_the_way if entry.offset >= 0]
        for entry in there:
            wanted = self.foresight.ahead[entry.block.name] - (entry.block.name == placement.name)
            settled = entry.residency is Residency.NEAR or entry.residency is Residency.RESERVED
            if entry.pins or not settled or wanted > 0:
                return False
        for entry in there:
            self.vacate(entry)
        return True

    def _bring(self, placement: Placement) -> None:
        entry = self._entries[placement.name]
        entry.offset = placement.offset
        entry.storage = self.memory[placement.offset : placement.offset + placement.nbytes]
        self.residents[placement.name] = entry
        self._spans.add(entry.offset, placement.nbytes, entry)
        self._ledger.hold(self.tier, entry.block.bytes_by_kind)
        if placement.fresh or not entry.written:
            entry.residency = Residency.RESERVED
        else:
            self._fetch(entry)
