"""What is exported is what the run has, whatever its plan was, and plain PyTorch goes on from it with the same bits."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import BATCHES, opened, trained
from exactness import HandWritten, Setting, make_model
from safetensors.torch import load_file
from test_exactness import OPTIMIZERS
from test_export import files_limited_to
from transformers import AutoModelForCausalLM

import outsize
from outsize.errors import DamageError, ModelError, OptionError, RunError, StorageError
from outsize.model.companions import keep_companions
from outsize.model.load import open_model
from outsize.plan import KEEP
from outsize.train.export import export_checkpoint
from outsize.train.optimizer_file import Group, class_path, read_optimizer
from outsize.train.state import StateFolder

ADAMW = OPTIMIZERS["adamw"]
DOCS = Path(__file__).parent.parent / "docs" / "formats.md"


def model_folder(folder: Path, family: str = "llama") -> Path:
    make_model(family, tied=True).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def companions(model: torch.nn.Module, folder: Path) -> Path:
    model_folder(folder / "source")
    keep_companions(open_model(str(folder / "source")), model, folder / "companions")
    return folder / "companions"


def groups_of(model: torch.nn.Module, rule) -> list[Group]:
    return [Group(class_path(rule(n, p)[0]), {}, (n,)) for n, p in model.named_parameters()]


def export(directory: Path, target: Path, beside: Path | None = None, step: int | None = None, **options) -> Path:
    with opened(directory, step) as checkpoint:
        export_checkpoint(checkpoint, target, beside, **options)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plain_optimizers(model: torch.nn.Module, rule) -> list[torch.optim.Optimizer]:
    kinds: list = []
    for name, parameter in model.named_parameters():
        choice = rule(name, parameter)
        same = next((held for known, held in kinds if known == choice), None)
        if same is None:
            kinds.append((choice, same := []))
        same.append(parameter)
    return [cls(held, **options) for (cls, options), held in kinds]


def go_on_in_plain_pytorch(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], first: int, steps: int
) -> None:
    for step in range(first, first + steps):
        (batch,) = BATCHES[step]
        model(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize(("name", "compress"), [*((name, False) for name in OPTIMIZERS), ("adamw", True)])
def test_plain_pytorch_goes_on_with_the_same_numbers(name: str, compress: bool, tmp_path: Path) -> None:
    rule = OPTIMIZERS[name]
    model = make_model("llama")
    beside, groups = companions(model, tmp_path), groups_of(model, rule)
    with trained(model, rule, tmp_path / "state") as run:
        run.go(3)
    folder = export(tmp_path / "state", tmp_path / "x", beside, masters=True, groups=groups, compress=compress)
    with trained(make_model("llama"), rule, tmp_path / "state") as run:
        run.go(2)
        expected = run.masters()
    if compress:  # transformers reads no packed weights; Outsize does
        plain = make_model("llama")
        source = open_model(str(folder))
        for parameter_name, parameter in plain.named_parameters():
            parameter.data = source.read(parameter_name)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder).train()
    assert plain.dtype is torch.float32
    optimizers = plain_optimizers(plain, rule)
    assert {outsize.load_optimizer_state(folder, plain, optimizer) for optimizer in optimizers} == {3}
    go_on_in_plain_pytorch(plain, optimizers, 3, 2)
    for parameter_name, parameter in plain.named_parameters():
        assert torch.equal(parameter, expected[parameter_name]), parameter_name


def test_the_recipe_in_the_docs_needs_no_outsize(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(3)
    folder = export(tmp_path / "state", tmp_path / "x", masters=True, groups=[])
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(2)
        expected = run.masters()
    model = make_model("llama")
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    (optimizer,) = plain_optimizers(model, ADAMW)
    (recipe,) = re.findall(r"```python\n(# Without Outsize.*?)```", DOCS.read_text(), re.DOTALL)
    assert "import outsize" not in recipe and len(recipe.splitlines()) <= 12
    exec(recipe, {"folder": str(folder), "model": model, "optimizer": optimizer})
    go_on_in_plain_pytorch(model, [optimizer], 3, 2)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


PLACEMENTS = [
    Setting("mixed", "disk"),
    Setting("mixed", "near", activations=KEEP),
    Setting("mixed", "mixed", arena=1 << 22),
]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_no_byte_of_an_export_depends_on_budget_or_placement(name: str, tmp_path: Path) -> None:
    found = []
    for number, setting in enumerate(PLACEMENTS):
        with trained(make_model("llama"), OPTIMIZERS[name], tmp_path / f"state{number}", setting) as run:
            run.go(2)
        folder = export(tmp_path / f"state{number}", tmp_path / f"x{number}", masters=True, groups=[])
        packed = export(tmp_path / f"state{number}", tmp_path / f"p{number}", masters=True, groups=[], compress=True)
        found.append((contents(folder), contents(packed)))
    assert found[0] == found[1] == found[2]


def test_no_byte_depends_on_how_tables_are_cut(tmp_path: Path) -> None:
    """The same state in blocks of other rows: cutting a table changes the order of sums, so it is not trained here."""
    with trained(make_model("llama"), ADAMW, tmp_path / "state", Setting("mixed")) as run:
        run.go(2)
    whole = export(tmp_path / "state", tmp_path / "whole", masters=True, groups=[])
    for rows in (16, 100):
        model = make_model("llama")
        model.load_state_dict(load_file(whole / "model.safetensors"), strict=False)
        with trained(model, ADAMW, tmp_path / f"cut{rows}", Setting("mixed", table_rows=rows), read_optimizer(whole)):
            pass
        cut = export(tmp_path / f"cut{rows}", tmp_path / f"x{rows}", masters=True, groups=[])
        assert load_file(cut / "optimizer.safetensors").keys() == load_file(whole / "optimizer.safetensors").keys()
        assert (cut / "optimizer.safetensors").read_bytes() == (whole / "optimizer.safetensors").read_bytes()
        assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_masters_and_compute_weights_are_those_of_the_job(precision: str, tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state", Setting(precision, table_rows=48)) as run:
        run.go(1)
        masters = run.masters()
        compute = {name: run.job.read(name, 0, weight.shape[0]) for name, weight in run.job.weights.items()}
    plain = load_file(export(tmp_path / "state", tmp_path / "plain") / "model.safetensors")
    full = load_file(export(tmp_path / "state", tmp_path / "full", masters=True) / "model.safetensors")
    for name in masters:
        assert torch.equal(plain[name], compute[name]) and plain[name].dtype == compute[name].dtype
        assert torch.equal(full[name].float(), masters[name])
        assert full[name].dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_a_model_with_scalars_frozen_weights_and_one_element_chunks(tmp_path: Path) -> None:
    for optimizer in ("adamw", "adafactor"):
        rule, place = OPTIMIZERS[optimizer], tmp_path / optimizer
        with trained(HandWritten(True), rule, place / "state") as run:
            run.go(2)
        folder = export(place / "state", place / "x", masters=True, groups=[])
        state = read_optimizer(folder)
        assert "blocks.0.fixed" not in state.parameters
        scalar = state.parameters["blocks.0.strength"]
        assert all(tensor.shape == () for tensor in scalar.tensors.values())
        again = HandWritten(True)
        again.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        with trained(again, rule, place / "again", begin=state) as run:
            pass
        assert (
            contents(export(place / "again", place / "y", masters=True, groups=[]))["optimizer.safetensors"]
            == (folder / "optimizer.safetensors").read_bytes()
        )


def test_kept_steps_are_exported_while_the_run_goes_on(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(1, keep=True)
        run.go(1)
        with pytest.raises(RunError, match="being written by another process.*: 1\\."):
            export(tmp_path / "state", tmp_path / "x")
        first = contents(export(tmp_path / "state", tmp_path / "first", step=1))
        with pytest.raises(RunError, match="Step 7 is not kept .* Kept steps: 1"):
            export(tmp_path / "state", tmp_path / "x", step=7)
    assert contents(export(tmp_path / "state", tmp_path / "again", step=1)) == first
    assert contents(export(tmp_path / "state", tmp_path / "second")) != first
    assert not (tmp_path / "x").exists()


def test_damage_is_found_and_nothing_is_left(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(1)
    manifest = StateFolder(tmp_path / "state").read()
    assert manifest is not None
    extent = manifest.places["weight:model.norm.weight"].extent
    assert extent is not None
    with (tmp_path / "state" / "blocks").open("r+b") as file:
        file.seek(extent.start + 5)
        byte = file.read(1)[0]
        file.seek(extent.start + 5)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(DamageError, match="weight:model.norm.weight"):
        export(tmp_path / "state", tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {"state"}


def test_a_target_that_exists_a_full_disk_and_an_empty_folder(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(OptionError, match="mine exists"):
        export(tmp_path / "state", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"
    for compress in (False, True):
        with files_limited_to(50_000), pytest.raises(StorageError, match="written: File too large"):
            export(tmp_path / "state", tmp_path / "full", compress=compress)
    assert {path.name for path in tmp_path.iterdir()} == {"state", "mine"}
    (tmp_path / "empty").mkdir()
    assert contents(export(tmp_path / "state", tmp_path / "empty"))


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from pathlib import Path
from checkpoints import opened
from outsize.train.export import export_checkpoint
left = int(sys.argv[2])
def killing(call):
    def instead(*arguments, **more):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **more)
    return instead
place = Path(sys.argv[1])
with opened(place / "state") as checkpoint:
    for name in ("write", "fsync", "rename", "replace", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))
    for number in range(10):
        child = os.fork()
        if child == 0:
            left = number * 6
            export_checkpoint(checkpoint, place / "x", None, masters=True, groups=[])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), (place / "x").exists(), flush=True)
        if (place / "x").exists():
            break
"""


