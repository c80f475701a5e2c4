"""`outsize plan --task serve`: how many, how fast, how soon, before anything runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from transformers import LlamaConfig

import outsize
from outsize.asked import ServeRequest
from outsize.errors import BudgetError, OptionError
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.serving import plan_serving
from outsize.serve.attention import use_paged_attention
from outsize.sizes import parse_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a configuration: a plan needs no weights."""
    found = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=False, layers=6, hidden=512).config.save_pretrained(found)
    return found


def planned(folder: Path, memory: str | int, **options) -> Plan:
    return outsize.plan(str(folder), memory=memory, task="serve", machine="laptop", **options)


def smallest(folder: Path) -> int:
    """Bytes with which a plan for 256 tokens of context works."""
    with pytest.raises(BudgetError, match="Give --memory") as refused:
        planned(folder, "300MiB", context=256)
    return (8 + int(str(refused.value).split("Give --memory ")[1].split("MiB")[0])) << 20  # planning leaves some behind


def test_more_memory_serves_more_and_faster(folder: Path) -> None:
    with pytest.raises(BudgetError, match="Give --memory") as refused:
        planned(folder, "300MiB", context=256)
    needed, *parts = map(parse_size, re.findall(r"[0-9.]+ [KMG]iB", str(refused.value).partition("at least ")[2]))
    assert sum(parts) == pytest.approx(needed, abs=0.02 * 2**30) and len(parts) == 6  # GiB are told to two digits
    small, large = (planned(folder, memory, context=256, concurrency=16) for memory in (smallest(folder), "8GiB"))
    for plan in (small, large):
        assert plan.served is not None and plan.predicted is not None and plan.memory_bytes is not None
        assert sum(nbytes for _, nbytes in plan.predicted.memory) == plan.predicted.host_peak_bytes <= plan.memory_bytes
        assert plan.served.first_token_seconds > 0 and plan.served.alone > 0
        assert Plan.from_json(plan.to_json()) == plan
    assert small.served and large.served and small.predicted and large.predicted
    assert small.predicted.bytes_read > 0 == large.predicted.bytes_read
    assert small.served.requests < large.served.requests == 16
    assert small.served.alone < large.served.alone < large.served.together
    assert "16 at once with 256 tokens each" in str(large) and "first token" in str(large)


def test_layers_stream_by_parts(folder: Path) -> None:
    """So that one matrix and two to come are near, and weights have the room of the rest."""
    plan = planned(folder, smallest(folder), context=256)
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert [*plan.parts] == [*projections, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    config = LlamaConfig.from_pretrained(folder)
    assert plan.serving is not None and plan.serving.layers[0].dtype == "float32"
    largest = 4 * config.hidden_size * config.intermediate_size
    assert largest <= plan.arena_bytes <= 3 * largest + (4 << 10)
    assert "one part of a layer after the other" in " ".join(str(plan).split())


def test_what_is_not_called_is_no_part() -> None:
    """Its weight is somebody else's to use, who would find nothing there."""
    model = tiny_model("llama", tied=False, hidden=512).eval()
    for layer in model.model.layers:
        layer.mlp.forward = partial(_by_hand, layer.mlp)
    use_paged_attention(model)
    request = ServeRequest(0, context=32, concurrency=1, step_tokens=32)
    with pytest.raises(BudgetError) as refused:
        plan_serving(model, find_units(model), request, 0, 1 << 40)
    assert refused.value.least is not None
    enough = replace(request, memory_bytes=refused.value.least + (1 << 20))
    plan = plan_serving(model, find_units(model), enough, 0, 1 << 40)
    assert "mlp.up_proj" in plan.parts and "mlp.down_proj" not in plan.parts


def _by_hand(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden), mlp.down_proj.weight)


def test_who_says_how_many_gets_room_for_them_before_weights_do(folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = 24
    config.save_pretrained(tmp_path)
    memory = smallest(tmp_path) + (80 << 20)  # a third of the weights; each planning leaves some of its own behind
    unsaid, said = planned(tmp_path, memory, context=256), planned(tmp_path, memory, context=256, concurrency=32)
    assert unsaid.serving and said.serving and unsaid.predicted and said.predicted
    assert unsaid.serving.seats == said.serving.seats == 32
    assert unsaid.serving.pages < said.serving.pages
    assert unsaid.predicted.bytes_read < said.predicted.bytes_read


def test_several_workers_hold_what_one_must_stream(folder: Path) -> None:
    """They take turns, so that nothing is faster but what would have to be read."""
    memory = smallest(folder) + (24 << 20)  # what the process holds may grow by some between two plans
    alone, pair = (planned(folder, memory, context=256, concurrency=4, workers=count) for count in (1, 2))
    assert alone.predicted and alone.served and pair.predicted and pair.served and pair.workers == 2
    assert 0 <= pair.predicted.bytes_read < alone.predicted.bytes_read
    assert pair.predicted.host_peak_bytes <= memory and pair.served.alone > alone.served.alone
    assert Plan.from_json(pair.to_json()) == pair
    told = " ".join(str(pair).split())
    first, second = told.index("worker 0 model.embed_tokens, model.layers.0"), told.index("worker 1 model.layers.")
    assert "lm_head; peaks at" in told[first:second] and "model.norm; peaks at" in told[second:]
    assert "the fullest of 2 workers peaks at" in told
    rich = [planned(folder, "8GiB", context=256, concurrency=4, workers=count) for count in (1, 2, 3)]
    seconds = [plan.served.step_seconds for plan in rich if plan.served is not None]
    assert seconds[0] < seconds[1] < seconds[2] < 2 * seconds[0]
    assert {plan.near_weights for plan in rich} == {rich[0].near_weights}
    assert len({plan.serving.layers for plan in rich if plan.serving is not None}) == 1


def test_workers_who_have_too_little_are_named(folder: Path) -> None:
    with pytest.raises(BudgetError, match="Worker 0: A budget of .* Give --memory") as refused:
        planned(folder, "300MiB", context=256, workers=2)
    assert refused.value.least is not None and refused.value.least > 300 << 20
    with pytest.raises(OptionError, match="6 layers cannot be divided among 7 workers"):
        planned(folder, "1GiB", workers=7)


def test_the_command_prints_what_was_asked(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "outsize",
        "plan",
        "--task",
        "serve",
        "--model",
        str(folder),
        "--machine",
        "laptop",
    ]
    command += ["--concurrency", "4", "--context", "128"]
    command += ["--memory", "4GiB", "--workers", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["served"]["requests"] == 4 and json.loads(done.stdout)["workers"] == 2
    assert json.loads(done.stdout)["memory_bytes"] == parse_size("4GiB")


def test_options_of_the_other_task_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="plan of serve has no option 'sequence_length'"):
        planned(folder, "1GiB", sequence_length=12)
    with pytest.raises(OptionError, match="there are train and serve"):
        outsize.plan(str(folder), memory="1GiB", task="serf")
