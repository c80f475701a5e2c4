"""What a step moves, what becomes of one that fails, and what is approximate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import (
    ACTIVATIONS_OF,
    PlainLoop,
    Setting,
    assert_idle,
    assert_same_weights,
    bind_job,
    make_batches,
    make_job,
    make_model,
    make_pair,
    make_plan,
)
from torch import nn

from outsize.errors import BudgetError, RunError
from outsize.memory.store import Store
from outsize.memory.tier import PAGE
from outsize.model.units import find_units
from outsize.train.gradients import add_up
from outsize.train.job import Job, bind
from outsize.train.optimizers import default_rule
from outsize.train.state import StateFolder, open_store
from outsize.train.update import PIECE

CPU = torch.device("cpu")
ADAMW = default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1})


# -- traffic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 8])
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("activations", ACTIVATIONS_OF)
def test_traffic_does_not_grow_with_micro_batches(
    activations: str, precision: str, accumulate: int, tmp_path: Path
) -> None:
    """However many there are, a step brings a unit's weights near once in forward and once in backward, and steps its
    state once; a gradient that is added up is never on disk. (What is found near by luck makes it less.)"""
    model = make_model("llama")
    job = make_job(
        model, ADAMW, Setting(precision, "disk", accumulate, activations=ACTIVATIONS_OF[activations]), tmp_path
    )
    *others, last = make_batches(3, accumulate)
    for micro_batches in others:
        job.train_step(micro_batches)
    job.store.flush()
    before = job.store.ledger.moved.copy()
    job.train_step(last, again=False)
    job.store.flush()
    moved = job.store.ledger.moved - before
    most_read, most_written = Counter(), Counter()
    for unit in find_units(model):
        for name, _ in unit.parameters:
            most_read["weight"] += 2 * job.store.entries[f"weight:{name}"].block.nbytes
    for name, entry in job.store.entries.items():
        if name.startswith(("state:", "activation:")):
            most_read += Counter(entry.block.bytes_by_kind)
        if not name.startswith("gradient:"):
            most_written += Counter(entry.block.bytes_by_kind)
    assert moved["disk", "host", "weight"] > 0 and moved["disk", "host", "moment"] > 0
    for (source, _, kind), nbytes in moved.items():
        assert nbytes <= (most_read if source == "disk" else most_written)[kind], kind
    assert_idle(job)


def test_with_everything_near_nothing_is_read_or_written(tmp_path: Path) -> None:
    setting = Setting("mixed", "near", 3, clip=1.0, gradient_home="host", arena=PAGE)
    job = make_job(make_model("gemma3"), ADAMW, setting, tmp_path)
    before = job.store.ledger.moved.copy()
    for micro_batches in make_batches(2, 3):
        job.train_step(micro_batches)
    job.flush()
    assert job.store.ledger.moved == before
    assert_idle(job)


# -- evaluation in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "hold"), [(1, True), (3, False), (3, True)])
def test_evaluation_in_the_middle_is_exact_and_changes_nothing(hold: bool, accumulate: int, tmp_path: Path) -> None:
    pair = make_pair("qwen3", True, ADAMW, Setting("mixed", "mixed", accumulate, hold=hold), tmp_path)
    *batches, seen = make_batches(4, 3)
    for micro_batches in batches:
        pair.step(micro_batches[:accumulate])
        learnt = [int((batch["labels"][:, 1:] != -100).sum()) for batch in seen]
        with torch.no_grad():
            losses = [float(pair.plain.model(**batch).loss) for batch in seen]
        expected = sum(loss * count for loss, count in zip(losses, learnt, strict=True)) / sum(learnt)
        assert pair.job.evaluate(iter(seen)) == expected
    pair.assert_equal()
    assert_idle(pair.job)


# -- failures ----------------------------------------------------------------------------------------------------------


class Trap(nn.Module):
    """Does nothing, but calls `spring` when a state of the batch it is shown is larger than any other batch's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.spring: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) if self.spring is None else self.spring(self.inner(states))


def set_traps(model: nn.Module) -> None:
    for block in model.blocks:
        block.out = Trap(block.out)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("activations", ACTIVATIONS_OF)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_failure_inside_the_model_stops_every_lane(accumulate: int, activations: str, tmp_path: Path) -> None:
    """In forward nothing has changed yet: the next step is as if there had been no failure."""
    setting = Setting("fp32", "disk", accumulate, activations=ACTIVATIONS_OF[activations])
    pair = make_pair("handwritten", True, ADAMW, setting, tmp_path, prepare=set_traps)
    first, second, third = make_batches(3, accumulate)
    pair.step(first)
    trap = pair.job.model.blocks[4].out
    visits = []

    def fail_last(states: torch.Tensor) -> torch.Tensor:
        visits.append(states)
        if len(visits) == accumulate:
            raise Interrupted("in the last lane to come by")
        return states

    trap.spring = fail_last
    with pytest.raises(Interrupted, match="last lane"):
        pair.job.train_step(second)
    trap.spring = None
    assert len(visits) == accumulate
    pair.step(third)
    pair.assert_equal()
    assert_idle(pair.job)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("activations", ACTIVATIONS_OF)
