"""The commit protocol: whatever a crash, a failing disk or a flipped bit leaves, a step is there whole or said not to be."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
from committed import BLOCKS, Tiny, assert_kept_right, detected, flip, flips, tiny, value_at, whole_state
from crashes import Disk, Record, crash_states, failing_at

from outsize.errors import DamageError, RunError, StorageError
from outsize.memory.tier import PAGE
from outsize.train.retention import Retention
from outsize.train.state import StateFolder
from outsize.train.verify import Verifier

KEEPING = Retention(last=2, every=3)
STEPS = 6


def recorded(root: Path) -> Record:
    """All that a run of six steps does to the disk, with kept steps coming and going."""
    record = Record(root)
    with record.recording(), tiny(root / "state", record.mark) as state:
        for _ in range(STEPS + 1):
            state.advance(KEEPING)
    return record


def promised(record: Record, count: int) -> tuple[int, int]:
    """After so many changes: the last step that was reported as committed, and the last that was begun. -1: none."""
    notes = [op.what for op in record.ops[:count] if op.kind == "mark"]
    return tuple(max((note[1] for note in notes if note[0] == what), default=-1) for what in ("done", "begun"))  # pyright: ignore


def kept_after(record: Record, count: int) -> tuple[set[int], set[int]]:
    """Steps that must be kept after so many changes, and those that may."""
    must: set[int] = set()
    may: set[int] = set()
    for op in record.ops[:count]:
        if op.kind == "mark":
            what, step, keep, drop = op.what
            gone = {int(name.rpartition("-")[2]) for name in drop}
            must -= gone
            may |= {step} if keep else set()
            if what == "done":
                must |= {step} if keep else set()
                may -= gone
    return must, may


def check(place: Path, record: Record, count: int, goes_on: bool) -> int:
    """Recovery finds the last committed step, or the one that was being committed. Returns it."""
    done, begun = promised(record, count)
    manifest = StateFolder(place / "state").read()
    if manifest is None:
        assert done == -1, f"step {done} was committed, and nothing is there"
        return -1
    assert done <= manifest.step <= begun
    must, may = kept_after(record, count)
    assert must <= set(assert_kept_right(place / "state")) <= may
    with tiny(place / "state") as state:
        assert state.step == manifest.step
        state.assert_right()
        if goes_on:
            for _ in range(3):
                state.advance(Retention(last=1), asked=state.step % 2 == 0)
            state.store.flush()
            state.assert_right()
            state.store.check()
    if goes_on:
        assert manifest.step + 3 in {*assert_kept_right(place / "state"), manifest.step + 3}
    return manifest.step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return recorded(tmp_path_factory.mktemp("recorded"))


def test_every_state_a_crash_can_leave_is_one_step_whole(run: Record, tmp_path: Path) -> None:
    choice = random.Random(0)
    found: dict[int, int] = {}
    number = 0
    for count in range(len(run.ops) + 1):
        for disk in crash_states(run.ops[:count], run.root.stat().st_ino, choice):
            place = tmp_path / "crashed"
            disk.write_to(place)
            if (place / "state").exists():
                step = check(place, run, count, goes_on=number % 10 == 0)
                found[step] = found.get(step, 0) + 1
            shutil.rmtree(place)
            number += 1
    assert set(found) == {*range(-1, STEPS + 1)}, "every step was found by some recovery"
    assert number > 1000, number


def test_a_protocol_without_its_syncs_would_be_caught(run: Record, tmp_path: Path) -> None:
    """The enumeration is worth something: leave out what makes the data durable first, and it finds a mixture. The
    checksums know it for what it is."""
    without = Record(run.root, [op for op in run.ops if op.kind != "sync" or not _is_blocks(run, op.target)])
    choice = random.Random(0)
    damaged = 0
    for count in range(0, len(without.ops) + 1, 7):
        for disk in crash_states(without.ops[:count], run.root.stat().st_ino, choice):
            damaged += refused_or_right(disk, tmp_path / "crashed", promised(without, count)[1])
    assert damaged > 0


def _is_blocks(run: Record, inode: int) -> bool:
    return any(op.kind == "create" and op.what == ("blocks", inode) for op in run.ops)


def refused_or_right(disk: Disk, place: Path, begun: int) -> bool:
    """Recovery gives the numbers of some step, or says that they are damaged: True for that."""
    disk.write_to(place)
    try:
        if (place / "state" / "manifest").exists():
            with tiny(place / "state") as state:
                assert -1 <= state.step <= begun
                state.assert_right()
        return False
    except (DamageError, RunError, StorageError):
        return True
    finally:
        shutil.rmtree(place)


def test_a_disk_that_forgets_what_it_called_durable_is_found_out(run: Record, tmp_path: Path) -> None:
    choice = random.Random(1)
    outcomes = [
        refused_or_right(disk, tmp_path / "crashed", promised(run, count)[1])
        for count in range(0, len(run.ops) + 1, 7)
        for disk in crash_states(run.ops[:count], run.root.stat().st_ino, choice, lost_syncs=True)
    ]
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize(("code", "lasts"), [(errno.EIO, True), (errno.EIO, False), (errno.ENOSPC, True)])
def test_a_disk_that_fails_at_any_call_loses_no_committed_step(
    code: int, lasts: bool, run: Record, tmp_path: Path
) -> None:
    last = max(number for number, op in enumerate(run.ops) if op.kind == "sync")
    for number in range(last - 5):  # the two threads' changes are not always numbered alike
        root = tmp_path / f"failing{number}"
        root.mkdir()
        record = Record(root)
        with record.recording(failing_at(number, code, lasts)), pytest.raises(StorageError) as caught:
            fail_while_committing(root, record)
        said = str(caught.value)
        assert str(root) in said and (os.strerror(code) in said or "is full" in said), said
        if (root / "state" / "layout").exists():
            check(root, record, len(record.ops), goes_on=number % 5 == 0)
        shutil.rmtree(root)


def fail_while_committing(root: Path, record: Record) -> None:
    state = Tiny(root / "state", record.mark)
    try:
        for _ in range(STEPS + 1):
            state.advance(KEEPING)
        state.store.transfers.drain()
    finally:
        state.close()


def test_writes_and_reads_that_stop_halfway_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path)
    with record.recording(lambda call, number: PAGE if call == "pwritev" else None), tiny(tmp_path / "state") as state:
        for _ in range(3):
            state.advance(wait=True)
    assert max(len(op.what[1]) for op in record.ops if op.kind == "write" and _is_blocks(record, op.target)) == PAGE
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, start: whole(file, [views[0][:PAGE]], start))
    with tiny(tmp_path / "state") as state:
        state.assert_right()


def test_a_commit_that_fails_stops_what_would_overwrite_the_one_before(tmp_path: Path) -> None:
    state = Tiny(tmp_path / "state")
    state.advance(wait=True)
    state.advance()

    def fail(places: object) -> None:
        raise OSError(errno.EIO, "no manifest")

    def write(value: int) -> None:
        for name in ("a", "b", "c"):
            with state.store.lease(name, fresh=True) as lease:
                lease.bytes.fill_(value)

    write(8)
    state.store.commit(fail)
    with pytest.raises(OSError, match="no manifest"):
        write(9)
        write(10)
        state.store.flush()
    with pytest.raises(OSError, match="no manifest"):
        state.store.transfers.drain()
    state.close()
    with tiny(tmp_path / "state") as again:
        assert again.step == 1
        again.assert_right()


def test_kept_steps_cost_what_was_rewritten_and_come_back_exactly(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    with tiny(directory) as state:
        for _ in range(3):
            state.advance(wait=True)
        used = state.store.tiers["disk"].used
        state.advance(asked=True, wait=True)
        state.advance(wait=True)
        state.advance(wait=True)
        rewritten = sum(pages for name, pages in BLOCKS.items() if name not in ("frozen", "d"))
        assert state.store.tiers["disk"].used == used + rewritten * PAGE
        assert state.store.ledger.held_in("disk") == state.store.tiers["disk"].used
        state.store.check()
    with tiny(directory) as state:
        for _ in range(4):
            state.advance(wait=True)
        everything = rewritten + BLOCKS["d"]
        assert state.store.tiers["disk"].used == used + everything * PAGE, "steps 6 and 9 rewrote d"
    folder = StateFolder(directory).lock()
    folder.roll_back("step-3")
    folder.close()
    with tiny(directory) as state:
        assert state.step == 3
        state.assert_right()
        for _ in range(3):
            state.advance(wait=True)
        state.assert_right()
    assert assert_kept_right(directory) == [3]


def test_a_step_that_is_let_go_gives_its_space_back(tmp_path: Path) -> None:
    with tiny(tmp_path / "state") as state:
        used = []
        for _ in range(24):
            state.advance(Retention(last=2), wait=True)
            used.append(state.store.tiers["disk"].used)
        assert max(used[:12]) == max(used[12:])
        state.advance(wait=True)
        state.advance(wait=True)
        assert state.folder.kept_names() == []
        assert state.store.tiers["disk"].used == PAGE * (2 * sum(BLOCKS.values()) + 1)
    assert assert_kept_right(tmp_path / "state") == []


def test_retention_after_a_rollback_forgets_the_future_that_was_left() -> None:
    kept = ["last-4", "last-5", "step-6", "last-8", "last-9"]
    assert Retention(last=2).choose(6, kept, asked=False) == ("last-6", ("last-4", "last-8", "last-9"))
    assert Retention(every=5).choose(10, kept, asked=False) == ("step-10", ("last-4", "last-5", "last-8", "last-9"))
    assert Retention().choose(7, [], asked=True) == ("step-7", ())
    assert Retention(last=3, every=2).choose(0, [], asked=False) == (None, ())


def test_a_full_disk_says_so_and_the_run_goes_on_once_there_is_space(tmp_path: Path) -> None:
    """A real file system of 200 KiB, and somebody else's file on it."""
    place = tmp_path / "small"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=200k outsize {place} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        state = Tiny(place / "state")
        state.advance(wait=True)
        with open(place / "other", "wb") as other, pytest.raises(OSError):
            while True:
                os.write(other.fileno(), bytes(PAGE))
        with pytest.raises(StorageError, match="is full|could not be written: No space left") as caught:
            for _ in range(9):
                state.advance(asked=True, wait=True)
        assert "start again" in str(caught.value)
        reached = state.folder.read()
        state.close()
        (place / "other").unlink()
        with tiny(place / "state") as again:
            assert reached is not None and again.step == reached.step
            again.assert_right()
            again.advance(wait=True)
            again.assert_right()
    finally:
        os.system(f"umount {place}")


