"""Runs of several workers as a user has them: killed, stopped, gone on with by other numbers, and told nonsense."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from committed import flip
from launched import launched
from models import tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from workers import MACHINE, Crew

from outsize.distributed.shares import in_proportion
from outsize.errors import OptionError
from outsize.train.state import StateFolder

STEPS = 8


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_settings(tmp_path_factory.mktemp("inputs"))


def make_settings(folder: Path, tied: bool = False, layers: int = 3) -> dict[str, Any]:
    """Of a run in which a micro-batch is a sequence, so that only the order of sums depends on the number of workers."""
    words = ["<eos>", "<unk>", *(f"w{number}" for number in range(200))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tiny_model("llama", tied=tied, layers=layers, hidden=256).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    (folder / "text.txt").write_text(" ".join(f"w{(7 * number * number) % 200}" for number in range(3000)))
    return {
        "model": str(folder / "model"), "data": str(folder / "text.txt"), "memory": 2 << 30, "steps": STEPS,
        "sequence_length": 16, "accumulate": 4, "precision": "fp32", "loss": "module", "commit_every": 1,
        "learning_rate": 1e-3, "json": True, "worker_timeout": 20.0, "activations": "keep",
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(gang: Crew, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one worker."""
    return run(gang, settings, 1, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def pair(gang: Crew, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run of two."""
    return run(gang, settings, 2, tmp_path_factory.mktemp("pair"))


def run(gang: Crew, settings: dict[str, Any], workers: int, folder: Path) -> Path:
    gang.call("run", workers, folder, {"settings": settings | {"out": str(folder / "run")}})
    return folder / "run"


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, expected: Path) -> None:
    assert losses_of(run) == losses_of(expected)
    for name, weight in weights_of(expected).items():
        assert torch.equal(weights_of(run)[name], weight), name


def said(folder: Path, workers: int) -> list[str]:
    return [(folder / f"log-{rank}").read_text() for rank in range(workers)]


def test_four_workers_of_a_sequence_each_train_as_one_does(
    gang: Crew, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    assert_same(run(gang, settings, 4, tmp_path), alone)


@pytest.mark.parametrize(("victim", "line"), [(0, 2), (1, 5)])
def test_a_killed_worker_is_named_and_the_run_goes_on_with_the_same_numbers(
    gang: Crew, settings: dict[str, Any], pair: Path, tmp_path: Path, victim: int, line: int
) -> None:
    told = {"settings": settings | {"out": str(tmp_path / "run")}}
    codes = gang.attempt("run", 2, tmp_path, told | {"kill": {"rank": victim, "line": line, "signal": "SIGKILL"}})
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert f"Worker {victim} is lost, and worker {1 - victim} stops" in said(tmp_path, 2)[1 - victim]
    assert_same(run(gang, settings, 2, tmp_path), pair)


def test_a_stopped_worker_is_given_up(gang: Crew, settings: dict[str, Any], tmp_path: Path) -> None:
    told = {"settings": settings | {"out": str(tmp_path / "run"), "worker_timeout": 5.0, "steps": 1000}}
    codes = gang.attempt("run", 2, tmp_path, told | {"kill": {"rank": 1, "line": 2, "signal": "SIGSTOP"}})
    assert codes == [1, -signal.SIGKILL]
    assert "Worker 1 has not moved for 5 seconds" in said(tmp_path, 2)[0]


def test_a_run_goes_on_with_other_numbers_of_workers(
    gang: Crew, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """4 and 1 have the bits of one worker; 2 and 3 add in another order."""
    before = 0
    for workers, line, exact in ((4, 2, True), (1, 4, True), (2, 6, False), (3, STEPS, False)):
        told = {"settings": settings | {"out": str(tmp_path / "run")}}
        kill = {"rank": 0, "line": line, "signal": "SIGKILL"} if line < STEPS else None
        codes = gang.attempt("run", workers, tmp_path, told | {"kill": kill})
        assert (codes[0] == -signal.SIGKILL) == (kill is not None), said(tmp_path, workers)
        found, expected = losses_of(tmp_path / "run"), losses_of(alone)
        assert len(found) >= line > before
        slack = 0 if exact else 1e-4
        assert found[before:line] == pytest.approx(expected[before:line], rel=slack, abs=0)
        before = line
    assert sorted(path.name for path in (tmp_path / "run" / "state").glob("worker*")) == [
        f"worker-{rank}-of-3" for rank in range(3)
    ]


def test_workers_take_unequal_parts_of_a_step_as_the_plan_says(
    gang: Crew, settings: dict[str, Any], alone: Path, pair: Path, tmp_path: Path
) -> None:
    """Only the order of sums is another. The run begins with 3 and 1 sequences, and goes on so without the plan."""
    plan = json.loads((pair / "planned.json").read_text())["plan"]
    assert plan["sequences"] == [2, 2]
    (tmp_path / "plan.json").write_text(
        json.dumps(plan | {"sequences": [3, 1], "accumulate": 3, "commit_every": 1, "gather_ahead_bytes": 0})
    )
    given = {**settings, "out": str(tmp_path / "run"), "plan": str(tmp_path / "plan.json")}
    kill = {"rank": 1, "line": 3, "signal": "SIGKILL"}
    gang.attempt("run", 2, tmp_path, {"settings": given, "kill": kill})
    assert_close(tmp_path / "run", alone, len(losses_of(tmp_path / "run")))
    assert_close(run(gang, settings, 2, tmp_path), alone, STEPS)
    assert json.loads((tmp_path / "run" / "planned.json").read_text())["plan"]["sequences"] == [3, 1]


def test_a_plan_without_sequences_divides_a_step_equally(
    gang: Crew, settings: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    plan = json.loads((pair / "planned.json").read_text())["plan"]
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"sequences": []}))
    assert_same(run(gang, settings | {"plan": str(tmp_path / "plan.json")}, 2, tmp_path), pair)


def test_shares_and_budgets_of_their_own_do_not_show_in_the_numbers_whoever_goes_on(
    gang: Crew, settings: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    """Begun with three quarters and one, and gone on with so; then by four workers, one, and three."""
    plan = json.loads((pair / "planned.json").read_text())["plan"]
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"shares": [3, 1]}))
    uneven = {"plan": str(tmp_path / "plan.json")}
    out, before = tmp_path / "run", 0
    for workers, line, more in ((2, 2, uneven), (2, 4, {}), (4, 5, {}), (1, 6, {}), (3, STEPS, {})):
        told = {"settings": settings | {"out": str(out)} | more, "own": {"1": {"memory": 1 << 30}}}
        kill = {"rank": 0, "line": line, "signal": "SIGKILL"} if line < STEPS else None
        codes = gang.attempt("run", workers, tmp_path, told | {"kill": kill})
        assert (codes[0] == -signal.SIGKILL) == (kill is not None), said(tmp_path, workers)
        exact = workers == 2
        found, expected = losses_of(out), losses_of(pair)
        assert len(found) >= line > before
        assert found[before:line] == pytest.approx(expected[before:line], rel=0 if exact else 1e-4, abs=0)
        before = line
        if exact:
            large, small = (out / f"state/worker-{rank}-of-2" for rank in range(2))
            assert (large / "blocks").stat().st_size > 1.5 * (small / "blocks").stat().st_size
            peaks = [json.loads(text)["host_peak_bytes"] for text in (small / "metrics.jsonl").read_text().splitlines()]
            assert max(peaks) <= 1 << 30


def test_workers_on_two_nodes_train_as_one_does_and_stay_on_two(
    gang: Crew, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    told = {"settings": settings | {"out": str(tmp_path / "run")}}
    gang.call("run", 4, tmp_path, told | {"nodes": 2})
    assert_close(tmp_path / "run", alone, STEPS)
    shutil.rmtree(tmp_path / "run" / "model")
    assert gang.attempt("run", 4, tmp_path, told) == [1] * 4
    for text in said(tmp_path, 4):
        assert "were on 2 nodes, and now they are on 1 nodes" in text
    told["settings"]["close"] = 2
    assert gang.attempt("run", 4, tmp_path, told | {"nodes": 2}) == [1] * 4
    for text in said(tmp_path, 4):
        assert "were groups of 1 that are close, and now they are groups of 2 that are close" in text


def test_pairs_are_planned_as_they_exchange_and_go_on_as_pairs(
    gang: Crew, settings: dict[str, Any], alone: Path, tmp_path: Path
) -> None:
    """Plan, wire and committed step all know of them: else a run could not go on by the command that began it."""
    told = {"settings": settings | {"out": str(tmp_path / "run"), "close": 2}}
    codes = gang.attempt("run", 4, tmp_path, told | {"kill": {"rank": 0, "line": 4, "signal": "SIGKILL"}})
    assert codes[0] == -signal.SIGKILL
    assert gang.attempt("run", 4, tmp_path, told) == [0] * 4, said(tmp_path, 4)
    assert_close(tmp_path / "run", alone, STEPS)
    plan = json.loads((tmp_path / "run" / "planned.json").read_text())["plan"]
    assert plan["close"] == 2
    planned = {(f"from {source}", kind): nbytes for source, _, kind, nbytes in plan["predicted"]["moved"]}
    measured = json.loads((tmp_path / "run" / "report.json").read_text())["moved"]
    for tier in ("from close", "from peer"):
        assert measured[tier]["gradient"] == planned[tier, "gradient"] > 0


def assert_close(run: Path, expected: Path, steps: int) -> None:
    assert steps >= 3
    assert losses_of(run)[:steps] == pytest.approx(losses_of(expected)[:steps], rel=1e-4)


def test_a_step_of_several_workers_is_exported_as_one(pair: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "outsize", "checkpoint", "export", pair, "--to", tmp_path / "made", "--optimizer"]
    subprocess.run(command, check=True, timeout=120)
    made = load_file(tmp_path / "made" / "model.safetensors")
    for name, weight in weights_of(pair).items():
        assert torch.equal(made[name], weight), name
    optimizer = load_file(tmp_path / "made" / "optimizer.safetensors")
    assert all(optimizer[f"state.{name}.exp_avg_sq"].shape == weight.shape for name, weight in made.items())


def test_a_run_of_several_workers_is_listed_verified_and_compared_and_changed_by_none(
    pair: Path, tmp_path: Path
) -> None:
    shutil.copytree(pair, tmp_path / "run")
    run, state = tmp_path / "run", tmp_path / "run" / "state"
    assert outsize("list", run).stdout.startswith(f"step {STEPS}: committed\n")
    assert outsize("verify", run).stdout == "".join(
        f"worker {rank}, step {STEPS} (committed): whole\n" for rank in range(2)
    )
    assert "0 of 30 parameters differ" in outsize("diff", run, pair).stdout
    refused = outsize("keep", run)
    assert (
        refused.returncode == 1 and "can be listed, verified, exported and compared, but not changed" in refused.stderr
    )
    folder = StateFolder(state / "worker-1-of-2")
    manifest = folder.read()
    assert manifest is not None
    place = next(place.extent for place in manifest.places.values() if place.extent is not None)
    flip(folder.blocks, place.start, 1)
    verified = outsize("verify", run)
    assert verified.returncode == 1 and f"worker 1, step {STEPS} (committed): damaged" in verified.stdout
    shutil.rmtree(folder.directory)
    assert f"The state of worker 1 of 2 is missing, and the others are at step {STEPS}" in outsize("list", run).stderr


def outsize(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "outsize", "checkpoint", command, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"version": "9.9"}, f"Worker 1 has another version than worker 0: 9.9 on torch {torch.__version__}, not "),
        ({"learning_rate": 0.5}, "Worker 1 has another learning_rate than worker 0: 0.5, not 0.001"),
        ({"model": "other"}, "Worker 1 has another model than worker 0"),
        ({"accumulate": 1}, "Worker 1 has another accumulate"),
        ({"data": "short.txt", "out": "own"}, "Worker 1 has another data than worker 0"),
        ({"model": "/nowhere/model"}, "/nowhere/model: there is no such file or folder"),
        ({"out": "/proc/nowhere/run"}, "/proc/nowhere/run cannot be used"),
        ({"memory": 64 << 20}, "Worker 1: A budget of 64.00 MiB is too small: this job needs at least"),
    ],
    ids=str,
)
def test_what_workers_were_told_differently_is_said_on_each(
    gang: Crew, settings: dict[str, Any], tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    if "data" in own:
        (tmp_path / "short.txt").write_text("w1 w2 w3 " * 200)
        own = {name: str(tmp_path / path) for name, path in own.items()}
    if own.get("model") == "other":
        tiny_model("llama", tied=False, hidden=256, seed=1).save_pretrained(tmp_path / "other")
        for file in Path(settings["model"]).glob("tokenizer*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        own = {"model": str(tmp_path / "other")}
    told = {"settings": settings | {"out": str(tmp_path / "run")}, "own": {"1": own}}
    assert gang.attempt("run", 2, tmp_path, told) == [1, 1]
    for text in said(tmp_path, 2):
        assert message in text
    assert not list((tmp_path / "run").rglob("blocks"))


def test_who_does_not_come_to_the_meeting_point_is_named(gang: Crew, settings: dict[str, Any], tmp_path: Path) -> None:
    told = {"settings": settings | {"out": str(tmp_path / "run")}, "without": 3.0}
    assert gang.attempt("run", 3, tmp_path, told) == [1] * 3
    first, lost, third = said(tmp_path, 3)
    for text in (first, third):
        assert "Worker 1 of 3 did not come to the meeting point 127.0.0.1:" in text and "within 3 seconds" in text
    assert "Worker 1 of 3 cannot reach the meeting point 127.0.0.1:1: [Errno 111] Connection refused" in lost


def test_a_lost_folder_is_refused_by_name(gang: Crew, settings: dict[str, Any], tmp_path: Path, pair: Path) -> None:
    shutil.copytree(pair, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state" / "worker-1-of-2")
    told = {"settings": settings | {"out": str(tmp_path / "run")}}
    assert gang.attempt("run", 2, tmp_path, told) == [1, 1]
    for text in said(tmp_path, 2):
        assert f"The state of worker 1 of 2 is missing, and the others are at step {STEPS}" in text


def test_sequences_are_divided_in_proportion_to_speed_and_none_goes_empty() -> None:
    assert in_proportion(4, [1.0] * 4) == (1, 1, 1, 1)
    assert in_proportion(8, [3.0, 1.0]) == (6, 2)
    assert in_proportion(4, [100.0, 1.0, 1.0]) == (2, 1, 1)
    with pytest.raises(OptionError, match="leaves nothing to do for some of 3 workers"):
        in_proportion(2, [1.0] * 3)


def command(settings: dict[str, Any], out: Path) -> list[str]:
    given = {name: value for name, value in settings.items() if name not in ("json", "memory")}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["train", *options, "--memory", "2GiB", "--out", str(out)]


def test_after_ctrl_c_a_run_goes_on_and_with_who_was_killed_all_begin_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Ctrl-C has all commit the step under way, though a commit is due much later; nothing of them stays."""
    steps, run = 24, tmp_path / "run"
    told = (*command(settings | {"steps": steps, "commit_every": steps}, run), "--workers", 2)
    with launched(tmp_path, "outsize", *told) as interrupted:
        interrupted.until(lambda: len(steps_of(run)) >= 2)
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.end() == 130
    done = len(steps_of(run))
    assert done < steps
    for manifest in (StateFolder(run / "state" / f"worker-{rank}-of-2").read() for rank in range(2)):
        assert manifest is not None and manifest.step == done
    with launched(tmp_path, "outsize", *told) as again:
        again.until(lambda: len(steps_of(run)) >= done + 2)
        os.kill(again.worker(1), signal.SIGKILL)
        assert again.end() == 0 and "Worker 1 was ended by SIGKILL. All begin again." in again.said
    assert steps_of(run) == list(range(1, steps + 1))


def steps_of(run: Path) -> list[int]:
    """What its lines are of; of one that is being written, nothing."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def test_torchrun_starts_workers_and_mistakes_end_it_with_one_code(
    settings: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "outsize"]
    environment = os.environ | {"OUTSIZE_MACHINE": str(MACHINE)}
    started = [*torchrun, *command(settings, tmp_path / "run")]
    subprocess.run(started, check=True, timeout=120, capture_output=True, env=environment)
    assert_same(tmp_path / "run", pair)
    wrong = command(settings | {"accumulate": 1}, tmp_path / "other")
    line = [sys.executable, "-m", "outsize", *wrong, "--workers", "2"]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 1 and ended.stderr.count("A step of 1 sequences leaves nothing to do") == 2
    assert "Traceback" not in ended.stderr
