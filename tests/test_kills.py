"""A real run, killed at random instants, ends with the numbers of one that nobody disturbed; with a keeper no step of it is
computed twice."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from soak import Nursery, committed_step, losses, prepare, soak, tail

from outsize.memory import keeper, shared

STEPS = 60


def test_kills_change_no_number(tmp_path: Path) -> None:
    done = soak(tmp_path, kills=6, seed=0, steps=24)
    assert sum(done.kills.values()) == 6
    assert len(done.kills) > 1, f"all kills hit the same place: {done.kills}"


@dataclass
class Kept:
    """Runs whose state a keeper holds. `undisturbed` is what a run that nobody kills has written."""

    nursery: Nursery
    settings: dict[str, Any]
    undisturbed: Path

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    def interrupt(self, number: signal.Signals, after_steps: int) -> tuple[list[str], int]:
        """Train, and send a signal when so many more steps are there. Returns all lines, and the keeper's process."""
        wanted = after_steps + len(self.lines())
        child = self.nursery.begin("train", self.settings, placement="kept")
        while len(self.lines()) < wanted:
            time.sleep(0.001)
        process = keeper_of(self.out)
        os.kill(child, number)
        self.nursery.end()
        return self.lines(), process

    def lines(self) -> list[str]:
        path = self.out / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def finish(self, placement: str = "kept") -> list[str]:
        self.nursery.must("train", self.settings, placement=placement)
        assert losses(self.out) == losses(self.undisturbed)
        for name in ("model/model.safetensors", "model/config.json"):
            assert (self.out / name).read_bytes() == (self.undisturbed / name).read_bytes()
        assert shared.find(self.out / "state") is None and not (self.out / "state" / shared.KEEPER).exists()
        return self.lines()


def keeper_of(out: Path) -> int:
    return json.loads((out / "state" / shared.KEEPER).read_text())["process"]


def wait_until_dead(process: int) -> None:
    while keeper.started(process):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("kept")
    settings = prepare(folder) | {"steps": STEPS, "keep_last": 0, "keep_every": 0}
    nursery = Nursery(folder / "log.txt")
    nursery.must("train", settings | {"out": str(folder / "undisturbed")}, placement="near")
    yield Kept(nursery, settings, folder / "undisturbed")
    nursery.close()


@pytest.fixture
def run(kept: Kept, tmp_path: Path) -> Iterator[Kept]:
    yield Kept(kept.nursery, kept.settings | {"out": str(tmp_path / "run")}, kept.undisturbed)
    if (tmp_path / "run" / "state").exists():
        shared.dismiss(tmp_path / "run" / "state")


@pytest.mark.parametrize("placement", ["kept", "disk"])
def test_a_killed_run_goes_on_at_the_step_a_keeper_holds(placement: str, run: Kept) -> None:
    """Lines carry their seconds, so that the same line is the same step, not one computed again."""
    process = 0
    for after in (3, 5, 7):
        lines, process = run.interrupt(signal.SIGKILL, after)
        assert keeper.started(process), "the keeper outlives the run"
    assert run.finish(placement)[: len(lines) - 1] == lines[:-1]  # the last may have been cut short
    wait_until_dead(process)


def test_when_the_keeper_is_killed_too_the_run_goes_back_to_the_disk(run: Kept) -> None:
    lines, process = run.interrupt(signal.SIGKILL, 5)
    os.kill(process, signal.SIGKILL)
    wait_until_dead(process)
    assert run.finish()[0] != lines[0], "nothing was committed since step 0"


@pytest.mark.parametrize("compress", [False, True])
def test_ctrl_c_and_a_rollback_end_the_keeper(compress: bool, run: Kept) -> None:
    _, process = run.interrupt(signal.SIGINT, 5)
    wait_until_dead(process)
    stopped = committed_step(run.out)
    run.interrupt(signal.SIGKILL, 5)
    process = keeper_of(run.out)
    run.nursery.must("keep", run.settings, compress=compress)
    assert keeper.started(process)
    run.nursery.must("rollback", run.settings, step=stopped)
    wait_until_dead(process)
    run.finish()


@pytest.mark.parametrize("placement", ["kept", "disk"])
def test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_space(
    placement: str, kept: Kept, tmp_path: Path
) -> None:
    """A real file system, and somebody else's file that takes what is left of it while the run goes on."""
    if os.system(f"mount -t tmpfs -o size=16m outsize {tmp_path} 2>/dev/null"):
        pytest.skip("mounting needs root")
    run = Kept(kept.nursery, kept.settings | {"out": str(tmp_path / "run")}, kept.undisturbed)
    try:
        run.nursery.begin("train", run.settings, placement=placement)
        while not run.lines():
            time.sleep(0.001)
        with open(tmp_path / "other", "wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(1 << 12))
        assert run.nursery.end()["code"] == 1
        said = tail(run.nursery.log)
        assert "StorageError" in said and ("No space left" in said or "disk is full" in said), said
        assert str(tmp_path) in said
        (tmp_path / "other").unlink()
        run.finish(placement)
    finally:
        shared.dismiss(tmp_path / "run" / "state")
        os.system(f"umount {tmp_path}")
