"""What a device's host needs to update a weight: its numbers come there piece by piece, and go back when they are stepped."""

from __future__ import annotations

import torch

from outsize.memory.host import allocate_slab
from outsize.memory.store import Store


class HostSide:
    """Buffers in the host's memory, one of each kind of bytes, as large as the largest piece that came. Copies are waited
    for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._buffers: dict[str, torch.Tensor] = {}

    def bring(self, kind: str, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers (1-D, of the memory that computes) in the host's, until the next of that kind come."""
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.numel() < numbers.nbytes:
            buffer = self._buffers[kind] = allocate_slab(numbers.nbytes, pinned=numbers.is_cuda)
        found = buffer[: numbers.nbytes].view(numbers.dtype)
        self._store.ledger.move(self._store.near, "host", {kind: numbers.nbytes})
        return found.copy_(numbers)

    def give_back(self, kind: str, numbers: torch.Tensor, target: torch.Tensor) -> None:
        """Into the memory that computes."""
        self._store.ledger.move("host", self._store.near, {kind: numbers.nbytes})
        target.copy_(numbers)
