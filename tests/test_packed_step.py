"""A packed kept step has every byte of the step, and going back to it leaves one step whole wherever it is cut off."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from committed import BLOCKS, tiny, value_at, whole_state
from crashes import Record, crash_states

from outsize.errors import RunError, StorageError
from outsize.memory.block import make_block
from outsize.memory.tier import PAGE
from outsize.train.packed_step import PackedStep, pack_step, segments
from outsize.train.state import StateFolder


def packed(directory: Path, step: int = 3) -> StateFolder:
    """The kept step in packed form; its extents are free."""
    folder = StateFolder(directory)
    pack_step(folder, folder.read_kept(f"step-{step}"))
    return folder


def test_segments_are_all_bytes_of_a_block() -> None:
    parts = [
        ("a", "weight", torch.float32, (3,)),
        ("b", "moment", torch.bfloat16, (0,)),
        ("c", "moment", torch.bool, ()),
    ]
    block = make_block("odd", parts)
    found = list(segments(block))
    assert [segment.start for segment in found] == [0, *(segment.stop for segment in found[:-1])]
    assert found[-1].stop == block.nbytes and len({segment.name for segment in found}) == len(found)


def test_a_packed_step_has_every_byte(tmp_path: Path) -> None:
    folder = packed(whole_state(tmp_path / "state"))
    held = PackedStep(folder, 3)
    for block in folder.layout().blocks:
        for start, stop in [
            (0, block.nbytes),
            (1, 2),
            (PAGE // 2 - 3, PAGE // 2 + 5),
            (block.nbytes - 1, block.nbytes),
        ]:
            out = torch.zeros(stop - start, dtype=torch.uint8)
            held.read(block, start, out)
            assert torch.all(out == value_at(block.name, 3)), block.name


def test_every_crash_while_going_back_leaves_one_step_whole(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    record = Record(tmp_path / "root")
    with record.recording(), tiny(record.root / "state", record.mark) as state:
        for step in range(5):
            state.advance(asked=step == 3, wait=True)
    folder = packed(record.root / "state")
    begun = len(record.ops)
    with record.recording():
        folder.forget(("step-3",))
        PackedStep(folder, 3).restore()
    choice, found = random.Random(0), []
    for count in range(begun, len(record.ops) + 1):
        for disk in crash_states(record.ops[:count], record.root.stat().st_ino, choice):
            place = tmp_path / "crashed"
            disk.write_to(place)
            shutil.copytree(folder.packed, place / "state" / "packed")
            with tiny(place / "state") as state:
                state.assert_right()
                found.append(state.step)
                if len(found) % 10 == 0:
                    state.advance()
                    state.assert_right()
            shutil.rmtree(place)
    assert set(found) == {3, 4} and found[-1] == 3 and len(found) > 100


def test_what_is_damaged_or_does_not_fit_leaves_the_committed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(whole_state(tmp_path / "state"))
    before = (folder.directory / "manifest").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("outsize.memory.disk._free_bytes", lambda file: PAGE)
        with pytest.raises(StorageError, match="is full"):
            PackedStep(folder, 3).restore()
    manifest = folder.packed / "step-3" / "manifest"
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"step":3', b'"step":2'))
    with pytest.raises(RunError, match="its digest is not that of its content"):
        PackedStep(folder, 3)
    manifest.write_bytes(content)
    assert (folder.directory / "manifest").read_bytes() == before
    with tiny(folder.directory) as state:
        assert state.step == 4
        state.assert_right()
    PackedStep(folder, 3).restore()
    with tiny(folder.directory) as state:
        assert state.step == 3 and set(state.read()) == set(BLOCKS)
        state.assert_right()
