"""Pipelines as a user has them: gone on with by other numbers of workers, killed, and told nonsense."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_workers_run import assert_same, make_settings, said, weights_of
from workers import Crew

from outsize.api import export_run
from outsize.train.optimizer_file import STEM
from outsize.train.settings import TrainSettings, continued, continues, read_settings, record
from outsize.train.state import StateFolder

STEPS = 5


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_settings(tmp_path_factory.mktemp("inputs"), layers=4) | {"steps": STEPS}


def run(gang: Crew, settings: dict[str, Any], workers: int, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    told = {"settings": settings | {"out": str(folder / "run"), "pipeline": workers > 1}}
    gang.call("run", workers, folder, told)
    return folder / "run"


@pytest.fixture(scope="module")
def alone(gang: Crew, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(gang, settings, 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def line(gang: Crew, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two."""
    return run(gang, settings, 2, tmp_path_factory.mktemp("line"))


def test_two_workers_in_line_write_the_model_that_one_worker_writes(alone: Path, line: Path, tmp_path: Path) -> None:
    assert_same(line, alone)
    assert list(weights_of(line)) == list(weights_of(alone))
    mine, others = states_of(line, tmp_path / "mine"), states_of(alone, tmp_path / "others")
    assert mine.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def states_of(run: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The optimizer's, as `outsize checkpoint export --optimizer` writes them."""
    export_run(run, StateFolder(run / "state"), None, folder, optimizer=True, masters=True, compress=False)
    return load_file(folder / f"{STEM}.safetensors")


def test_a_run_goes_on_with_other_numbers_of_workers(
    gang: Crew, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """All have the bits of one worker, with several legs each, too. A worker that is killed is named by the others."""
    given = settings | {"out": str(tmp_path / "run")}
    there_and_back = {"legs_shape": "v", "zero_bubble": True}
    for workers, more, line, victim in (
        (2, there_and_back, 1, 1),
        (1, {}, 2, 0),
        (3, {}, 3, 1),
        (2, {"legs": 4}, STEPS, None),
    ):
        told: dict[str, Any] = {"settings": given | {"pipeline": workers > 1} | more}
        if victim is not None:
            told["kill"] = {"rank": victim, "line": line, "signal": "SIGKILL"}
        codes = gang.attempt("run", workers, tmp_path, told)
        if victim is None:
            assert not any(codes), said(tmp_path, workers)
            break
        assert codes[victim] == -signal.SIGKILL
        for rank in set(range(workers)) - {victim}:
            assert codes[rank] == 1 and f"Worker {victim} is lost" in said(tmp_path, workers)[rank]
    assert_same(tmp_path / "run", alone)
    assert len({(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "run", alone)}) == 1
    mine, others = states_of(tmp_path / "run", tmp_path / "mine"), states_of(alone, tmp_path / "others")
    assert mine.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
    state = tmp_path / "run" / "state"
    assert sorted(path.name for path in state.glob("worker*")) == [f"worker-{rank}-of-2" for rank in range(2)]


def test_tied_tables_clipping_and_evaluation(gang: Crew, settings: dict[str, Any], tmp_path: Path) -> None:
    """The norm is that of the legs' norms, so that clipping scales a little otherwise than one worker's."""
    inputs = make_settings(tmp_path, tied=True)
    given = inputs | {"loss": "blocked", "clip": 0.5, "eval_data": inputs["data"], "eval_every": 2, "steps": 3}
    expected = run(gang, given, 1, tmp_path / "alone")
    found = run(gang, given, 2, tmp_path / "staged")
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-5)


def test_legs_that_workers_share_go_on_without_legs(gang: Crew, settings: dict[str, Any], tmp_path: Path) -> None:
    """With the bits of workers who share the whole model, and each refuses what the others began."""
    pair = tmp_path / "pair"
    pair.mkdir()
    gang.call("run", 2, pair, {"settings": settings | {"out": str(pair / "run")}})
    legs = settings | {"out": str(tmp_path / "run"), "pipeline": True, "legs": 2}
    kill = {"rank": 3, "line": 2, "signal": "SIGKILL"}
    assert gang.attempt("run", 4, tmp_path, {"settings": legs, "kill": kill})[3] == -signal.SIGKILL
    assert gang.attempt("run", 4, tmp_path, {"settings": legs | {"legs": 4}}) == [1] * 4
    assert all("were a pipeline of 2 legs (loop). Give --pipeline without" in log for log in said(tmp_path, 4))
    gang.call("run", 2, tmp_path, {"settings": settings | {"out": str(tmp_path / "run")}})
    assert_same(tmp_path / "run", pair / "run")


def numbers(run: Path) -> list[float]:
    """Losses, norms, and losses of evaluations."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[what] for line in lines for what in ("loss", "gradient_norm", "eval_loss") if what in line]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sample_prompt": "w1"}, "--sample-prompt is for a whole model on each worker"),
        ({"model": "tied", "loss": "module"}, "have one weight"),
        ({"pipeline": False, "legs": 2}, "--legs says how --pipeline divides the model"),
        ({"pipeline": False, "zero_bubble": True}, "--zero-bubble says how --pipeline divides the model"),
        ({"legs_shape": "v", "legs": 2}, "each of 2 workers has two, and these are 2. Leave --legs out, or give 4."),
        (
            {"zero_bubble": True, "legs_shape": "loop"},
            "Give --legs-shape v, and no other --activations than keep; or leave out --zero-bubble.",
        ),
        ({"legs_shape": "w"}, "legs_shape 'w' is unknown; there are loop and v"),
        ({"legs": 3}, "2 workers cannot be equally many for each of 3 legs, or have equally many of them each"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(
    gang: Crew, settings: dict[str, Any], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    if more.get("model") == "tied":
        more = make_settings(tmp_path, tied=True) | {"loss": "module"}
    told = {"settings": settings | {"out": str(tmp_path / "run"), "pipeline": True} | more}
    assert gang.attempt("run", 2, tmp_path, told) == [1, 1]
    assert all(message in log for log in said(tmp_path, 2))


def test_one_worker_is_no_pipeline(gang: Crew, settings: dict[str, Any], tmp_path: Path) -> None:
    """It would train with all layers, as if nothing had been said."""
    told = {"settings": settings | {"out": str(tmp_path / "run"), "pipeline": True}}
    assert gang.attempt("run", 1, tmp_path, told) == [1]
    assert "and there is one. Give --workers 2 or more, or --no-pipeline." in said(tmp_path, 1)[0]
    assert not (tmp_path / "run").exists()


def test_another_number_of_workers_has_other_legs() -> None:
    """What a run was told holds as long as nobody says otherwise; one worker has all layers."""
    known = TrainSettings("model", Path("data"), Path("run"), workers=2, pipeline=True, legs=4, legs_shape="v")
    assert continued(known, {}) == continued(known, {"workers": 2}) == known
    assert continued(known, {"workers": 1}) == replace(known, workers=1, pipeline=False, legs=None, legs_shape=None)
    assert continued(known, {"workers": 3}) == replace(known, workers=3, legs=None, legs_shape=None)
    assert continued(known, {"workers": 4, "legs": 8}) == replace(known, workers=4, legs=8, legs_shape=None)
    assert continued(known, {"pipeline": False}) == replace(known, pipeline=False, legs=None, legs_shape=None)


def test_a_run_without_a_pipeline_may_know_another_default_of_it(tmp_path: Path) -> None:
    """Until the planner chose a pipeline's shape, every run wrote down that it is a loop."""
    settings = TrainSettings("model", tmp_path / "data", tmp_path)
    record(settings)
    file = tmp_path / "run.json"
    said = json.loads(file.read_text())
    said["settings"] |= {"legs_shape": "loop", "zero_bubble": False}
    file.write_text(json.dumps(said))
    assert read_settings(tmp_path) == settings and continues(settings)
    for name in ("pipeline", "legs", "legs_shape", "zero_bubble"):  # and before that there was none
        del said["settings"][name]
    file.write_text(json.dumps(said))
    assert read_settings(tmp_path) == settings


def test_a_pipeline_stays_one(gang: Crew, settings: dict[str, Any], line: Path, tmp_path: Path) -> None:
    """As many workers that divide state instead of layers would find other blocks."""
    for other in ({}, {"pipeline": True, "legs": 8}):
        assert gang.attempt("run", 2, tmp_path, {"settings": settings | {"out": str(line)} | other}) == [1, 1]
        assert all("legs-shape, or another number" in log for log in said(tmp_path, 2))


def test_a_pipeline_keeps_its_shape(gang: Crew, settings: dict[str, Any], line: Path, tmp_path: Path) -> None:
    """It was the planner's choice: one of them may be named."""

    def named(shape: str) -> list[int]:
        more = {"out": str(line), "pipeline": True, "legs_shape": shape}
        return gang.attempt("run", 2, tmp_path, {"settings": settings | more})

    assert sorted(map(named, ("loop", "v"))) == [[0, 0], [1, 1]]
