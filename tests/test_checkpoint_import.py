"""Others' checkpoints become folders that a run begins with, to the bit; what would run code is refused."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from checkpoints import trained
from exactness import make_model
from safetensors.torch import load_file
from test_checkpoint import outsize
from test_checkpoint_export import companions, contents, export, go_on_in_plain_pytorch, groups_of, plain_optimizers
from test_exactness import OPTIMIZERS
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from outsize.errors import ModelError, OptionError
from outsize.model.load import open_model
from outsize.train.import_foreign import import_foreign
from outsize.train.optimizer_file import read_optimizer

ADAMW = OPTIMIZERS["adamw"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    make_model("llama").save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return folder


def plain_run(steps: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model("llama")
    (optimizer,) = plain_optimizers(model, ADAMW)
    go_on_in_plain_pytorch(model, [optimizer], 0, steps)
    return model, optimizer


def assert_goes_on_alike(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, place: Path) -> None:
    """Two more steps of Outsize from the folder are two more of the plain loop."""
    again, source = make_model("llama"), open_model(str(folder))
    for name, parameter in again.named_parameters():
        parameter.data = source.read(name)
        assert torch.equal(parameter, model.get_parameter(name)), name
    with trained(again, ADAMW, place / "state", begin=read_optimizer(folder)) as run:
        run.go(2, first=3)
        found = run.masters()
    go_on_in_plain_pytorch(model, [optimizer], 3, 2)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name


def save_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, path)


def save_wrapped(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "optimizer_states": [optimizer.state_dict()]}, path)


def save_numbers_distributed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    distributed.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=path)


def save_distributed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    distributed.save({"app": {"model": weights, "optim": state}, "step": 3}, checkpoint_id=path)


def save_flattened(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    distributed.save({"model": weights, "optimizer": state}, checkpoint_id=path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("save", [save_names, save_wrapped, save_numbers_distributed, save_distributed, save_flattened])
def test_a_run_goes_on_where_plain_pytorch_stopped(
    save: Callable[..., None], compress: bool, untrained: Path, tmp_path: Path
) -> None:
    model, optimizer = plain_run()
    save(model, optimizer, tmp_path / "theirs")
    done = import_foreign(tmp_path / "theirs", str(untrained), tmp_path / "begin", compress=compress)
    count = len(list(model.parameters()))
    assert (done.parameters, done.states) == (count, count)
    assert_goes_on_alike(tmp_path / "begin", model, optimizer, tmp_path)


SHARDED = """
import os, sys
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor
rank, store, saved, target = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
def spread(value):
    if isinstance(value, dict):
        return {key: spread(each) for key, each in value.items()}
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    return distribute_tensor(value, mesh, [Shard(value.dim() - 1)])
dcp.save(spread(torch.load(saved, weights_only=True)), checkpoint_id=target)
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in an orderly way
"""


def test_a_folder_that_two_processes_wrote_is_put_together(untrained: Path, tmp_path: Path) -> None:
    """Sharded along the last dimension, where a run of rows needs all the shards."""
    model, optimizer = plain_run()
    weights, state = get_state_dict(model, optimizer)
    torch.save({"model": weights, "optimizer": {"state": state["state"]}}, tmp_path / "whole.pt")
    arguments = [str(tmp_path / name) for name in ("store", "whole.pt", "theirs")]
    ranks = [subprocess.Popen([sys.executable, "-c", SHARDED, str(rank), *arguments]) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert len(list((tmp_path / "theirs").glob("*.distcp"))) == 2
    import_foreign(tmp_path / "theirs", str(untrained), tmp_path / "begin")
    assert_goes_on_alike(tmp_path / "begin", model, optimizer, tmp_path)


def test_the_trainers_own_checkpoint(untrained: Path, tmp_path: Path) -> None:
    """It has two groups of parameters, numbered; what is whose shows in the moments."""
    model = AutoModelForCausalLM.from_pretrained(untrained)
    ids = torch.arange(3, 19).remainder(250)
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 4)
    trainer.train()
    done = import_foreign(tmp_path / "trainer" / "checkpoint-2", None, tmp_path / "begin")
    assert done.states == done.parameters == len(list(model.parameters()))
    state = read_optimizer(tmp_path / "begin")
    inner = trainer.optimizer.optimizer
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(state.parameters[name].tensors["exp_avg"].read(), inner.state[parameter]["exp_avg"]), name


def test_an_export_comes_back_to_the_byte_packed_or_not(tmp_path: Path) -> None:
    model = make_model("llama")
    beside, groups = companions(model, tmp_path), groups_of(model, ADAMW)
    with trained(model, ADAMW, tmp_path / "state") as run:
        run.go(2)
    exported = export(tmp_path / "state", tmp_path / "exported", beside, masters=True, groups=groups)
    import_foreign(exported, None, tmp_path / "packed", compress=True)
    assert {path.suffix for path in (tmp_path / "packed").iterdir()} == {".json", ".packed"}
    import_foreign(tmp_path / "packed", None, tmp_path / "again")
    whole, again = contents(exported), contents(tmp_path / "again")
    for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert again[name] == whole[name], name


def test_weights_alone(untrained: Path, tmp_path: Path) -> None:
    model, optimizer = plain_run(1)
    save_names(model, optimizer, tmp_path / "theirs.pt")
    done = import_foreign(tmp_path / "theirs.pt", str(untrained), tmp_path / "begin", weights_only=True)
    assert done.states == 0 and not (tmp_path / "begin" / "optimizer.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "begin")
    assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in loaded.named_parameters())
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_bytes((untrained / "config.json").read_bytes())
    torch.save({**model.state_dict(), "transposed": torch.zeros(2, 3).T}, folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="1 tensors have no place"):
        import_foreign(folder, None, tmp_path / "new")
    name = "model.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "begin" / name).read_bytes()


def test_an_optimizer_alone_goes_with_the_weights_of_a_model(untrained: Path, tmp_path: Path) -> None:
    model, optimizer = plain_run(1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(OptionError, match="no config.json: give the model"):
        import_foreign(tmp_path / "optimizer.pt", None, tmp_path / "begin")
    import_foreign(tmp_path / "optimizer.pt", str(untrained), tmp_path / "begin")
    stored = load_file(tmp_path / "begin" / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(stored[f"state.{name}.exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])


# -- what is refused ---------------------------------------------------------------------------------------------------


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.mark),)


def assert_refused(path: Path, model: Path, says: str, error: type[Exception] = ModelError, **options) -> None:
    with pytest.raises(error, match=says):
        import_foreign(path, str(model), path.parent / "refused", **options)
    assert not (path.parent / "refused").exists()
    assert not list(path.parent.glob(".refused*"))


def test_what_would_run_code_is_refused_and_not_run(untrained: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    model, optimizer = plain_run(1)
    theirs = tmp_path / "theirs.pt"
    torch.save({"model": model.state_dict(), "more": Attack(mark)}, theirs)
    assert_refused(theirs, untrained, r"theirs.pt: refused: it names posix.mkdir, which could run code")
    torch.save(model, theirs)
    assert_refused(theirs, untrained, "refused: it names transformers.*LlamaForCausalLM.*model.state_dict")
    theirs.write_bytes(pickle.dumps({"model": Attack(mark)}))
    assert_refused(theirs, untrained, "not a file of torch.save")
    torch.save({"model": model.state_dict()}, theirs, _use_new_zipfile_serialization=False)
    assert_refused(theirs, untrained, "the format before PyTorch 1.6")
    folder = tmp_path / "folder"
    distributed.save({"model": model.state_dict()}, checkpoint_id=folder)
    metadata = (folder / ".metadata").read_bytes()
    for attack in (Attack(mark), {"state_dict_metadata": Attack(mark)}):
        (folder / ".metadata").write_bytes(pickle.dumps(attack))
        assert_refused(folder, untrained, r"\.metadata: refused: it names posix\.mkdir")
    (folder / ".metadata").write_bytes(metadata)
    attacked = {**model.state_dict(), "extra": Attack(mark)}
    distributed.save({"model": attacked}, checkpoint_id=tmp_path / "objects")
    assert_refused(tmp_path / "objects", untrained, "refused: it names posix.mkdir")
    assert not mark.exists()
    import_foreign(folder, str(untrained), tmp_path / "fine")


def test_damaged_files_are_refused_by_name(untrained: Path, tmp_path: Path) -> None:
    model, optimizer = plain_run(1)
    theirs = tmp_path / "theirs.pt"
    save_names(model, optimizer, theirs)
    whole = theirs.read_bytes()
    theirs.write_bytes(whole[: len(whole) // 2])
    assert_refused(theirs, untrained, "theirs.pt: not a file of torch.save, one that was cut short")
    with zipfile.ZipFile(theirs, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"no pickle")
        archive.writestr("archive/data/0", b"0" * 100)
    assert_refused(theirs, untrained, "theirs.pt: its tensors are compressed")
    theirs.write_text("hello")
    assert_refused(theirs, untrained, "not a file of torch.save")
    assert_refused(tmp_path / "missing", untrained, "there is no such file or folder")
    folder = tmp_path / "folder"
    distributed.save({"model": model.state_dict()}, checkpoint_id=folder)
    (shard,) = folder.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert_refused(folder, untrained, "__0_0.distcp: ")
    shard.unlink()
    assert_refused(folder, untrained, "__0_0.distcp: this shard is missing; fetch it again")
    (folder / ".metadata").write_bytes(b"\x80\x04N.")
    assert_refused(folder, untrained, r"\.metadata: holds a NoneType")
    (folder / ".metadata").write_bytes(b"rubbish")
    assert_refused(folder, untrained, r"\.metadata: cannot be read")


def test_what_is_of_another_model_is_refused(untrained: Path, tmp_path: Path) -> None:
    model, optimizer = plain_run(1)
    theirs = tmp_path / "theirs.pt"
    other = make_model("llama", layers=2)
    other.save_pretrained(tmp_path / "small")  # pyright: ignore[reportCallIssue]
    save_names(other, optimizer, theirs)
    assert_refused(theirs, untrained, "parameters of LlamaForCausalLM are missing, the first is model.layers.2")
    weights = model.state_dict()
    weights["model.norm.weight"] = torch.zeros(7)
    torch.save({"model": weights}, theirs)
    assert_refused(theirs, untrained, r"model.norm.weight has shape \[7\] where the configuration gives .* \[64\]")
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].T.contiguous()
    torch.save({"model": model.state_dict(), "optimizer": state}, theirs)
    assert_refused(theirs, untrained, r"exp_avg of model.embed_tokens.weight has shape \[64, 256\], for .* \[256, 64\]")
    groups = [{"params": [p], "lr": 0.1} for p in model.parameters()]
    unnamed = torch.optim.AdamW(groups)
    torch.save({"model": model.state_dict(), "optimizer": unnamed.state_dict() | {"state": state["state"]}}, theirs)
    assert_refused(theirs, untrained, "is not said. Save it from an optimizer that was made of model.named_parameters")
    torch.save({"hello": 1}, theirs)
    assert_refused(theirs, untrained, "no weights are in it. Its entries are hello")
    torch.save([1, 2], theirs)
    assert_refused(theirs, untrained, "holds a list, not a dictionary of tensors")


def test_the_target_and_newer_formats(untrained: Path, tmp_path: Path) -> None:
    import_foreign(untrained, None, tmp_path / "packed", compress=True)
    with pytest.raises(OptionError, match="packed exists"):
        import_foreign(untrained, None, tmp_path / "packed")
    path = tmp_path / "packed" / "model.packed"
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    assert_refused(tmp_path / "packed", untrained, "model.packed: not a packed file, or one that was cut short")
    flipped = bytearray(content)
    flipped[100] ^= 1
    path.write_bytes(flipped)
    assert_refused(tmp_path / "packed", untrained, "model.packed: tensor .* is damaged in chunk 0")


def test_the_command_line_imports_and_begins_with_it(tmp_path: Path) -> None:
    from soak import prepare

    prepare(tmp_path)
    inputs = ["--data", tmp_path / "text.txt", "--memory", "4GiB", "--steps", 2, "--sequence-length", 32, "--json"]
    outsize("train", "--model", tmp_path / "model", "--out", tmp_path / "run", *inputs)
    outsize("checkpoint", "export", tmp_path / "run", "--to", tmp_path / "exported", "--optimizer")
    said = json.loads(
        outsize("checkpoint", "import", tmp_path / "exported", "--to", tmp_path / "begin", "--compress", "--json")
    )
    assert said["optimizer_states"] == said["parameters"] > 0
    begin = ["--model", tmp_path / "begin", "--optimizer-state", tmp_path / "begin"]
    outsize("train", *begin, "--out", tmp_path / "second", *inputs)
    outsize("checkpoint", "export", tmp_path / "second", "--to", tmp_path / "further", "--optimizer")
    steps = load_file(tmp_path / "further" / "optimizer.safetensors")
    assert steps["state.model.norm.weight.step"] == 4, "it went on from the two steps that were imported"
    for number, (wrong, error, says) in enumerate(REFUSED_TO_BEGIN):
        given = [tmp_path / each if each in ("model", "exported") else each for each in wrong]
        with pytest.raises(error, match=says):
            outsize("train", *begin, "--out", tmp_path / f"refused{number}", *inputs, *given)
        assert not (tmp_path / f"refused{number}" / "state" / "blocks").exists(), "it was refused before any work"


REFUSED_TO_BEGIN = [
    (["--optimizer", "sgd"], OptionError, "was written by torch.optim.adamw.AdamW; this run steps it with"),
    (["--optimizer-state", "model"], ModelError, "has no optimizer.json: no optimizer's state is there"),
    (["--optimizer-option", "amsgrad=true"], OptionError, "keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step for"),
]
