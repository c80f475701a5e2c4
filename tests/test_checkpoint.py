"""`outsize checkpoint` and `outsize train --resume` on a real run of a tiny model."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from soak import losses, prepare
from typer.testing import CliRunner

from outsize import cli, training
from outsize.errors import DamageError, OptionError, OutsizeError, RunError, StorageError
from outsize.machine.find import DESCRIBED, this_machine
from outsize.machine.machine import Machine
from outsize.train.state import StateFolder

STEPS = 6


def outsize(*arguments: object) -> str:
    """Run a command in this process; returns what it printed. Raises what it raised."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if isinstance(done.exception, OutsizeError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    prepare(place)
    return place


def train(folder: Path, out: Path, *more: object) -> str:
    inputs = ["--model", folder / "model", "--data", folder / "text.txt", "--out", out]
    options = ["--memory", "4GiB", "--steps", STEPS, "--sequence-length", 32, "--json"]
    return outsize("train", *inputs, *options, *more)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(folder, out, "--keep-every", 2, "--keep-last", 1)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, in another place: nothing in it may depend on where it was."""
    copy = tmp_path / "moved" / "run"
    shutil.copytree(finished, copy)
    yield copy


def test_list_says_what_is_there(run: Path) -> None:
    said = outsize("checkpoint", "list", run)
    assert said.startswith("step 2: kept\nstep 4: kept\nstep 6: committed; kept\n")
    found = json.loads(outsize("checkpoint", "list", run, "--json"))
    assert [step["step"] for step in found["steps"]] == [2, 4, 6]


def test_a_copied_run_rolled_back_repeats_the_same_numbers(run: Path, finished: Path) -> None:
    weights = (run / "model" / "model.safetensors").read_bytes()
    said = outsize("checkpoint", "rollback", run, 2)
    assert "model is still the model that was written before" in said
    assert f"outsize checkpoint export {run} 2 --to NEW-FOLDER" in said
    shutil.rmtree(run / "model")
    outsize("train", "--resume", run, "--memory", "3GiB", "--commit-every", 3)
    assert losses(run) == losses(finished) and len(losses(run)) == STEPS
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert "whole" in outsize("checkpoint", "verify", run)


def test_what_was_planned_for_a_run_is_planned_again_only_when_something_is_otherwise(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(directory: Path) -> Machine:
        measured.append(directory)
        return this_machine(directory)

    def resume(*more: object) -> int:
        """How often the machine was measured so far."""
        outsize("checkpoint", "rollback", run, 4)
        outsize("train", "--resume", run, *more)
        assert losses(run) == losses(finished)
        return len(measured)

    monkeypatch.setattr(training, "this_machine", measure)
    assert resume() == 0
    assert resume("--memory", "3GiB") == 1
    assert resume() == 1 and "3221225472" in (run / "planned.json").read_text()
    said = json.loads((run / "planned.json").read_text())
    (run / "planned.json").write_text(json.dumps(said | {"baseline_bytes": said["baseline_bytes"] - (3 << 30)}))
    assert resume() == 2, "this process holds more than that one did"
    (run / "planned.json").write_text("{")
    assert resume() == 3
    monkeypatch.setenv("OUTSIZE_MACHINE", str(DESCRIBED / "two-cores.toml"))
    assert resume() == 4, "the machine was probed since"


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(run: Path, folder: Path) -> None:
    """Step 4 was committed, and killed before the evaluation that follows it."""
    evaluating = ["--eval-data", folder / "text.txt", "--eval-every", 4]
    outsize("checkpoint", "rollback", run, 2)
    outsize("train", "--resume", run, *evaluating)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert "eval_loss" in lines[4] and json.loads(lines[4])["step"] == 4
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if line != lines[4]) + "\n")
    outsize("checkpoint", "rollback", run, 4)
    outsize("train", "--resume", run)
    again = (run / "metrics.jsonl").read_text().splitlines()
    assert again[4] == lines[4] and again[-1] == lines[-1] and len(again) == len(lines)


def test_other_data_to_evaluate_on_are_not_taken_for_the_first(run: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(" ".join(f"w{number % 9}" for number in range(900)))
    found = []
    for data in (folder / "text.txt", tmp_path / "other.txt"):
        outsize("checkpoint", "rollback", run, 4)
        outsize("train", "--resume", run, "--eval-data", data)
        found.append(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"])
    assert found[0] != found[1]


def test_resume_needs_no_data_and_finds_a_model_that_has_moved(run: Path, folder: Path, tmp_path: Path) -> None:
    settings = json.loads((run / "run.json").read_text())
    settings["settings"] |= {"model": str(tmp_path / "gone"), "data": str(tmp_path / "gone.txt")}
    (run / "run.json").write_text(json.dumps(settings))
    outsize("checkpoint", "rollback", run, 4)
    outsize("train", "--resume", run, "--model", folder / "model")
    assert len(losses(run)) == STEPS


def test_resume_refuses_other_numbers(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="steps was 6, is 9"):
        outsize("train", "--resume", run, "--steps", 9)
    with pytest.raises(RunError, match="holds no run of Outsize"):
        outsize("train", "--resume", tmp_path)
    with pytest.raises(OptionError, match="--resume names the run's folder"):
        outsize("train", "--resume", run, "--out", tmp_path / "other")
    with pytest.raises(OptionError, match="--data, --out is missing"):
        outsize("train", "--model", "m")


def test_a_kept_step_ahead_has_the_right_numbers_but_no_lines_of_those_between(run: Path, finished: Path) -> None:
    weights = (run / "model" / "model.safetensors").read_bytes()
    outsize("checkpoint", "rollback", run, 2)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(
        "".join(lines[:2])
    )  # as a run that is continued at step 2 and killed leaves them
    outsize("checkpoint", "rollback", run, 4)
    outsize("train", "--resume", run)
    assert losses(run) == [loss for loss in losses(finished) if loss[0] not in (3, 4)]
    assert (run / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_another_model_or_tokenizer_is_refused_by_name(what: str, run: Path, folder: Path) -> None:
    model = run.parent / "model"
    shutil.copytree(folder / "model", model)
    name, old, new = {
        "model": ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
        "tokenizer": ("tokenizer.json", '"w7"', '"w7x"'),
    }[what]
    said = (model / name).read_text()
    assert old in said
    (model / name).write_text(said.replace(old, new))
    settings = json.loads((run / "run.json").read_text())
    settings["settings"]["model"] = str(model)
    (run / "run.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match=f"holds the state of another {what}"):
        outsize("train", "--resume", run)


def test_keep_pins_the_committed_step_or_the_next(run: Path) -> None:
    outsize("checkpoint", "rollback", run, 4)
    assert outsize("checkpoint", "keep", run) == "Step 4 is kept.\n"
    with pytest.raises(RunError, match=r"Step 3 is not kept in .* Kept steps: 2, 4, 6"):
        outsize("checkpoint", "keep", run, 3)
    somebody = StateFolder(run / "state").lock()
    assert "the next step that it commits" in outsize("checkpoint", "keep", run)
    for refused in (("keep", run, 4), ("rollback", run, 4)):
        with pytest.raises(RunError, match="in use by another process"):
            outsize("checkpoint", *refused)
    somebody.close()
    (run / "state" / "kept" / "step-2").unlink()
    outsize("train", "--resume", run, "--keep-every", 0, "--keep-last", 0)
    assert [step["step"] for step in json.loads(outsize("checkpoint", "list", run, "--json"))["steps"]] == [4, 5, 6]
    assert not (run / "state" / "keep-next").exists()


def test_a_kept_step_is_dropped_and_its_space_used_again(run: Path) -> None:
    state = StateFolder(run / "state")
    outsize("checkpoint", "keep", run, 4, "--compress")
    outsize("checkpoint", "keep", run, "--compress")
    for step in (2, 4):
        assert outsize("checkpoint", "drop", run, step) == f"Step {step} is no longer kept.\n"
        with pytest.raises(RunError, match=f"Step {step} is not kept in"):
            outsize("checkpoint", "drop", run, step)
    assert outsize("checkpoint", "drop", run, 6) and state.packed_steps() == [] and state.kept_names() == []
    with pytest.raises(RunError, match="Step 6 is the committed one and not kept besides"):
        outsize("checkpoint", "drop", run, 6)
    outsize("checkpoint", "keep", run)
    somebody = StateFolder(run / "state").lock()
    with pytest.raises(RunError, match="in use by another process"):
        outsize("checkpoint", "drop", run, 6)
    somebody.close()
    assert "whole" in outsize("checkpoint", "verify", run)


def test_a_damaged_kept_step_can_be_dropped(run: Path) -> None:
    (run / "state" / "kept" / "step-2").write_text("damaged")
    outsize("checkpoint", "drop", run, 2)
    assert "damaged" not in outsize("checkpoint", "verify", run)


def test_what_a_killed_export_leaves_goes_with_the_next_command(run: Path, tmp_path: Path) -> None:
    left, others = tmp_path / ".exported.partial-0123abcd", tmp_path / ".exported.partial-89abcdef"
    notes = run / "state" / "exports"
    notes.mkdir()
    for folder in (left, others, run / "state" / "packed" / ".step-2.partial-01234567"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    for name, folder in ((left.name, left), (others.name, others), (".mine.partial-1", run / "model")):
        (notes / name).symlink_to(folder)
    somebody = os.open(others, os.O_RDONLY)
    fcntl.flock(somebody, fcntl.LOCK_EX)  # is still exporting
    outsize("checkpoint", "list", run)
    assert not left.exists() and others.exists() and (run / "model" / "model.safetensors").exists()
    assert list((run / "state" / "packed").iterdir()) == []
    os.close(somebody)
    outsize("checkpoint", "list", run)
    assert not others.exists()


def test_a_run_that_cannot_be_written_can_be_read(run: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=64m outsize {place} 2>/dev/null"):
        pytest.skip("mounting needs root")
    try:
        (run / "state" / "packed" / ".step-2.partial-01234567").mkdir(parents=True)
        shutil.copytree(run, place / "run")
        os.system(f"mount -o remount,ro {place}")
        assert "step 6: committed" in outsize("checkpoint", "list", place / "run")
        assert "damaged" not in outsize("checkpoint", "verify", place / "run")
        outsize("checkpoint", "export", place / "run", "--to", tmp_path / "exported")
        assert "0 of 30 parameters differ" in outsize("checkpoint", "diff", place / "run", run)
        for refused in (["keep"], ["rollback", 2], ["drop", 2], ["train"]):
            command = ["train", "--resume", place / "run"]
            command = command if refused == ["train"] else ["checkpoint", refused[0], place / "run", *refused[1:]]
            with pytest.raises(StorageError, match="state cannot be written: Read-only file system"):
                outsize(*command)
        with pytest.raises(StorageError, match="Read-only file system"):
            outsize("checkpoint", "export", run, "--to", place / "exported")
    finally:
        os.system(f"umount {place}")


def test_a_state_without_its_settings_is_nobodys(run: Path, folder: Path) -> None:
    for name in (
        "run.json",
        "metrics.jsonl",
        "report.json",
        "report.md",
        "loss.png",
        "memory.png",
        "timeline.png",
        "trace.json",
    ):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "model")
    with pytest.raises(RunError, match="holds a run's state without its run.json"):
        train(folder, run)


def test_damage_is_named_and_the_last_good_step_is_offered(run: Path) -> None:
    folder = StateFolder(run / "state")
    manifest = folder.read()
    assert manifest is not None
    name, place = max(manifest.places.items(), key=lambda item: item[1].sums.size)
    assert place.extent is not None
    with open(folder.blocks, "r+b") as file:
        file.seek(place.extent.start + 100)
        byte = file.read(1)[0]
        file.seek(place.extent.start + 100)
        file.write(bytes([byte ^ 16]))
    done = CliRunner().invoke(cli.app, ["checkpoint", "verify", str(run)])
    assert done.exit_code == 1
    assert f"Block {name} is damaged: bytes 0 to" in done.stdout
    assert "Step 4 is whole: outsize checkpoint rollback" in done.stderr
    with pytest.raises(DamageError, match="Step 6 was not restored"):
        outsize("checkpoint", "rollback", run, 6)
    settings = json.loads((run / "run.json").read_text())
    settings["settings"]["memory"] = 4 << 30
    (run / "run.json").write_text(json.dumps(settings))
    with pytest.raises(DamageError, match=r"is damaged.*Kept steps: 2, 4, 6"):
        outsize("train", "--resume", run)


def test_no_run_is_no_run(tmp_path: Path) -> None:
    for command in (["list"], ["verify"], ["keep"], ["rollback", 3]):
        with pytest.raises(RunError, match="holds no run of Outsize"):
            outsize("checkpoint", command[0], tmp_path, *command[1:])
        with pytest.raises(RunError, match="nowhere: there is no such folder"):
            outsize("checkpoint", command[0], tmp_path / "nowhere", *command[1:])


def test_files_that_a_move_has_left_behind_are_named(run: Path, tmp_path: Path) -> None:
    """Neither can be made up for: no kept step is offered."""
    for name, says in (("blocks", "blocks is missing: the state was moved without it"), ("layout", "layout")):
        (run / "state" / name).rename(tmp_path / name)
        for command in (["list", run], ["export", run, "--to", tmp_path / "exported"]):
            with pytest.raises(RunError, match=says) as refused:
                outsize("checkpoint", *command)
            assert "Kept steps" not in str(refused.value)
        (tmp_path / name).rename(run / "state" / name)
    assert not (tmp_path / "exported").exists()
    assert "damaged" not in outsize("checkpoint", "verify", run)
    (run / "state" / "blocks").unlink()
    with pytest.raises(RunError, match="blocks is missing: the state was moved without it"):
        outsize("train", "--resume", run)


def test_a_step_is_kept_packed_and_gone_back_to(run: Path, finished: Path, tmp_path: Path) -> None:
    folder = StateFolder(run / "state")
    outsize("checkpoint", "export", run, 4, "--to", tmp_path / "before", "--optimizer")
    assert outsize("checkpoint", "keep", run, 4, "--compress").startswith("Step 4 is kept, packed: ")
    assert folder.kept_names() == ["step-2", "step-6"] and folder.packed_steps() == [4]
    assert "step 4: kept, packed in" in outsize("checkpoint", "list", run)
    assert outsize("checkpoint", "verify", run).count("whole") == 4
    assert outsize("checkpoint", "verify", run, 4) == "step 4 (kept): whole\n"
    assert outsize("checkpoint", "keep", run, 4, "--compress") == "Step 4 is kept, packed.\n"
    outsize("checkpoint", "export", run, 4, "--to", tmp_path / "after", "--optimizer")
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert "0 of 30 parameters differ" in outsize("checkpoint", "diff", f"{run}@4", f"{finished}@4", "--optimizer")
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    outsize("checkpoint", "rollback", run, 4)
    assert folder.packed_steps() == [4] and "step 4: committed" in outsize("checkpoint", "list", run)
    assert "damaged" not in outsize("checkpoint", "verify", run)
    outsize("train", "--resume", run)
    assert losses(run) == losses(finished)
    assert (run / "model" / "model.safetensors").read_bytes() == weights


def test_a_damaged_packed_step_is_not_gone_back_to(run: Path) -> None:
    outsize("checkpoint", "keep", run, 2, "--compress")
    packed = run / "state" / "packed" / "step-2" / "blocks.packed"
    content = bytearray(packed.read_bytes())
    content[len(content) // 3] ^= 2
    packed.write_bytes(content)
    before = (run / "state" / "manifest").read_bytes()
    done = CliRunner().invoke(cli.app, ["checkpoint", "verify", str(run)])
    assert done.exit_code == 1 and "step 2 (kept): damaged" in done.stdout and "blocks.packed: tensor" in done.stdout
    with pytest.raises(DamageError, match="packed, is damaged in .* Step 2 was not restored"):
        outsize("checkpoint", "rollback", run, 2)
    assert (run / "state" / "manifest").read_bytes() == before
    packed.write_bytes(content[:100])
    with pytest.raises(DamageError, match="Step 2 is damaged: .*cut short.* was not restored"):
        outsize("checkpoint", "rollback", run, 2)
    somebody = StateFolder(run / "state").lock()
    with pytest.raises(RunError, match="in use by another process"):
        outsize("checkpoint", "keep", run, "--compress")
    somebody.close()
