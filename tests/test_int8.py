"""Weights in 8 bits: what is computed, what is read, and that nothing else changes."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

import outsize
from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import give_back
from outsize.serve.int8 import Int8Linear, int8_linear, use_int8

LAYERS = 24
SOME = 28  # MiB, for half of the weights: what the process holds differs by some MiB from one look to the next


def rounded(linear: nn.Linear) -> Int8Linear:
    """With what `use_int8` would bring."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"one": linear}), nn.ModuleDict({"one": nn.Linear(32, 1)})])
    weights = dict(model.named_parameters())
    read = use_int8(model, lambda name, start, stop: weights[name].detach()[start:stop])
    found = model.blocks[0]["one"]
    for name in ("weight", "scale"):
        brought = read(f"blocks.0.one.{name}", 0, linear.out_features)
        setattr(found, name, nn.Parameter(brought, requires_grad=False))
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_a_product_is_that_of_the_rounded_weights(rows: int, inputs: int, outputs: int, seed: int, bias: bool) -> None:
    """A weight is off by half a step of its row at most, plus what bf16 takes from the scale (2 ** -9 of the weight); the
    product by bf16's roundings of its sum and result."""
    torch.manual_seed(seed)
    linear = nn.Linear(32 * inputs, outputs, bias=bias).bfloat16()
    with torch.no_grad():
        linear.weight[0] = 0.0
    held = rounded(linear)
    weight = linear.weight.detach().double()
    again = held.weight.double() * held.scale.double()[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    assert torch.all((again - weight).abs() <= (0.5 + 127 * 2**-8) * step)
    hidden = torch.randn(rows, 32 * inputs).bfloat16()
    exact = hidden.double() @ again.T + (linear.bias.double() if bias else 0.0)
    most = hidden.double().abs() @ again.abs().T + 1.0
    assert torch.all((held(hidden).double() - exact).abs() <= 2**-6 * most)


def test_many_rows_and_few_are_multiplied_alike() -> None:
    torch.manual_seed(0)
    held = rounded(nn.Linear(256, 64, bias=False).bfloat16())
    hidden = torch.randn(64, 256).bfloat16()
    many, few = held(hidden), torch.cat([held(hidden[row : row + 1]) for row in range(64)])
    torch.testing.assert_close(many, few, rtol=2**-6, atol=2**-5)
    assert torch.equal(int8_linear(hidden[None], held.weight, held.scale)[0], many)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=False, layers=LAYERS, hidden=512).save_pretrained(found)
    return found


def with_rounded_weights(folder: Path, target: Path) -> Path:
    """The same model in float32, with the numbers that int8 stands for."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith("model.layers") and weight.dim() == 2:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().clamp(-127, 127) * scale
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("memory", ["8GiB", "smallest"])
def test_answers_are_those_of_the_rounded_weights(folder: Path, tmp_path: Path, memory: str) -> None:
    """Resident and streamed. Greedy, in float32, where sums in another order decide nothing."""
    prompts = [[3, 5, 7, 11, 13], [2], list(range(40, 100))]
    if memory == "smallest":
        gc.collect()
        give_back()  # what was freed would be free for weights later
        with pytest.raises(BudgetError, match="Give --memory") as refused:
            outsize.Engine(str(folder), memory="64MiB", context=128, weights="int8")
        memory = f"{SOME + int(str(refused.value).split('Give --memory ')[1].split('MiB')[0])}MiB"
    options = {"max_new_tokens": 12, "ignore_end": True}
    with outsize.Engine(str(folder), memory=memory, context=128, weights="int8") as engine:
        assert engine.plan.exactness == "approximate"
        assert "approximate: " in engine.plan.reasons[0] and "rounded to 8 bits" in engine.plan.reasons[0]
        found = [answer.tokens for answer in engine.generate(prompts, **options)]
        streamed = engine.engine.store.ledger.total_moved("disk", "host") > 0
        assert streamed == (memory != "8GiB")
    held = sum(parameter.untyped_storage().nbytes() for parameter in engine.engine.model.parameters())
    assert held < 1 << 20, "a closed engine has copied its weights, for which its budget has no room"
    with outsize.Engine(str(with_rounded_weights(folder, tmp_path / "rounded")), memory="8GiB", context=128) as engine:
        assert engine.plan.exactness != "approximate"
        assert found == [answer.tokens for answer in engine.generate(prompts, **options)]


def test_a_plan_holds_a_quarter_of_the_bytes(folder: Path) -> None:
    def weights(how: str) -> int:
        plan = outsize.plan(str(folder), memory="8GiB", task="serve", machine="laptop", context=128, weights=how)
        assert plan.predicted is not None
        return dict(plan.predicted.memory)["for weights that stay"]

    in_layers = sum(p.numel() for n, p in tiny_model("llama", False, LAYERS, 512).named_parameters() if "proj" in n)
    assert weights("stored") - weights("int8") == pytest.approx(3 * in_layers, rel=0.01)  # of float32


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="weights 'int3' is unknown; there are stored and int8"):
        outsize.Engine(str(folder), memory="8GiB", weights="int3")
    tiny_model("llama", tied=False, layers=2, hidden=40).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "outsize", "generate", "--model", tmp_path, "--prompt", "a", "--weights", "int8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode != 0 and "No linear layer of LlamaForCausalLM can be held as int8" in done.stderr
    assert "Traceback" not in done.stderr
