"""`outsize generate` and `outsize.Engine` on real files: a file of prompts, stopped and continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_model
from test_cli import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import outsize
from outsize.errors import BudgetError, OptionError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=False).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    return folder


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outsize", "generate", "--memory", "1GiB", *map(str, arguments)]
    return subprocess.run(command, text=True, capture_output=True, timeout=240)


def test_a_file_of_prompts_goes_on_where_it_was_stopped(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"w{n} w{n + 1}", "max_new_tokens": 4 + n} for n in range(6)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--model", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--json"]
    done = generate(*arguments)
    assert done.returncode == 0 and json.loads(done.stdout) == {"answered": 6}, done.stderr
    whole = sorted((tmp_path / "out.jsonl").read_text().splitlines())
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
    assert sorted((tmp_path / "out.jsonl").read_text().splitlines()) == whole


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
        outsize.Engine(str(model), memory="2GiB", context=513)
    with outsize.Engine(str(model), memory="2GiB", context=64, seats=2) as engine:
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
