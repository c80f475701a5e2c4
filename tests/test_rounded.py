"""Weights in 8 or 4 bits: what is computed, what is read, and that nothing else changes."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
from outsize.memory.tier import pages
from outsize.plan import Plan
from outsize.serve.int4 import FEW_ROWS, GROUP
from outsize.serve.rounded import RoundedLinear, use_rounded

LAYERS = 24
SOME = 28  # MiB, for half of the weights: what the process holds differs by some MiB from one look to the next
ROUNDED = ("int8", "int4")


def held_so(linear: nn.Linear, weights: str) -> RoundedLinear:
    """With what `use_rounded` would bring."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"one": linear}), nn.ModuleDict({"one": nn.Linear(33, 1)})])
    stored = dict(model.named_parameters())
    read = use_rounded(model, weights, lambda name, start, stop: stored[name].detach()[start:stop])
    found = model.blocks[0]["one"]
    assert isinstance(found, RoundedLinear)
    for name, declared in [(name, p) for name, p in found.named_parameters() if name != "bias"]:
        brought = read(f"blocks.0.one.{name}", 0, declared.shape[0])
        assert (brought.shape, brought.dtype) == (declared.shape, declared.dtype)
        setattr(found, name, nn.Parameter(brought, requires_grad=False))
    return found


def stands_for(held: RoundedLinear) -> torch.Tensor:
    """The weights [outputs, inputs] behind a layer, exactly: of 4 bits what torch's product makes of each input alone, in
    float32, where whole steps times a scale, and a middle, have room."""
    if held.weight.dtype is torch.int8:
        return held.weight.double() * held.scale.double()[:, None]
    one = torch.eye(held.in_features)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(one, held.weight, GROUP, held.scale.float()).T.double()


def off_by(weight: torch.Tensor, weights: str) -> torch.Tensor:
    """How far from each of `weight` [outputs, inputs] what is held may be: half a step, and what bf16 takes from the scale
    (2 ** -9 of the range that the steps span) and from the middle."""
    if weights == "int8":
        step = weight.abs().amax(1, keepdim=True) / 127
        return ((0.5 + 127 * 2**-8) * step).expand_as(weight)
    groups = weight.unflatten(1, (-1, GROUP))
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    largest = groups.abs().amax(-1, keepdim=True) + span  # a middle is no larger
    return (span / 30 + 2**-8 * (span + largest)).expand_as(groups).flatten(1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ROUNDED), st.integers(1, 80), st.integers(1, 5), st.integers(1, 40), st.integers(0, 99))