def test_killed_at_any_moment_it_leaves_all_or_nothing(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(1)
    whole = contents(export(tmp_path / "state", tmp_path / "whole", masters=True, groups=[]))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "0"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.split("\n")[:-1]
    assert lines.count(f"{-signal.SIGKILL} False") > 3, done.stdout + done.stderr
    assert len(list(tmp_path.glob(".x.partial-*"))) <= 1, "what a killed export left is removed by the next"
    if (tmp_path / "x").exists():
        assert contents(tmp_path / "x") == whole
    else:
        export(tmp_path / "state", tmp_path / "x", masters=True, groups=[])
        assert contents(tmp_path / "x") == whole
        assert not list(tmp_path.glob(".x.partial-*"))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with trained(make_model("llama"), ADAMW, tmp_path / "state") as run:
        run.go(1)
    model = make_model("llama")
    folder = export(tmp_path / "state", tmp_path / "x", groups=groups_of(model, ADAMW))
    with pytest.raises(OptionError, match="written by torch.optim.adamw.AdamW; it is not one for torch.optim.sgd.SGD"):
        outsize.load_optimizer_state(folder, model, torch.optim.SGD(model.parameters()))
    other = make_model("gpt2")
    with pytest.raises(ModelError, match="another model: GPT2LMHeadModel has no parameter"):
        outsize.load_optimizer_state(folder, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(ModelError, match="no optimizer.json"):
        read_optimizer(tmp_path)
    said = json.loads((folder / "optimizer.json").read_text())
    (folder / "optimizer.json").write_text(json.dumps(said | {"version": 9}))
    with pytest.raises(ModelError, match="version 9"):
        read_optimizer(folder)
    said["state"]["model.norm.weight"]["tensors"].append("third")
    (folder / "optimizer.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="state.model.norm.weight.third is missing"):
        read_optimizer(folder)
    (folder / "optimizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_optimizer(folder)
    (folder / "optimizer.safetensors").unlink()
    (folder / "optimizer.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="neither optimizer.safetensors"):
        read_optimizer(folder)
