"""Micro-batches that take turns on one thread."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exactness import (
    VOCABULARY,
    PlainLoop,
    Setting,
    assert_idle,
    assert_same_weights,
    make_batches,
    make_job,
    make_model,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from outsize.errors import ModelError
from outsize.memory.store import Lease, Store
from outsize.model.lanes import Lanes
from outsize.model.weights import WEIGHT, RowBlock, Weight
from outsize.train.gradients import Gradients
from outsize.train.optimizers import default_rule


def test_in_each_round_the_last_lane_is_first_and_results_are_in_order() -> None:
    lanes, came = Lanes(), []

    def body(number: int, units: int) -> str:
        for unit in range(units):
            came.append((unit, number, lanes.current, lanes.count, threading.current_thread()))
            lanes.pass_turn()
        return f"lane {number}"

    assert lanes.run([lambda: body(0, 2), lambda: body(1, 3), lambda: body(2, 2)]) == ["lane 0", "lane 1", "lane 2"]
    order = [(0, 2), (0, 1), (0, 0), (1, 2), (1, 1), (1, 0), (2, 1)]
    assert came == [(unit, number, number, 3, threading.current_thread()) for unit, number in order]
    assert (lanes.current, lanes.count) == (0, 1)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_lane_fails_the_others_end_and_the_next_run_works(failing: int) -> None:
    lanes, ended = Lanes(), []

    def body(number: int) -> None:
        try:
            lanes.pass_turn()
            if number == failing:
                raise ZeroDivisionError
            lanes.pass_turn()
        finally:
            ended.append(number)

    with pytest.raises(ZeroDivisionError):
        lanes.run([lambda: body(0), lambda: body(1), lambda: body(2)])
    assert sorted(ended) == [0, 1, 2]
    assert lanes.run([lambda: lanes.current, lambda: lanes.current]) == [0, 1]


def test_each_lane_computes_as_it_has_said() -> None:
    lanes = Lanes()

    def body(gradients: bool) -> list[bool]:
        said = []
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", enabled=gradients):
            for _ in range(3):
                lanes.pass_turn()
                said += [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
        lanes.pass_turn()
        return [*said, torch.is_grad_enabled(), not torch.is_autocast_enabled("cpu")]

    found = lanes.run([lambda: body(True), lambda: body(False), lambda: body(True)])
    assert found == [[True] * 6 + [True] * 2, [False] * 6 + [True] * 2, [True] * 6 + [True] * 2]
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_hooks_around_several_units_are_refused() -> None:
    lanes = Lanes()

    def body() -> None:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            lanes.pass_turn()

    with pytest.raises(ModelError, match="--accumulate 1"):
        lanes.run([body, body])
    lanes.run([body])  # nobody else runs within them
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # pyright: ignore[reportAttributeAccessIssue]


def test_after_steps_of_several_the_modules_have_their_own_parameters(tmp_path: Path) -> None:
    """Be it that the step failed on its way forward."""
    job = make_job(make_model("handwritten"), default_rule("sgd", {"lr": 0.1}), Setting("fp32", "disk", 4), tmp_path)
    before = [id(parameter) for parameter in job.model.parameters()]
    first, second = make_batches(2, 4)
    job.train_step(first)
    assert [id(parameter) for parameter in job.model.parameters()] == before

    def fail(*given: object) -> None:
        raise ZeroDivisionError

    handle = job.model.blocks[4].register_forward_hook(fail)  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ZeroDivisionError):
        job.train_step(second)
    handle.remove()
    assert [id(parameter) for parameter in job.model.parameters()] == before
    weights = {name: job.read(name, 0, w.shape[0] if w.shape else 1) for name, w in job.weights.items()}
    for name, parameter in job.detach().named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("placement", ["near", "disk"])
def test_weights_come_and_gradients_complete_in_one_order_for_any_number(
    placement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers who have unequal parts of a step exchange as they come by."""
    orders: list[list[str]] = []
    lease, complete = Store.lease, Gradients._complete

    def note_lease(self: Store, name: str, fresh: bool = False) -> Lease:
        if name.startswith(WEIGHT):
            orders[-1].append(f"lease {name}")
        return lease(self, name, fresh)

    def note_complete(self: Gradients, weight: Weight, block: RowBlock, *given: Any) -> None:
        orders[-1].append(f"complete {block.name}")
        complete(self, weight, block, *given)

    monkeypatch.setattr(Store, "lease", note_lease)
    monkeypatch.setattr(Gradients, "_complete", note_complete)
    for count in (1, 2, 3):
        setting = Setting("fp32", placement, count)
        orders.append([])
        job = make_job(
            make_model("llama", tied=False), default_rule("sgd", {"lr": 0.1}), setting, tmp_path / str(count)
        )
        job.train_step(make_batches(1, count)[0])
    assert any(event.startswith("complete") for event in orders[0])
    assert orders == [orders[0]] * 3


class Places(nn.Module):
    """A module with weights and a child that has some."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(16, 64))
        self.scale = nn.Parameter(torch.ones(64))
        self.norm = nn.RMSNorm(64)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states + self.places) * self.scale


class Either(nn.Module):
    """Some inputs go one way, others the other."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, states: torch.Tensor, way: int) -> torch.Tensor:
        return states + torch.tanh(self.ways[way](states))


class Awkward(nn.Module):
    """Every third weight is near: the tokens', and the norm of `Places`, whose others come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 64)
        self.places = Places()
        self.blocks = nn.ModuleList(Either() for _ in range(4))
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        states = self.places(self.tokens(input_ids))
        with torch.no_grad():
            way = int(self.blocks[0](states, 0).sum() > 0)
        for block in self.blocks:
            states = block(states, (way + int(input_ids[0, 0])) % 2)
        logits = self.head(states)
        return SimpleNamespace(loss=cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("placement", ["mixed", "disk", "near"])
def test_awkward_modules_learn_as_in_a_loop(placement: str, precision: str, tmp_path: Path) -> None:
    """Weights in a part of a unit, weights that not every micro-batch uses, a unit that runs without gradients before it does
    with them, and a user's hook on a weight."""
    torch.manual_seed(0)
    model, rule = Awkward(), default_rule("sgd", {"lr": 0.1, "momentum": 0.9})
    plain = PlainLoop(copy.deepcopy(model), rule, precision)
    job = make_job(model, rule, Setting(precision, placement, 4), tmp_path)
    for side in (plain.model, job.model):
        side.get_parameter("places.norm.weight").register_hook(lambda gradient: gradient * 0.5)
    before = job.read("places.norm.weight", 0, 64)
    for micro_batches in make_batches(3, 4):
        assert plain.step(micro_batches) == job.train_step(micro_batches).loss
    assert_same_weights(job, plain)
    assert not torch.equal(job.read("places.norm.weight", 0, 64), before)
    assert_idle(job)
