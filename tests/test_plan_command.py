"""`outsize plan` as a person uses it, and `outsize train --plan` after the plan was edited."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import tiny_model, write_model
from typer.testing import CliRunner

from outsize.api import planning
from outsize.cli import app
from outsize.errors import OptionError
from outsize.plan import Plan
from outsize.planner.check import read_plan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose larger weights need not stay near."""
    folder = write_model(tmp_path_factory.mktemp("inputs") / "model")
    tiny_model("llama", tied=True, layers=2, hidden=512).save_pretrained(folder)
    return folder


def plan(model: Path, *more: object) -> str:
    options = ["--model", model, "--memory", "3GiB", "--sequence-length", 32, "--machine", "laptop", *more]
    done = CliRunner().invoke(app, ["plan", *map(str, options)])
    assert done.exit_code == 0, done.output
    return done.stdout


def planned(model: Path, *more: object) -> Plan:
    return Plan.from_json(plan(model, "--json", *more))


def test_a_plan_is_shown_kept_drawn_and_traced(model: Path, tmp_path: Path) -> None:
    kept = [f"--{what}={tmp_path / name}" for what, name in
            (("save", "plan.json"), ("picture", "step.png"), ("trace", "trace.json"))]  # fmt: skip
    shown = plan(model, *kept)
    assert shown.strip() == str(read_plan(tmp_path / "plan.json"))
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_sizes_are_compared(model: Path, tmp_path: Path) -> None:
    found = json.loads(plan(model, "--compare", "100MiB, 4GiB", "--json", "--picture", tmp_path / "sizes.png"))
    assert list(found) == ["100MiB", "3GiB", "4GiB"]
    assert "is too small" in found["100MiB"]
    assert found["4GiB"]["memory_bytes"] == 4 << 30
    assert (tmp_path / "sizes.png").exists()


def test_a_comparison_is_a_table_that_says_what_would_do(model: Path) -> None:
    head, small, *others = plan(model, "--compare", "100MiB,4GiB").splitlines()
    assert head.split() == ["memory", "peak", "s/step", "tokens/s", "waiting", "read", "written", "numbers"]
    assert [line.split()[0] for line in others] == ["3GiB", "4GiB"]
    assert all(len(line) <= 80 for line in (head, small, *others))
    needed = re.fullmatch(r"100MiB +does not fit; ([0-9]+)MiB is the smallest that does", small)
    assert needed is not None
    assert planned(
        model, "--compare", "", "--memory", f"{8 + int(needed[1])}MiB"
    ).predicted  # no two processes are alike


def test_what_is_compared_differs_by_memory_alone(model: Path) -> None:
    """Prices are measured on this machine, where no two measurements come out the same."""
    within = planning(str(model), sequence_length=32)
    few, many, again = (within(size).predicted for size in ("3GiB", "4GiB", "3GiB"))
    assert few is not None and many is not None and again is not None
    assert few.compute_seconds == many.compute_seconds
    assert few.timeline == again.timeline and few.host_peak_bytes == again.host_peak_bytes


@pytest.mark.parametrize("what", ["--save", "--trace"])
def test_what_is_of_one_plan_is_refused_for_several(model: Path, tmp_path: Path, what: str) -> None:
    options = ["plan", "--model", str(model), "--memory", "3GiB", "--compare", "4GiB", what, str(tmp_path / "kept")]
    done = CliRunner().invoke(app, options)
    assert isinstance(done.exception, OptionError) and "are of one plan" in str(done.exception)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("serve", ["--pipeline"], "--pipeline is for --task train, and this is serve"),
        ("serve", ["--clip", "1"], "--clip is for --task train"),
        ("serve", ["--optimizer-option", "momentum=0.9"], "--optimizer-option is for --task train"),
        ("train", ["--step-tokens", "512"], "--step-tokens is for --task serve, and this is train"),
    ],
)
def test_an_option_of_another_task_is_refused(model: Path, task: str, option: list[str], message: str) -> None:
    """It would change nothing; whether it says what would be so anyway does not matter."""
    done = CliRunner().invoke(app, ["plan", "--model", str(model), "--memory", "3GiB", "--task", task, *option])
    assert isinstance(done.exception, OptionError) and message in str(done.exception)


def test_the_optimizers_options_count(model: Path) -> None:
    bare, momentum = (
        planned(model, "--optimizer", "sgd", *more) for more in ((), ("--optimizer-option", "momentum=0.9"))
    )
    assert bare.predicted is not None and momentum.predicted is not None
    assert momentum.predicted.disk_bytes > bare.predicted.disk_bytes


def test_an_edited_plan_is_obeyed(model: Path, tmp_path: Path) -> None:
    far = replace(planned(model), near_states=frozenset(), shared_bytes=0, arena_bytes=32 << 20)
    (tmp_path / "plan.json").write_text(far.to_json())
    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 200}" for number in range(400)))
    options = ["--model", model, "--data", tmp_path / "text.txt", "--sequence-length", 32]
    options += ["--plan", tmp_path / "plan.json", "--out", tmp_path / "run", "--steps", 4]
    command = [sys.executable, "-m", "outsize", "train", *map(str, options)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["memory_bytes"] == far.memory_bytes == 3 << 30
    assert report["moved"]["read"].keys() == {"master", "moment"}
    assert report["planned"]["disk_bytes"] == report["measured"]["disk_bytes"]
    assert (tmp_path / "run" / "timeline.png").stat().st_size > 0