def test_a_failure_in_backward_surfaces_too(activations: str, accumulate: int, tmp_path: Path) -> None:
    setting = Setting("fp32", "disk", accumulate, activations=ACTIVATIONS_OF[activations])
    pair = make_pair("handwritten", True, ADAMW, setting, tmp_path, prepare=set_traps)

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        raise Interrupted("in backward")

    pair.job.model.blocks[4].out.spring = lambda states: hooked(states, fail)
    with pytest.raises(Interrupted, match="in backward"):
        pair.job.train_step(make_batches(1, accumulate)[0])
    lanes = pair.job.attachment.lanes
    assert (lanes.count, lanes.current, lanes.run([lambda: lanes.count] * 2)) == (1, 0, [2, 2])
    pair.job.store.close()


def hooked(states: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if states.requires_grad:
        states.register_hook(hook)
    return states


class Committed:
    """A job whose steps are committed in a state folder, as `outsize train` does it."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.folder = StateFolder(directory).lock()
        model = make_model("handwritten")
        set_traps(model)
        plan = make_plan(model, setting)
        sources = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self.store: Store = open_store(plan, self.folder)

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return sources[name][start:stop] if sources[name].dim() else sources[name]

        self.job: Job = bind(model, find_units(model), plan, ADAMW, self.store, read, CPU)
        manifest = self.folder.read()
        if manifest is None:
            self.folder.write_layout(self.store)
        else:
            self.job.updater.restore(manifest.facts["optimizer"])
            self.job.step_number = manifest.step
        self.job.on_complete = self.commit

    def commit(self, step: int) -> None:
        facts = {"optimizer": self.job.updater.facts()}
        self.store.commit(lambda places: self.folder.write_manifest(step, places, facts), wait=True)

    def close(self) -> None:
        self.store.close()
        self.folder.close()


def poison_loss(job: Job) -> None:
    job.model.blocks[4].out.spring = lambda states: states * float("nan")


def poison_gradient(job: Job) -> None:
    job.model.blocks[4].out.spring = lambda states: hooked(states, lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, None), (2, 0.05)])
@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_what_is_not_finite_never_reaches_the_committed_weights(
    poison: Callable[[Job], None], accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    """A step that fails after half its weights were updated leaves the committed ones, and a new job goes on from them
    as the plain loop does."""
    setting = Setting("mixed", "disk", accumulate, clip=clip)
    model = make_model("handwritten")
    set_traps(model)
    plain = PlainLoop(model, ADAMW, setting.precision, clip)
    first, second, third, fourth = make_batches(4, accumulate)
    begun = Committed(tmp_path, setting)
    for micro_batches in (first, second):
        assert begun.job.train_step(micro_batches).loss == plain.step(micro_batches)
    begun.job.flush()
    poison(begun.job)
    with pytest.raises(RunError, match="committed"):
        begun.job.train_step(third)
    begun.close()
    resumed = Committed(tmp_path, setting)
    assert resumed.job.step_number == 2
    assert_same_weights(resumed.job, plain)
    for micro_batches in (third, fourth):
        assert resumed.job.train_step(micro_batches).loss == plain.step(micro_batches)
    assert_same_weights(resumed.job, plain)
    resumed.close()


@pytest.mark.parametrize(("pages", "said"), [(2, "for block weight:"), (24, "No room near compute for block")])
def test_an_arena_that_is_too_small_is_said_so(pages: int, said: str, tmp_path: Path) -> None:
    """Two pages do not hold the largest weight; twenty-four hold each, but not a unit's at once."""
    model = make_model("llama")
    with pytest.raises(BudgetError, match=rf"{said}.*KiB.*Give more memory") as caught:
        job = make_job(model, ADAMW, Setting("fp32", "disk", arena=pages * PAGE), tmp_path)
        job.train_step(make_batches(1, 1)[0])
    assert f"of {4 * pages}.00 KiB" in str(caught.value)


# -- approximate choices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"precision": "bf16"}, {"precision": "mixed", "moments": "bf16"}])
def test_approximate_choices_learn_and_can_be_repeated(choice: dict[str, Any], tmp_path: Path) -> None:
    """The same bits at every run, wherever the bytes live."""
    runs = [
        train_on_one_batch(Setting(**choice, placement=placement), tmp_path / str(index))
        for index, placement in enumerate(("disk", "disk", "near"))
    ]
    losses, weights = runs[0]
    assert losses[-1] < losses[0] - 1
    for other_losses, other_weights in runs[1:]:
        assert other_losses == losses
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights)


def train_on_one_batch(setting: Setting, directory: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    directory.mkdir()
    model = make_model("llama")
    plan = make_plan(model, setting)
    assert plan.exactness == "approximate"
    job = bind_job(model, default_rule("adamw", {"lr": 1e-2}), plan, directory)
    ((batch,),) = make_batches(1, 1)
    losses = [job.train_step([batch]).loss for _ in range(10)]
    weights = {name: job.read(name, 0, weight.shape[0]) for name, weight in job.weights.items()}
    assert_idle(job)
    return losses, weights


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (1500, 1024), (2, 1500, 900), (1, 3 << 20)])
def test_narrower_gradients_add_up_as_torch_adds_them_but_never_whole(shape: tuple[int, ...]) -> None:
    total, gradient = torch.randn(shape), torch.randn(shape).bfloat16()
    expected = total + gradient
    with torch.profiler.profile(profile_memory=True) as profile:
        add_up(total, gradient)
    assert torch.equal(total, expected)
    held = max(event.self_cpu_memory_usage for event in profile.events() or [])
    assert 0 < held <= 4 * PIECE


def test_gradients_that_lie_otherwise_add_up_alike() -> None:
    total, gradient = torch.randn(300, 200), torch.randn(200, 300).bfloat16().t()
    expected = total + gradient
    add_up(total, gradient)
    assert torch.equal(total, expected)
