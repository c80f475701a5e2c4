"""Units that are leased by parts: less near at once, the same numbers, and what cannot be done so is refused by name.

That they change no number whatever else is chosen is tested with everything else, in test_exactness.py; that what they
ask of the store is foretold, in test_rehearsal.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import Pair, PlainLoop, Setting, assert_idle, bind_job, make_batches, make_model, make_plan
from models import tiny_model
from torch import nn

from outsize.asked import Request
from outsize.errors import BudgetError, ModelError, OptionError
from outsize.machine.describe import process_memory
from outsize.machine.find import find_machine
from outsize.model.units import find_units, parts_of
from outsize.plan import KEEP, RECOMPUTE, Activations, Plan
from outsize.planner.check import check_plan
from outsize.planner.task import Task
from outsize.planner.training import Place, Planning, plan_training
from outsize.train.optimizers import default_rule, uniform_rule

ADAMW = default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1})
LAPTOP = find_machine("laptop")
REQUEST = Request(1 << 30, sequence_length=32, activations="recompute")
LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
LLAMA = (*LLAMA, "mlp.down_proj")


def task(request: Request = REQUEST) -> Task:
    model = tiny_model("llama", tied=True, layers=3, hidden=1024)
    return Task(model, find_units(model), uniform_rule(torch.optim.AdamW, {"lr": 1e-3}), request)


def place() -> Place:
    return Place(LAPTOP, baseline_bytes=400 << 20, disk_free_bytes=1 << 40)


# -- what the parts are ---------------------------------------------------------------------------------------------


def test_parts_are_outermost_modules_with_weights_worth_it() -> None:
    assert task().jobs_by_parts[0].parts == LLAMA
    units = find_units(make_model("handwritten"))
    assert parts_of(units, ()) == ("norm", "mix", "out")
    small = {name for unit in units for name, p in unit.parameters if p.numel() < 64 * 64}
    assert parts_of(units, small) == ("mix", "out")
    assert parts_of(units, {name for unit in units for name, _ in unit.parameters if "mix" not in name}) == ()
    assert "mlp.experts" in parts_of(find_units(make_model("mixtral")), ())


def test_what_is_not_called_is_no_part() -> None:
    """Its weight is used by somebody else, who would find nothing there."""
    job = task()
    for unit in job.units:
        if unit.repeated:
            unit.module.mlp.forward = partial(_by_hand, unit.module.mlp)
    assert job.jobs_by_parts[0].parts == LLAMA[:-1]
    plan = replace(plan_training(job, place()), parts=LLAMA)
    with pytest.raises(OptionError, match=r"parts name 'mlp\.down_proj', which is not called"):
        check_plan(plan, job, place())


def _by_hand(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden), mlp.down_proj.weight)


# -- less near at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [RECOMPUTE, KEEP])
def test_what_is_too_little_for_a_layer_is_enough_for_its_parts(activations: Activations, tmp_path: Path) -> None:
    """The head takes 64 KiB, the largest matrix of a layer 32, and a layer more than the arena."""
    rule = uniform_rule(torch.optim.SGD, {"lr": 0.1})
    model = make_model("llama", tied=False)
    plan = make_plan(model, Setting(activations=activations, arena=96 << 10))
    plain = PlainLoop(tiny_copy(model), rule)
    with pytest.raises(BudgetError, match="No room near compute"):
        bind_job(tiny_copy(model), rule, plan, tmp_path / "whole").train_step(make_batches(1, 1)[0])
    by_parts = replace(plan, parts=parts_of(find_units(model), ()))
    weights = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    bare = copy.deepcopy(model, weights)  # as from files: these become other objects when they leave the meta device
    job = bind_job(bare, rule, by_parts, tmp_path / "parts", sources=dict(model.named_parameters()))
    pair = Pair(plain, job)
    for micro_batches in make_batches(3, 1):
        pair.step(micro_batches)
    layer = sum(4 * p.numel() for p in make_model("llama").model.layers[0].parameters())
    assert job.store.ledger.peak["host", "weight"] <= plan.arena_bytes < layer
    pair.assert_equal()
    assert_idle(job)


def tiny_copy(model: nn.Module) -> nn.Module:
    found = make_model("llama", tied=False)
    found.load_state_dict(model.state_dict())
    return found


# -- what cannot be leased so ---------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A layer whose first module runs again behind the second, and was there only looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.mix = Turn(), nn.Linear(64, 64)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.turn(self.mix(self.turn(states, learns=False)), learns=True)


class Turn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64))

    def forward(self, states: torch.Tensor, learns: bool) -> torch.Tensor:
        return states @ (self.weight if learns else self.weight.detach())


class Gives(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(64))

    def forward(self) -> torch.Tensor:
        return self.weight.t()


class Apart(nn.Module):
    """A layer whose weight is given away by the module that has it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.mix = Gives(), nn.Linear(64, 64)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ self.matrix() + self.mix(states)


