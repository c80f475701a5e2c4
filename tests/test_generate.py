"""`outsize generate` and `outsize.Engine` on real files: a file of prompts, stopped and continued."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import write_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import outsize
from outsize.errors import BudgetError, DataError, OptionError
from outsize.serve.batch import answer_file, answered
from outsize.serving import Sampling


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), text=True, capture_output=True, timeout=240)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "outsize", "generate", "--memory", "1GiB", *map(str, arguments)]


def test_a_file_of_prompts_goes_on_where_it_was_stopped(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{n} w{n + 1}", "max_new_tokens": 4 + n} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--model", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--json"]
    done = generate(*arguments)
    assert done.returncode == 0 and json.loads(done.stdout) == {"answered": 6}, done.stderr
    whole = (tmp_path / "out.jsonl").read_text().splitlines()
    whole_model = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    for answer in map(json.loads, whole):
        ids = tokenizer(lines[answer["line"] - 1]["prompt"], return_tensors="pt")
        new = lines[answer["line"] - 1]["max_new_tokens"]
        expected = whole_model.generate(**ids, max_new_tokens=new, do_sample=False)[0, 2:]
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    (tmp_path / "out.jsonl").write_text("\n".join(whole[:3]) + "\n" + whole[3][:20])  # as a kill would leave it
    again = generate(*arguments)
    assert json.loads(again.stdout) == {"answered": 3}, again.stderr
    assert (tmp_path / "out.jsonl").read_text().splitlines() == whole


def test_killed_and_continued_the_file_comes_out_the_same(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{n}", "max_new_tokens": 20 + n % 7, "n": 1 + n % 3, "ignore_end": True} for n in range(60)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    arguments = ["--model", model, "--input", tmp_path / "in.jsonl", "--temperature", 0.8, "--seed", 3, "--json"]
    undisturbed = generate(*arguments, "--output", one)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = subprocess.Popen(command(*arguments, "--output", other), stdout=subprocess.DEVNULL)
    while not other.exists() or other.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, "it was to be killed before it is through"
        time.sleep(0.005)
    process.kill()
    process.wait()
    left = other.read_bytes()
    other.write_bytes(left[: left.rindex(b'"index": ') + 3])  # a kill in the middle of a line
    again = generate(*arguments, "--output", other)
    assert 0 < json.loads(again.stdout)["answered"] < 60, again.stderr
    assert other.read_bytes() == one.read_bytes()
    with pytest.raises(DataError, match="something else than answers to this input"):
        answered(other, {})


def test_two_workers_answer_as_one_does(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{n} w{n + 1}", "max_new_tokens": 8, "temperature": n % 2, "n": 1 + n % 2} for n in range(8)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--model", model, "--input", tmp_path / "in.jsonl"]
    answers = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for workers, target in enumerate(answers, 1):
        done = generate(*arguments, "--output", target, "--workers", workers)
        assert done.returncode == 0, done.stderr
    assert answers[0].read_bytes() == answers[1].read_bytes()
    done = generate(*arguments, "--output", tmp_path / "three.jsonl", "--workers", 4)
    assert done.returncode == 1 and "3 layers cannot be divided among 4 workers" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_answers_to_what_was_asked_before_are_not_taken(model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [{"prompt": f"w{n} w{n + 1}", "max_new_tokens": 4, "ignore_end": True} for n in range(3)]
    with outsize.Engine(str(model), memory="8GiB", context=64, concurrency=2) as engine:

        def answer(seed: int = 1) -> int:
            source.write_text("\n".join(map(json.dumps, lines)))
            return answer_file(engine, source, target, Sampling(temperature=0.7, seed=seed))

        assert answer() == 3 and answer() == 0
        before = target.read_bytes()
        with pytest.raises(DataError, match="answers line 1 and 2 more as it was before"):
            answer(seed=2)
        lines[1]["prompt"] = "w9"
        with pytest.raises(DataError, match="answers line 2 as it was before.*remove these answers"):
            answer()
        assert target.read_bytes() == before
        kept = [line for line in before.splitlines(keepends=True) if json.loads(line)["line"] != 2]
        target.write_bytes(b"".join(kept))
        assert answer() == 1
        assert [json.loads(line)["prompt_tokens"] for line in target.read_bytes().splitlines()] == [2, 1, 2]
    trained = shutil.copytree(model, tmp_path / "trained")
    weights = load_file(trained / "model.safetensors")
    save_file(
        {name: weight * 1.01 for name, weight in weights.items()}, trained / "model.safetensors", {"format": "pt"}
    )
    with (
        outsize.Engine(str(trained), memory="8GiB", context=64, concurrency=2) as engine,
        pytest.raises(DataError, match="answers line 1 and 2 more as it was before: the model"),
    ):
        answer_file(engine, source, target, Sampling(temperature=0.7, seed=1))


def test_bad_input_is_one_message(model: Path, tmp_path: Path) -> None:
    assert "either --prompt, or --input and --output" in generate("--model", model).stderr
    (tmp_path / "in.jsonl").write_text('{"prompt": "w1"}\n{"prompt": "w1", "temprature": 1}\n')
    done = generate("--model", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "line 2: unknown field 'temprature'" in done.stderr and not (tmp_path / "out.jsonl").exists()
    assert "Traceback" not in done.stderr


def test_an_engine_streams_and_plans(model: Path) -> None:
    with pytest.raises(BudgetError, match="Give --memory"):
        outsize.Engine(str(model), memory="64MiB")
    with pytest.raises(OptionError, match="512 tokens"):
        outsize.Engine(str(model), memory="8GiB", context=513)
    with outsize.Engine(str(model), memory="8GiB", context=64, concurrency=2) as engine:
        assert engine.plan.serving is not None and engine.plan.serving.pages == 8
        events = list(engine.stream("w1 w2 w3", max_new_tokens=5, ignore_end=True, n=2, temperature=1.0))
        assert sorted(event.index for event in events if event.finish) == [0, 1]
        one, other = engine.generate(["w1 w2", [3, 4, 5]], max_new_tokens=6, ignore_end=True)
        assert (one.prompt_tokens, other.prompt_tokens) == (2, 3) and len(one.tokens) == len(other.tokens) == 6
        for event in engine.stream("w1 w2 w3", max_new_tokens=50, ignore_end=True):
            if event.chosen is not None:
                break  # whoever leaves cancels
        engine.generate(["w5"], max_new_tokens=2)
        engine.engine.check()
        assert engine.engine.pages.available == 8
    assert torch.is_grad_enabled()
