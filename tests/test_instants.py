"""A command that is killed at any change that it makes on disk can be given again; then all is there and nothing more."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from soak import Nursery, digest, losses, prepare

from outsize.memory import shared

EVERY = bool(os.environ.get("EVERY_INSTANT"))  # as in make soak; otherwise some, always the same
SOME = 6
COMMANDS = {
    "keep": {"compress": False},
    "pack": {"do": "keep", "step": 1, "compress": True},
    "rollback": {"step": 1},
    "roll back to a packed step": {"do": "rollback", "step": 2},
    "drop": {"step": 1},
    "drop a packed step": {"do": "drop", "step": 2},
    "export": {"step": 1, "compress": False, "to": "made"},
    "import": {"source": "finished/model", "compress": True, "to": "made"},
}


@dataclass
class Place:
    """A folder whose changes are heard. `finished` in it is a run of three steps, all kept, the second packed."""

    nursery: Nursery
    settings: dict[str, Any]
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def make(self, do: str, **more: Any) -> dict[str, Any]:
        more = {name: str(self.folder / value) if name in ("to", "source") else value for name, value in more.items()}
        return self.nursery.run(do, self.settings | {"out": str(self.run)}, **more)

    def begin(self, copy: bool) -> None:
        for name in ("run", "made"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        if copy:
            shutil.copytree(self.folder / "finished", self.run, symlinks=True)
        self.nursery.log.unlink(missing_ok=True)

    def left(self) -> list[str]:
        """All names in the folder, when some later command has looked at the run."""
        assert self.make("verify")["code"] == 0
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path != self.nursery.log)

    def changes(self, do: str, **more: Any) -> list[str]:
        """What the command changes when nobody kills it."""
        assert self.make(do, kill_at=1 << 30, **more)["code"] == 0
        return [line for line in self.nursery.log.read_text().splitlines() if line.startswith(("open ", "os."))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("instants")
    settings = prepare(folder) | {"steps": 3, "keep_last": 0, "keep_every": 1, "commit_every": 1}
    made = Place(Nursery(folder / "log.txt"), settings, folder)
    assert made.make("train", placement="near")["code"] == 0
    assert made.make("keep", step=2, compress=True)["code"] == 0
    made.run.rename(folder / "finished")
    yield made
    made.nursery.close()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_at_any_change_can_be_given_again(name: str, place: Place) -> None:
    told = COMMANDS[name] | {"do": COMMANDS[name].get("do", name)}
    place.begin(copy=True)
    changes = place.changes(**told)
    names, result = place.left(), made(place)
    assert changes
    for number in chosen(len(changes)):
        change = changes[number]
        place.begin(copy=True)
        assert place.make(kill_at=number, **told)["signal"] == signal.SIGKILL
        if made(place) != result or told["do"] in ("keep", "rollback"):  # which may be given twice
            assert place.make(**told)["code"] == 0, f"killed before {change}: {place.nursery.log.read_text()}"
        assert place.left() == names, f"killed before {change}"
        assert made(place) == result, f"killed before {change}"


def made(place: Place) -> tuple[str, ...]:
    """What a command may have changed: the committed and kept steps, and what was exported or imported."""
    state = place.run / "state"
    kept = sorted(
        f"{folder}/{path.name}" for folder in ("kept", "packed") for path in (state / folder).glob("[!.]*-*[0-9]")
    )
    return (state / "manifest").read_text()[:30], *kept, digest(place.folder / "made")


@pytest.mark.parametrize("placement", ["kept", "disk"])
def test_a_run_that_is_killed_at_any_change_can_be_started_again(placement: str, place: Place) -> None:
    """From its very first moment: before there is a run. (A keeper may hold a later step than the one that was about to be
    kept; that one is then not kept.)"""
    place = replace(place, settings=place.settings | {"keep_every": int(placement == "disk")})
    place.begin(copy=False)
    changes = place.changes("train", placement=placement)
    names = place.left()
    for number in chosen(len(changes)):
        place.begin(copy=False)
        killed = place.make("train", placement=placement, kill_at=number)
        assert killed["signal"] == signal.SIGKILL
        again = place.make("train", placement=placement)
        assert again["code"] == 0, f"killed before {changes[number]}: {place.nursery.log.read_text()}"
        assert losses(place.run) == losses(place.folder / "finished"), f"killed before {changes[number]}"
        assert digest_of_model(place.run) == digest_of_model(place.folder / "finished")
        assert place.left() == names, f"killed before {changes[number]}"
        assert not (place.run / "state" / shared.KEEPER).exists()


def chosen(count: int) -> list[int]:
    """At which of so many changes to kill."""
    return list(range(count)) if EVERY else sorted(random.Random(count).sample(range(count), min(SOME, count)))


def digest_of_model(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()