def test_a_folder_that_cannot_be_written_is_refused_and_can_be_read(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m outsize {place} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        with tiny(place / "state") as state:
            state.advance(wait=True)
        os.system(f"mount -o remount,ro {place}")
        with pytest.raises(StorageError, match="state cannot be written: Read-only file system"):
            StateFolder(place / "state").lock()
        verdict = Verifier(StateFolder(place / "state")).committed()
        assert verdict is not None and not verdict.damage
    finally:
        os.system(f"umount {place}")


def test_damage_names_block_tensor_and_place(tmp_path: Path) -> None:
    directory = whole_state(tmp_path / "state")
    folder = StateFolder(directory)
    manifest = folder.read()
    assert manifest is not None
    extent = manifest.places["c"].extent
    assert extent is not None
    flip(folder.blocks, extent.start + 2 * PAGE + 5, 4)
    verdict = Verifier(folder).committed()
    assert verdict is not None
    (said,) = verdict.damage
    assert said.startswith("Block c is damaged: bytes 0 to 12288 of its 12.00 KiB (first, elements 0 to 2048; rest, ")
    with tiny(directory) as state:
        state.store.lease("b").release()
        with pytest.raises(DamageError, match="Block c is damaged"):
            state.store.lease("c")
    assert Verifier(folder).kept("step-3").damage == ()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    directory = whole_state(tmp_path / "state")
    assert not detected(directory)
    assert flips(directory, count=600, seed=0) == 0
    assert not detected(directory)


def test_reading_part_of_a_block_checks_the_pieces_it_touches(tmp_path: Path) -> None:
    directory = whole_state(tmp_path / "state")
    folder = StateFolder(directory)
    manifest = folder.read()
    assert manifest is not None
    place = manifest.places["b"]
    assert place.extent is not None
    from outsize.memory.checksum import CheckedExtents
    from outsize.memory.disk import DiskTier
    from outsize.memory.host import allocate_slab

    block = next(block for block in manifest.layout.blocks if block.name == "b")
    for damage in (False, True):
        if damage:
            flip(folder.blocks, place.extent.start, 1)
        with DiskTier(folder.blocks, writable=False) as disk:
            disk.claim(place.extent)
            checked = CheckedExtents(disk)
            checked.expect(place.extent, place.sums, block)
            few = allocate_slab(PAGE)[:10]
            if damage:
                with pytest.raises(DamageError, match="Block b"):
                    checked.read(place.extent, 5000, few)
            else:
                checked.read(place.extent, 5000, few)
                assert set(few.tolist()) == {value_at("b", 4)}


def test_files_that_do_not_belong_are_refused_by_name(tmp_path: Path) -> None:
    directory = whole_state(tmp_path / "state")
    for name in ("layout", "blocks"):
        (directory / name).rename(tmp_path / name)
        with pytest.raises(RunError, match=f"state/{name}"):
            StateFolder(directory).read()
        (tmp_path / name).rename(directory / name)
    os.truncate(directory / "blocks", PAGE)
    with pytest.raises(StorageError, match="cut short"):
        Tiny(directory)


def test_a_newer_format_and_another_layout_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outsize.train import manifest

    directory = whole_state(tmp_path / "state")
    content = (directory / "manifest").read_bytes()
    monkeypatch.setattr(manifest, "VERSION", manifest.VERSION + 1)
    (directory / "manifest").write_bytes(
        manifest.seal(manifest.json.loads(content.partition(b"\n")[0]) | {"version": 99})
    )
    monkeypatch.undo()
    with pytest.raises(RunError, match="manifest has format version 99; this Outsize reads version 2"):
        StateFolder(directory).read()
    (directory / "manifest").write_bytes(content)
    (directory / "layout").write_bytes(manifest.Layout(()).encode())
    with pytest.raises(RunError, match="files of two runs were mixed"):
        StateFolder(directory).read()


def test_two_processes_on_one_run(tmp_path: Path) -> None:
    with tiny(tmp_path / "state"), pytest.raises(RunError, match="in use by another process"):
        StateFolder(tmp_path / "state").lock()
    StateFolder(tmp_path / "state").lock().close()
