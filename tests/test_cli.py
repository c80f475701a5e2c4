"""The command line as a person uses it: real processes, a tiny model, and what happens when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import write_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    text = " ".join(f"w{(7 * number * number) % 200}" for number in range(3000))
    (folder / "text.txt").write_text(text)
    return folder / "model", folder / "text.txt"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "outsize", *map(str, arguments)]


def outsize(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), text=True, capture_output=True, timeout=240)


def train(inputs: tuple[Path, Path], out: Path, *more: object) -> list[object]:
    options = ["--memory", "1GiB", "--steps", STEPS, "--sequence-length", 32, "--out", out]
    return ["train", "--model", inputs[0], "--data", inputs[1], *options, *more]


def steps_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    done = outsize(*train(inputs, out, "--json"))
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        json.loads(line)
    return out


def test_train_writes_what_it_promises(undisturbed: Path) -> None:
    lines = steps_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    report = json.loads((undisturbed / "report.json").read_text())
    for side in ("planned", "measured"):
        for key in ("host_peak_bytes", "device_peak_bytes", "bytes_read", "bytes_written", "seconds_per_step"):
            assert key in report[side]
    assert report["measured"]["host_peak_bytes"] <= 1 << 30
    for name in ("report.md", "loss.png", "memory.png", "state/manifest"):
        assert (undisturbed / name).stat().st_size > 0
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    assert model.dtype is torch.bfloat16
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert not list(undisturbed.rglob("*.partial"))


def test_a_killed_run_continues_with_the_same_numbers(inputs: tuple[Path, Path], undisturbed: Path) -> None:
    out = undisturbed.parent / "killed"
    out.mkdir()
    (out / "train.npy.partial").write_bytes(b"what a run leaves that is killed while it packs its data")
    process = subprocess.Popen(command(*train(inputs, out, "--commit-every", 1)), stderr=subprocess.DEVNULL)
    while process.poll() is None and (not (out / "metrics.jsonl").exists() or len(steps_of(out)) < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = outsize(*train(inputs, out, "--memory", "900MiB"))
    assert again.returncode == 0, again.stderr
    assert [line["loss"] for line in steps_of(out)] == [line["loss"] for line in steps_of(undisturbed)]
    written = (out / "model" / "model.safetensors").read_bytes()
    assert written == (undisturbed / "model" / "model.safetensors").read_bytes()


def test_a_second_process_is_refused_and_ctrl_c_commits_the_first(inputs: tuple[Path, Path], undisturbed: Path) -> None:
    out = undisturbed.parent / "interrupted"
    told = train(inputs, out, "--steps", 5000, "--commit-every", 5000)
    process = subprocess.Popen(command(*told), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not (out / "metrics.jsonl").exists() or not steps_of(out)):
        time.sleep(0.01)
    assert "state is in use by another process" in refused(*told)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said and "press Ctrl-C again to stop at once" in said
    assert f"step {len(steps_of(out))} of 5000 is committed" in said and "continues at the last committed step" in said
    listed = outsize("checkpoint", "list", out).stdout
    assert listed.startswith(f"step {len(steps_of(out))}: committed\n")


def test_generate_takes_what_transformers_finds_likeliest(undisturbed: Path) -> None:
    """To within a few roundings of bf16, in which small models have words that are equally likely."""
    done = outsize(
        "generate", "--model", undisturbed / "model", "--memory", "1GiB", "--prompt", "w1 w2 w3", "--json",
        "--max-new-tokens", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(undisturbed / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(undisturbed / "model")
    ids = tokenizer("w1 w2 w3", return_tensors="pt")
    chosen = tokenizer(json.loads(done.stdout)["text"], return_tensors="pt")["input_ids"]
    assert chosen.shape == (1, 8)
    with torch.no_grad():
        logits = (
            model(torch.cat((ids["input_ids"], chosen), dim=1)).logits[0, ids["input_ids"].shape[1] - 1 : -1].float()
        )
    best, taken = logits.amax(dim=-1), logits.gather(1, chosen[0, :, None])[:, 0]
    assert bool((best - taken <= best.abs() * 2**-6).all())


def refused(*arguments: object) -> str:
    done = outsize(*arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_bad_input_is_one_clear_message(inputs: tuple[Path, Path], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = refused(*train(inputs, out, "--memory", "200MiB"))
    assert "is too small: this job needs at least" in small and "Give --memory" in small
    assert "10XB" in refused(*train(inputs, out, "--memory", "10XB"))
    assert "adamx" in refused(*train(inputs, out, "--optimizer", "adamx"))
    assert "nothing.txt" in refused(
        "train", "--model", inputs[0], "--data", tmp_path / "nothing.txt", "--memory", "1GiB", "--out", out
    )
    assert "No such option" in refused(*train(inputs, out, "--no-such-option"))
    other = refused(*train(inputs, undisturbed, "--learning-rate", "0.5"))
    assert "holds another run" in other and "learning_rate was 2e-05, is 0.5" in other
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    assert "thesis.tex" in refused(*train(inputs, tmp_path / "mine"))
    assert not out.exists(), "a run that is refused leaves nothing"
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