def test_a_product_is_that_of_the_rounded_weights(
    weights: str, rows: int, inputs: int, outputs: int, seed: int
) -> None:
    """The product is off by bf16's roundings of the weights, of its sum and result."""
    torch.manual_seed(seed)
    outputs = outputs if weights == "int8" else 64 * (1 + outputs // 8)
    linear = nn.Linear(32 * inputs, outputs, bias=seed % 2 == 0).bfloat16()
    with torch.no_grad():
        linear.weight[0], linear.weight[-1] = 0.0, 0.125
        linear.weight += seed % 3  # far from zero, as few weights are
    held, weight = held_so(linear, weights), linear.weight.detach().double()
    again = stands_for(held)
    assert torch.all((again - weight).abs() <= off_by(weight, weights))
    hidden = torch.randn(rows, 32 * inputs).bfloat16()
    exact = hidden.double() @ again.T + (linear.bias.double() if linear.bias is not None else 0.0)
    most = hidden.double().abs() @ again.abs().T + 1.0
    assert torch.all((held(hidden).double() - exact).abs() <= 2**-6 * most)


@pytest.mark.parametrize("weights", ROUNDED)
def test_many_rows_and_few_are_multiplied_alike(weights: str) -> None:
    torch.manual_seed(0)
    held = held_so(nn.Linear(256, 192, bias=False).bfloat16(), weights)
    hidden = torch.randn(2 * FEW_ROWS, 256).bfloat16()
    many, few = held(hidden), torch.cat([held(hidden[row : row + 1]) for row in range(len(hidden))])
    torch.testing.assert_close(many, few, rtol=2**-6, atol=2**-5)
    assert torch.equal(held(hidden[None])[0], many)


@pytest.mark.parametrize("processor", ["avx2", "default"])
def test_other_processors_pack_otherwise(processor: str) -> None:
    """Where torch knows no wider registers: the same test in a process that is told so."""
    here = f"{__file__}::test_many_rows_and_few_are_multiplied_alike[int4]"
    told = {**os.environ, "ATEN_CPU_CAPABILITY": processor}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", here]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=False, layers=LAYERS, hidden=512).save_pretrained(found)
    return found


def in_int8(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().clamp(-127, 127) * scale


def in_int4(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.unflatten(1, (-1, 32))
    least, step = groups.amin(-1, keepdim=True), (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    middle = least + 8 * step
    return (((groups - middle) / step).round().clamp(-8, 7) * step + middle).flatten(1)


def with_rounded_weights(folder: Path, target: Path, numbers: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The same model in float32, with the numbers that the rounded weights stand for."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.startswith("model.layers") and weight.dim() == 2:
            weights[name] = numbers(weight)
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("weights", ROUNDED)
def test_answers_are_those_of_the_rounded_weights(folder: Path, tmp_path: Path, weights: str) -> None:
    """Streamed and resident. Greedy, in float32, where sums in another order decide nothing. What a step reads is what
    was planned."""
    prompts = [[3, 5, 7, 11, 13], [2], list(range(40, 140))]
    options = {"max_new_tokens": 5, "ignore_end": True}
    gc.collect()
    give_back()  # what was freed would be free for weights later
    with pytest.raises(BudgetError, match="Give --memory") as refused:
        outsize.Engine(str(folder), memory="64MiB", context=128, weights=weights)
    smallest = int(str(refused.value).split("Give --memory ")[1].split("MiB")[0])
    answers = []
    for memory in (f"{smallest + (SOME if weights == 'int8' else SOME // 2)}MiB", "8GiB"):
        with outsize.Engine(str(folder), memory=memory, context=128, weights=weights) as engine:
            plan, ledger = engine.plan, engine.engine.store.ledger
            assert plan.exactness == "approximate" and plan.predicted is not None
            assert "approximate: " in plan.reasons[0] and f"rounded to {weights[3:]} bits" in plan.reasons[0]
            answers.append([answer.tokens for answer in engine.generate(prompts, **options)])
        far, steps = plan.predicted.bytes_read, engine.engine.totals.steps
        assert (far > 0) == (memory != "8GiB")
        assert steps * far <= ledger.total_moved("disk", "host") <= steps * far + plan.arena_bytes  # read ahead
        held = sum(parameter.untyped_storage().nbytes() for parameter in engine.engine.model.parameters())
        assert held < 1 << 20, "a closed engine has copied its weights, for which its budget has no room"
    same = with_rounded_weights(folder, tmp_path / "rounded", {"int8": in_int8, "int4": in_int4}[weights])
    with outsize.Engine(str(same), memory="8GiB", context=128) as engine:
        assert engine.plan.exactness != "approximate"
        answers.append([answer.tokens for answer in engine.generate(prompts, **options)])
    assert answers[0] == answers[1] == answers[2]


def planned(folder: Path, weights: str) -> Plan:
    return outsize.plan(str(folder), memory="8GiB", task="serve", machine="laptop", context=128, weights=weights)


def test_a_plan_knows_the_bytes(tmp_path: Path) -> None:
    """Of a layer's float32 one byte of four and a scale for each row, or half of one and a quarter for scales, all in whole
    pages."""
    model = tiny_model("llama", tied=False, layers=4, hidden=512)
    model.config.save_pretrained(tmp_path)

    def near(weights: str) -> int:
        predicted = planned(tmp_path, weights).predicted
        assert predicted is not None
        return dict(predicted.memory)["for weights that stay"]

    layers = [p for n, p in model.named_parameters() if "proj" in n]
    saved = {
        "int8": sum(pages(4 * p.numel()) - pages(p.numel()) - pages(4 * len(p)) for p in layers),
        "int4": sum(pages(4 * p.numel()) - pages(p.numel() // 2) - pages(p.numel() // 4) for p in layers),
    }
    assert saved == {weights: near("stored") - near(weights) for weights in ROUNDED}


def test_layers_of_other_shapes_stay_as_they_are(tmp_path: Path) -> None:
    """Of 32 keys and values; and the plan says so."""
    tiny_model("llama", tied=False, layers=3, hidden=64).save_pretrained(tmp_path)
    said = planned(tmp_path, "int4").reasons[0]
    assert "6 linear layers stay as they are, not having multiples of 32 inputs and 64 outputs" in said
    with outsize.Engine(str(tmp_path), memory="8GiB", context=128, weights="int4") as engine:
        layer = engine.engine.model.model.layers[0]
        kept = {name for name, module in layer.named_modules() if type(module) is nn.Linear}
        assert kept == {"self_attn.k_proj", "self_attn.v_proj"}
        assert len(engine.generate([[3, 5, 7]], max_new_tokens=3, ignore_end=True)[0].tokens) == 3


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="weights 'int3' is unknown; there are stored, int8 and int4"):
        outsize.Engine(str(folder), memory="8GiB", weights="int3")
    with pytest.raises(OptionError, match="weights 'int3' is unknown"):
        planned(folder, "int3")
    tiny_model("llama", tied=False, layers=2, hidden=40).save_pretrained(tmp_path)
    command = [sys.executable, "-m", "outsize", "generate", "--model", tmp_path, "--prompt", "a", "--weights", "int8"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode != 0 and "No linear layer of LlamaForCausalLM can be held as int8" in done.stderr
    assert "Traceback" not in done.stderr
