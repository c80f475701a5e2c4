"""The store against a plain dict: random leases, writes, drops and commits in an arena too small for all of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from outsize.errors import BudgetError, DamageError, StorageError
from outsize.memory.block import make_block
from outsize.memory.device import DeviceTier
from outsize.memory.disk import DiskTier
from outsize.memory.entry import Residency
from outsize.memory.homes import Committed
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.layout import Policy, evict_farthest, evict_oldest
from outsize.memory.store import Lease, Store
from outsize.memory.tier import PAGE, Extent
from outsize.memory.transfer import Transfers

SIZES = (1, 2, 3, 5)  # pages


def make_store(directory: Path, near_pages: int = 12, policy: Policy = evict_oldest) -> Store:
    tiers = {"host": HostTier(1 << 30), "disk": DiskTier(directory / "blocks", 1 << 30)}
    return Store(tiers, near_pages * PAGE, allocate_slab, Transfers(), policy=policy)


def add(store: Store, name: str, pages: int, home: str = "disk", durable: bool = True) -> None:
    store.create(make_block(name, [("data", "weight", torch.uint8, (pages * PAGE,))]), home, durable)


def put(store: Store, name: str, value: int) -> None:
    with store.lease(name, fresh=True) as lease:
        lease.tensors["data"].fill_(value)


operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "fresh", "commit", "drop", "two"]), st.integers(0, 7), st.integers(0, 255)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, min_size=1, max_size=4), repeats=st.integers(1, 3), farthest=st.booleans())
def test_store_equals_a_dict(tmp_path_factory: pytest.TempPathFactory, steps, repeats, farthest) -> None:
    store = make_store(tmp_path_factory.mktemp("store"), policy=evict_farthest if farthest else evict_oldest)
    expected = {}
    for index in range(8):
        add(store, str(index), SIZES[index % 4], home="host" if index == 7 else "disk", durable=index != 6)
        expected[str(index)] = index if index % 3 else 0
        if index % 3:  # the others were never written: zeros
            put(store, str(index), index)
    for number, step in enumerate(steps):
        for _ in range(repeats):  # the second time round, the trace is foreseen
            with store.phase(str(number % 2), again=True):
                for verb, index, value in step:
                    apply(store, expected, verb, str(index), value)
            store.flush()
            store.check()
    for name, value in expected.items():
        with store.lease(name) as lease:
            assert torch.all(lease.tensors["data"] == value), name
    store.check()
    store.close()


def apply(store: Store, expected: dict[str, int], verb: str, name: str, value: int) -> None:
    if verb == "commit":
        store.commit(lambda places: None)
    elif verb == "fresh":
        put(store, name, value)
        expected[name] = value
    elif verb == "drop":
        transient = store.lease(name, fresh=True)
        transient.tensors["data"].fill_(9)
        transient.release()
        put(store, name, value)
        expected[name] = value
    else:
        with store.lease(name) as lease:
            assert torch.all(lease.tensors["data"] == expected[name]), (verb, name)
            if verb == "write":
                lease.change()
                lease.tensors["data"].fill_(value)
                expected[name] = value
            if verb == "two":
                with store.lease("0") as other:
                    assert torch.all(other.tensors["data"] == expected["0"])


def test_rows_come_from_disk_into_a_tensor_of_inference_mode(tmp_path: Path) -> None:
    store = make_store(tmp_path, near_pages=4)
    store.create(make_block("table", [("data", "weight", torch.uint8, (10, 1000))]), "disk")
    put(store, "table", 3)
    add(store, "other", 4)
    put(store, "other", 1)  # takes all the room near
    store.flush()
    with torch.inference_mode():
        rows = torch.zeros(2, 1000, dtype=torch.uint8)
        store.read_rows("table", "data", [1, 7], rows)
        assert torch.all(rows == 3) and rows.is_inference()
    assert store.ledger.total_moved("disk", "host") == 2000
    store.close()


def test_a_foreseen_phase_moves_the_same_bytes_every_time(tmp_path: Path) -> None:
    store = make_store(tmp_path, near_pages=8)
    for index in range(6):
        add(store, str(index), 3)
        put(store, str(index), index)
    moved = []
    for _ in range(6):
        before = store.ledger.total_moved("disk", "host")
        with store.phase("there and back", again=True):
            for index in [*range(6), *reversed(range(6))]:
                with store.lease(str(index)) as lease:
                    assert torch.all(lease.tensors["data"] == index)
        store.flush()
        moved.append(store.ledger.total_moved("disk", "host") - before)
    assert len(set(moved[2:])) == 1, moved
    assert moved[-1] == 8 * 3 * PAGE, "two of six stay near at each of the two turns"
    store.close()


def test_pinned_leases_leave_no_room(tmp_path: Path) -> None:
    store = make_store(tmp_path, near_pages=4)
    for index in range(2):
        add(store, str(index), 3)
        put(store, str(index), index)
    with store.lease("0"), pytest.raises(BudgetError, match="No room near compute for block 1"):
        store.lease("1")
    store.close()


def test_a_commit_keeps_its_bytes_while_the_next_step_writes(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    add(store, "a", 2)
    put(store, "a", 1)
    committed: list[dict[str, Committed]] = []
    store.commit(committed.append, wait=True)
    extent = committed[0]["a"].extent
    assert extent is not None
    for value in (2, 3):
        put(store, "a", value)
    store.flush()
    kept = allocate_slab(extent.nbytes)
    store.tiers["disk"].read(extent, 0, kept)
    assert torch.all(kept == 1)
    store.close()


class Late(DiskTier):
    """A write takes the bytes only when somebody has changed them, or nobody dares to for a while."""

    changed = threading.Event()

    def write(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        self.changed.wait(0.2)
        super().write(extent, offset, source)


def test_what_a_commit_writes_from_a_hosts_memory_does_not_change_meanwhile(tmp_path: Path) -> None:
    """Neither what is leased there, nor what is changed there and on the device at once."""
    disk = Late(tmp_path / "blocks", 1 << 30)
    tiers = {"host": HostTier(1 << 30), "disk": disk, "device": DeviceTier(1 << 30, torch.device("cpu"))}
    store, found = Store(tiers, 4 * PAGE, allocate_slab, Transfers(), "device"), {}
    for name in ("there", "both"):
        store.create(make_block(name, [("data", "weight", torch.uint8, (PAGE,))]), "host", stays=name == "there")
        put(store, name, 1)
    store.flush()
    store.check()
    ticket = store.commit(found.update)
    with store.lease("there") as there, store.lease("both") as both:
        there.change()
        there.bytes.fill_(2)
        disk.changed.set()
        disk.changed.clear()
        twin = both.change_both()
        assert twin is not None
        for bytes_of_both in (twin["data"], both.bytes):
            bytes_of_both.fill_(2)
        disk.changed.set()
    ticket.wait()
    for name in ("there", "both"):
        extent = found[name].extent
        assert extent is not None
        disk.read(extent, 0, kept := torch.zeros(PAGE, dtype=torch.uint8))
        assert torch.all(kept == 1), name
        with store.lease(name) as lease:
            assert torch.all(lease.bytes == 2), name
    assert store.ledger.moved["device", "host", "weight"] == PAGE  # as one of them was put, and never again
    store.commit(found.update, wait=True)
    assert store.ledger.moved["host", "disk", "weight"] == 4 * PAGE
    store.check()
    store.close()


def test_rows_come_from_near_and_from_home(tmp_path: Path) -> None:
    store = make_store(tmp_path, near_pages=6)
    table = torch.randn(100, 20)
    store.create(make_block("table", [("data", "weight", torch.float32, (100, 20))]), "disk")
    with store.lease("table", fresh=True) as lease:
        lease.tensors["data"].copy_(table)
    rows = [0, 1, 2, 50, 98, 99]
    near, far = torch.empty(6, 20), torch.empty(6, 20)
    store.read_rows("table", "data", rows, near)
    add(store, "other", 6)
    put(store, "other", 1)
    store.flush()
    assert store.entries["table"].storage is None
    store.read_rows("table", "data", rows, far)
    assert torch.equal(near, table[rows]) and torch.equal(far, table[rows])
    store.close()


def test_a_block_taken_again_fresh_is_not_moved_while_its_old_bytes_are_wanted(tmp_path: Path) -> None:
    """As a gradient that one step writes and the next applies, with look-ahead that reaches into the next step."""
    store = make_store(tmp_path, near_pages=12)
    for name in ("gradient", "weight"):
        add(store, name, 1, durable=False)
        put(store, name, 7)
    for step in range(6):
        with store.phase("step", again=True):
            if step:
                held = store.lease("gradient")
                assert torch.all(held.tensors["data"] == step - 1)
                held.drop()
            for _ in range(3):
                with store.lease("weight"):
                    pass
            put(store, "gradient", step)
    store.flush()
    store.check()
    store.close()


spans = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.booleans()), min_size=4, max_size=30)


def lease_round(store: Store, touched: list[tuple[int, int, bool]], expected: dict[str, int]) -> None:
    """Each block is leased, perhaps written to, and held until so many others were."""
    held: list[tuple[int, Lease]] = []
    try:
        with store.phase("round", again=True):
            for now, (index, others, change) in enumerate(touched):
                for _, lease in [pair for pair in held if pair[0] < now]:
                    lease.release()
                held = [pair for pair in held if pair[0] >= now]
                name = str(index)
                held.append((now + others, store.lease(name)))
                data = held[-1][1].tensors["data"]
                assert torch.all(data == expected[name]), name
                if change:
                    held[-1][1].change()
                    expected[name] = (expected[name] + 1) % 256
                    data.fill_(expected[name])
            while held:
                held.pop()[1].release()
    finally:
        for _, lease in held:
            lease.release()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(touched=spans)
def test_a_round_that_finds_room_in_an_empty_arena_always_does(
    tmp_path_factory: pytest.TempPathFactory, touched
) -> None:
    """Layouts follow from one another for as long as a run lasts; none may be the last."""
    store = make_store(tmp_path_factory.mktemp("store"), near_pages=14)
    expected = {str(index): index for index in range(10)}
    for name, value in expected.items():
        add(store, name, SIZES[value % 4])
        put(store, name, value)
    try:
        lease_round(store, touched, expected)
        store.need_room("round")
    except BudgetError:
        reject()
    for _ in range(20):
        lease_round(store, touched, expected)
        store.check()
    store.close()


class FailingOnce(DiskTier):
    """The next read after `fails` was set does."""

    fails = False

    def read(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        if self.fails:
            self.fails = False
            raise StorageError("the disk has failed")
        super().read(extent, offset, target)


def test_a_read_ahead_that_failed_before_anybody_waited_is_not_taken_for_the_block(tmp_path: Path) -> None:
    disk = FailingOnce(tmp_path / "blocks", 1 << 30)
    store = Store({"host": HostTier(1 << 30), "disk": disk}, 4 * PAGE, allocate_slab, Transfers())
    for name in "abc":
        add(store, name, 2)
        put(store, name, ord(name))
    for _ in range(3):
        go_round(store)
    with store.phase("round", again=True):
        with store.lease("a"):
            store.flush()
            disk.fails = True
        with store.lease("b"):
            await_read(store, "c")  # in the place of a
        with pytest.raises(StorageError, match="the disk has failed"):
            store.lease("c")


def await_read(store: Store, name: str) -> None:
    """Return when the block has been read ahead, or could not be."""
    end = time.monotonic() + 20
    entry = store.entries[name]
    while entry.residency is not Residency.COMING or entry.ticket is not None:
        assert time.monotonic() < end and entry.residency is not Residency.NEAR, f"{name} is {entry.residency}"
        time.sleep(0.001)


def go_round(store: Store) -> None:
    with store.phase("round", again=True):
        for name in "abc":
            with store.lease(name) as lease:
                assert torch.all(lease.tensors["data"] == ord(name))


def test_blocks_that_stay_near_are_read_back_side_by_side(tmp_path: Path) -> None:
    committed: dict[str, Committed] = {}
    names = [str(index) for index in range(20)]
    tiers = {"host": HostTier(1 << 30), "disk": DiskTier(tmp_path / "blocks", 1 << 30)}
    store = Store(tiers, PAGE, allocate_slab, Transfers(), checked=True)
    for index, name in enumerate(names):
        add(store, name, 3, home="host")
        put(store, name, index)
    store.commit(committed.update, wait=True)
    store.close()

    again = recovered(tmp_path, committed)
    for name in names:
        add(again, name, 3, home="host")
    with again.lease("19") as last:  # not waiting for a flush
        assert torch.all(last.tensors["data"] == 19)
    again.flush()
    again.check()
    assert again.ledger.total_moved("disk", "host") == 20 * 3 * PAGE
    for index, name in enumerate(names):
        with again.lease(name) as lease:
            assert torch.all(lease.tensors["data"] == index)
    again.close()

    place = committed["7"].extent
    assert place is not None
    with open(tmp_path / "blocks", "r+b") as file:
        file.seek(place.start + 5)
        file.write(b"x")
    damaged = recovered(tmp_path, committed)
    for name in names:
        add(damaged, name, 3, home="host")
    with pytest.raises(DamageError, match="Block 7 is damaged"):
        damaged.flush()
    with pytest.raises(DamageError, match="Block 7 is damaged"):
        damaged.lease("7")


def recovered(directory: Path, committed: dict[str, Committed]) -> Store:
    tiers = {"host": HostTier(1 << 30), "disk": DiskTier(directory / "blocks", 1 << 30)}
    store = Store(tiers, PAGE, allocate_slab, Transfers(), checked=True)
    store.homes.recover(committed, {})
    return store
