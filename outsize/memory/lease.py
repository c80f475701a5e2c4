"""What a user of the store holds: bytes near compute that stay put."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch

from outsize.memory.entry import Entry
from outsize.memory.foresight import Touch


class Lender(Protocol):
    """What a lease wants of its store."""

    def _change(self, entry: Entry) -> None: ...

    def _change_both(self, entry: Entry) -> torch.Tensor | None: ...

    def _give(self, entry: Entry, touch: Touch) -> None: ...


class Lease:
    """A pinned copy of a block near compute, for as long as someone uses it. End it with `release` or `drop`."""

    def __init__(self, store: Lender, entry: Entry) -> None:
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

    def change_both(self) -> dict[str, torch.Tensor] | None:
        """Call before writing the same here and at home, in a device's host's memory: the parts as they lie there. None
        where the block has no such home, or that is behind: then as `change`."""
        home = self._store._change_both(self._entry)
        return None if home is None else self._entry.block.views(home)

    def release(self) -> None:
        self._store._give(self._entry, Touch.GIVE)

    def drop(self) -> None:
        """Release, and forget the bytes: they are written nowhere."""
        self._store._give(self._entry, Touch.DROP)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