def job_of(layers: Callable[[], nn.Module], plan: Plan, directory: Path):
    model = make_model("handwritten")
    model.blocks = nn.ModuleList(layers() for _ in range(3))
    activations = tuple((f"blocks.{number}", RECOMPUTE) for number in range(3))
    return bind_job(model, ADAMW, replace(plan, activations=activations), directory)


def test_a_weight_that_is_given_away_is_refused(tmp_path: Path) -> None:
    plan = Plan("fp32", 1 << 20, parts=("matrix", "mix"))
    with pytest.raises(ModelError, match="blocks.0.matrix gives its own weight away"):
        job_of(Apart, plan, tmp_path / "all").train_step(make_batches(1, 1)[0])
    job_of(Apart, replace(plan, parts=("mix",)), tmp_path / "one").train_step(make_batches(1, 1)[0])


def test_a_part_that_runs_outside_its_unit_is_refused(tmp_path: Path) -> None:
    job = job_of(Twice, Plan("fp32", 1 << 20, parts=("mix",)), tmp_path)
    with pytest.raises(ModelError, match="blocks.1.mix runs outside the unit"):
        job.model.blocks[1].mix(torch.ones(1, 64))


def test_backward_never_reads_an_updated_weight_for_the_one_before(tmp_path: Path) -> None:
    """The gradient of `turn` is complete, and applied, before its first run is gone back through: by then another part has
    been near."""
    job = job_of(Twice, Plan("fp32", 1 << 20, parts=("turn", "mix")), tmp_path)
    with pytest.raises(ModelError, match="blocks.2.turn.weight is read in backward after its gradient was complete"):
        job.train_step(make_batches(1, 1)[0])


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (("mlp.sideways",), "'mlp.sideways'"),
        (("mlp", "mlp.up_proj"), "'mlp.up_proj', which lies in another"),
        (("",), "the unit itself"),
    ],
)
def test_parts_that_are_none_are_refused(parts: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        bind_job(make_model("llama"), ADAMW, Plan("fp32", 1 << 20, parts=parts), tmp_path)
    with pytest.raises(OptionError, match=said):
        check_plan(replace(plan_training(task(), place()), parts=parts), task(), place())


# -- plans ----------------------------------------------------------------------------------------------------------


def test_the_planner_takes_parts_only_where_a_layer_finds_no_room() -> None:
    planning = Planning(task(), place())
    with pytest.raises(BudgetError, match="for the largest part of a layer on its way") as refused:
        planning.within(300 << 20)
    least, whole = refused.value.least, planning.search(RECOMPUTE).needs.least
    assert least is not None and least < whole
    by_parts = planning.within(least)
    assert by_parts.predicted is not None and by_parts.predicted.host_peak_bytes <= least
    assert by_parts.parts == LLAMA and Plan.from_json(by_parts.to_json()) == by_parts
    assert "leased one after the other" in str(by_parts)
    assert planning.within(whole + (8 << 20)).parts == ()
    again = check_plan(by_parts, task(replace(REQUEST, memory_bytes=least)), place())
    assert again.parts == LLAMA


def test_a_budget_that_is_refused_for_layers_trains_by_parts(tmp_path: Path) -> None:
    """Within the budget, this process and the plain loop beside it counted in."""
    rule, batches = uniform_rule(torch.optim.SGD, {"lr": 0.1}), make_batches(2, 1)
    plain = PlainLoop(tiny_model("llama", tied=True, hidden=1024), rule)
    losses = [plain.step(micro_batches) for micro_batches in batches]
    model = tiny_model("llama", tied=True, hidden=1024)
    sources = sum(p.nbytes for p in model.parameters())  # that come in are held, too
    here = Place(LAPTOP, process_memory().resident_bytes + sources, disk_free_bytes=1 << 40)
    request = replace(REQUEST, sequence_length=16, batch_size=2, precision="fp32", loss="module")
    planning = Planning(Task(model, find_units(model), rule, request, batches[0], torch.float32), here)
    budget = planning.search(RECOMPUTE).needs.least - (4 << 20)
    plan = planning.within(budget)
    assert plan.parts == LLAMA
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    job = bind_job(model, rule, plan, tmp_path)
    assert [job.train_step(micro_batches).loss for micro_batches in batches] == losses
    assert process_memory().peak_bytes <= budget
    for name, master in plain.masters.items():
        assert torch.equal(job.read(name, 0, len(master)), master), name
    job.close()
