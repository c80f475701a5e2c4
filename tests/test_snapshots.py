"""State that stays in memory is written to disk while the next step computes: nothing waits but what is about to change."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from outsize.memory.block import make_block
from outsize.memory.disk import DiskTier
from outsize.memory.homes import Committed
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.store import Store
from outsize.memory.tier import PAGE, Extent
from outsize.memory.transfer import Transfers

NAMES = ("a", "b", "c")


class GatedDisk(DiskTier):
    """Every write waits for `gate`, and is noted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, 1 << 20)
        self.gate = threading.Semaphore(0)
        self.values: list[int] = []

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        self.gate.acquire()
        self.values.append(int(source[0]))
        super().write(extent, offset, source)


def make_store(disk: GatedDisk) -> Store:
    store = Store({"host": HostTier(1 << 20), "disk": disk}, PAGE, allocate_slab, Transfers(), checked=True)
    for name in NAMES:
        store.create(make_block(name, [("data", "weight", torch.uint8, (PAGE,))]), "host")
    return store


def change(store: Store, name: str, value: int) -> None:
    with store.lease(name) as lease:
        lease.change()
        lease.bytes.fill_(value)


def test_only_a_block_about_to_change_waits_for_its_snapshot(tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path / "blocks")
    store = make_store(disk)
    for name, value in (("c", 3), ("a", 1), ("b", 2)):
        change(store, name, value)
    published: list[dict[str, Committed]] = []
    ticket = store.commit(published.append)
    for name in NAMES:
        store.lease(name).release()  # forward and backward read everything meanwhile
    assert disk.values == [] and not ticket.done

    changed = threading.Thread(target=change, args=(store, "c", 13))
    changed.start()
    disk.gate.release()
    changed.join()  # c came first, as it changed first: one write through is enough
    assert disk.values == [3] and not ticket.done
    assert store.waiting_seconds["write"] > 0

    disk.gate.release(2)
    ticket.wait()
    assert disk.values == [3, 1, 2], "in the order of change"
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        extent = published[0][name].extent
        assert extent is not None
        found = allocate_slab(PAGE)
        disk.read(extent, 0, found)
        assert torch.all(found == value), f"{name} is not as it was at the commit"
    store.close()


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path / "blocks")
    store = make_store(disk)
    disk.gate.release(9)
    for name in NAMES:
        change(store, name, 1)
    store.commit(lambda places: None, wait=True)
    change(store, "b", 2)
    store.commit(lambda places: None, wait=True)
    assert disk.values == [1, 1, 1, 2]
    store.remove("b")
    store.commit(lambda places: None, wait=True)
    store.close()
