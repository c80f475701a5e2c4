"""Ctrl-C: the first time the step under way is finished and committed, the second time everything stops at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from soak import Nursery, committed_step, losses, prepare, tail

from outsize.memory import shared

STEPS = 20


@dataclass
class Interrupted:
    """A run whose state stays in memory and is committed to disk at step 0 and at the end only."""

    nursery: Nursery
    settings: dict[str, Any]

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    def lines(self) -> list[str]:
        path = self.out / "metrics.jsonl"
        return path.read_text().splitlines() if path.exists() else []

    def interrupt(self, placement: str, twice: bool = False) -> None:
        child = self.nursery.begin("train", self.settings, placement=placement)
        wanted = len(self.lines()) + 4
        while len(self.lines()) < wanted:
            time.sleep(0.001)
        os.kill(child, signal.SIGINT)
        if twice:
            time.sleep(0.001)  # signals that wait together are one
            os.kill(child, signal.SIGINT)
        assert self.nursery.end()["signal"] == 0, "it ends by itself"
        assert "KeyboardInterrupt" in tail(self.nursery.log)
        assert shared.find(self.out / "state") is None and not (self.out / "state" / shared.KEEPER).exists()

    def finish(self, placement: str, undisturbed: Path) -> None:
        self.nursery.must("train", self.settings, placement=placement)
        assert losses(self.out) == losses(undisturbed)
        written = (self.out / "model" / "model.safetensors").read_bytes()
        assert written == (undisturbed / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=[None, 1.0], ids=["", "clip"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interrupted]:
    """With clipping, the update of a step is held until the next one, or until the run stops."""
    folder = tmp_path_factory.mktemp("interrupted")
    own = {"steps": STEPS, "clip": request.param, "commit_every": 1000, "keep_last": 0, "keep_every": 0}
    settings = prepare(folder) | own | {"out": str(folder / "undisturbed")}
    nursery = Nursery(folder / "log.txt")
    nursery.must("train", settings, placement="near")
    yield Interrupted(nursery, settings)
    nursery.close()


@pytest.mark.parametrize("placement", ["near", "mixed", "kept"])
def test_the_first_time_no_step_is_lost(placement: str, begun: Interrupted, tmp_path: Path) -> None:
    """Lines carry their seconds: the same line is the same step, not one computed again."""
    run = Interrupted(begun.nursery, begun.settings | {"out": str(tmp_path / "run")})
    run.interrupt(placement)
    done = run.lines()
    assert committed_step(run.out) == len(done) < STEPS
    run.finish(placement, begun.out)
    assert run.lines()[: len(done)] == done


def test_the_second_time_the_run_stops_at_once_and_goes_on_at_its_last_commit(
    begun: Interrupted, tmp_path: Path
) -> None:
    run = Interrupted(begun.nursery, begun.settings | {"out": str(tmp_path / "run")})
    run.interrupt("near", twice=True)
    begun.nursery.must("verify", run.settings)
    run.finish("disk", begun.out)
