"""A block of the store and where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from outsize.memory.block import Block
from outsize.memory.tier import Extent, Tier
from outsize.memory.transfer import Ticket


class Residency(Enum):
    """Where a block's current bytes are. Each docstring line says what occupies memory."""

    EMPTY = "empty"  # nowhere: created, never written; at most an extent is reserved at home
    FAR = "far"  # at home only; nothing near
    RESERVED = "reserved"  # as EMPTY or FAR, and a place near: a fresh lease will fill it, any other finds zeros
    COMING = "coming"  # at home, and a place near that is being filled
    NEAR = "near"  # at home and near, both the same
    CHANGED = "changed"  # near only: a lease has written, home is stale
    LEAVING = "leaving"  # near, and on its way home
    STAYING = "staying"  # at home in memory, near or not, where it is leased


@dataclass
class Entry:
    """A block and where it is. A durable block has two extents on disk, so that a committed copy is never overwritten; what
    lives in memory that is not near has a `slot` there besides."""

    block: Block
    home: Tier
    durable: bool
    residency: Residency
    slot: Extent | None = None  # where its bytes at home are, if that is neither near nor where it is committed
    extent: Extent | None = (
        None  # where its bytes at home are, or will be; with a slot, where they are committed from it
    )
    committed: Extent | None = None  # where the last commit has them; often the same
    spare: Extent | None = None  # where they go next, when `extent` must stay as it is
    written: bool = False  # home holds the block's bytes, of some step, or will when its write is through
    offset: int = -1  # in the near arena; -1 when not there
    storage: torch.Tensor | None = None  # the block's bytes near, 1-D uint8
    copies: int = 1  # near; 2 with a twin in shared memory
    pins: int = 0
    ticket: Ticket | None = None
    saving: Ticket | None = None  # of a commit's write from the slot

    @property
    def stays_apart(self) -> bool:
        """It is leased at home, which is not near."""
        return self.residency is Residency.STAYING and self.slot is not None

    def check(self, resident: bool) -> None:
        """Of a block that nobody leases; `resident`: it has a place in the arena. Raises AssertionError."""
        assert self.pins == 0, f"{self.block.name} is still leased {self.pins} times"
        elsewhere = self.residency in (Residency.EMPTY, Residency.FAR, Residency.STAYING)
        assert elsewhere != resident, f"{self.block.name} is {self.residency.value} but not in its place"
