"""A run on a disk that passes 200 MB/s, whatever the machine's file says: the command `outsize`."""

from __future__ import annotations

from functools import partial
from threading import Lock
from time import sleep

import torch

import outsize.training
from outsize.cli import main
from outsize.memory.disk import DiskTier
from outsize.memory.tier import Extent, Tier
from outsize.train.state import open_store

RATE = 200e6  # bytes a second, of all threads together


class SlowDisk(DiskTier):
    def __init__(self, disk: Tier) -> None:
        assert isinstance(disk, DiskTier)
        disk.close()
        super().__init__(disk.path)
        self._queue = Lock()

    def read(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        with self._queue:
            sleep(target.numel() / RATE)
        super().read(extent, offset, target)

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        with self._queue:
            sleep(source.numel() / RATE)
        super().write(extent, offset, source)


if __name__ == "__main__":
    outsize.training.open_store = partial(open_store, wrap_disk=SlowDisk)
    main()
