"""A user's own loop, `transformers.Trainer` and a `peft` model train as they do without Outsize, to the bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from exactness import (
    ACTIVATIONS_OF,
    PlainLoop,
    Setting,
    assert_idle,
    assert_same_weights,
    make_batches,
    make_job,
    make_model,
    make_pair,
)
from torch import nn

import outsize
from outsize.errors import BudgetError, ModelError, RunError
from outsize.memory.tier import pages
from outsize.train.optimizers import default_rule, uniform_rule

ADAMW = default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1})


@pytest.mark.parametrize(
    ("family", "activations", "placement", "precision"),
    [
        ("llama", "recompute", "disk", "mixed"),
        ("llama", "move", "near", "fp32"),
        ("llama", "keep", "mixed", "fp32"),
        ("handwritten", "mixed", "disk", "fp32"),
        ("handwritten", "keep", "near", "mixed"),
        ("handwritten", "move", "mixed", "mixed"),
    ],
)
def test_a_loop_of_ones_own(family: str, activations: str, placement: str, precision: str, tmp_path: Path) -> None:
    """Two calls of backward a step, a schedule of torch's own on the job's optimizer, clipping."""
    setting = Setting(precision, placement, hold=True, clip=0.05, activations=ACTIVATIONS_OF[activations])
    pair = make_pair(family, True, ADAMW, setting, tmp_path)
    job, plain = pair.job, pair.plain
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for optimizer in (job.optimizer, plain.optimizers[0])
    ]
    for micro_batches in make_batches(3, 2):
        for batch in micro_batches:
            losses = []
            for model in (job.model, plain.model):
                loss = model(**batch).loss / 2
                loss.backward()
                losses.append(loss.item())
            assert losses[0] == losses[1]
            plain.take_gradients()
        job.step()
        plain.update()
        for schedule in schedules:
            schedule.step()
    assert_same_weights(job, plain)
    assert_idle(job)


@pytest.mark.parametrize("activations", ACTIVATIONS_OF)
def test_one_backward_through_several_forwards(activations: str, tmp_path: Path) -> None:
    pair = make_pair(
        "qwen3", False, ADAMW, Setting("fp32", "disk", hold=True, activations=ACTIVATIONS_OF[activations]), tmp_path
    )
    for first, second in make_batches(3, 2):
        for model in (pair.job.model, pair.plain.model):
            (model(**first).loss + 0.5 * model(**second).loss).backward()
        pair.plain.take_gradients()
        pair.job.step()
        pair.plain.update()
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


def test_the_optimizer_can_be_stepped_itself(tmp_path: Path) -> None:
    """What a framework does that knows only the optimizer; the schedule must not find that step() was never called."""
    pair = make_pair("llama", True, ADAMW, Setting("fp32", "disk", hold=True), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = torch.optim.lr_scheduler.StepLR(pair.job.optimizer, 1, 0.5)
        for (batch,) in make_batches(3, 1):
            pair.job.optimizer.zero_grad()
            pair.job.model(**batch).loss.backward()
            pair.job.optimizer.step()
            for group in pair.plain.optimizers[0].param_groups:
                group["lr"] = schedule.get_last_lr()[0]
            pair.plain.step([batch])
            schedule.step()
    with pytest.raises(RunError, match="closure"):
        pair.job.optimizer.step(lambda: 0.0)
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


def test_a_loop_may_look_at_the_model_between_steps(tmp_path: Path) -> None:
    pair = make_pair("gemma3", True, ADAMW, Setting("mixed", "mixed", hold=True), tmp_path)
    *batches, (seen,) = make_batches(4, 1)
    for (batch,) in batches:
        pair.job.model(**batch).loss.backward()
        pair.job.step()
        pair.plain.step([batch])
        with torch.no_grad():
            assert torch.equal(pair.job.model(**seen).logits, pair.plain.model(**seen).logits)
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


def test_a_weight_that_a_step_does_not_use_stays_as_it_is(tmp_path: Path) -> None:
    """As torch skips a parameter without a gradient: no decay, no momentum."""

    def fork(model: nn.Module) -> None:
        for block in model.blocks:
            block.norm = Skipping(block.norm)

    pair = make_pair("handwritten", True, ADAMW, Setting("fp32", "disk", hold=True), tmp_path, prepare=fork)
    for step, (batch,) in enumerate(make_batches(4, 1)):
        for model in (pair.job.model, pair.plain.model):
            for block in model.blocks:
                block.norm.used = step % 2 == 0
            model(**batch).loss.backward()
        pair.plain.take_gradients()
        pair.job.step()
        pair.plain.update()
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


class Skipping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.used = inner, True

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) if self.used else states


# -- other people's loops ----------------------------------------------------------------------------------------------


def test_transformers_trainer(tmp_path: Path) -> None:
    model = make_model("llama")
    reference = copy.deepcopy(model)
    job = make_job(model, ADAMW, Setting("fp32", "mixed", hold=True), tmp_path)
    cls, options = ADAMW("", torch.empty(0))
    optimizer = cls(reference.parameters(), **options)
    logs = [
        run_trainer(job.model, job.optimizer, tmp_path / "with"),
        run_trainer(reference, optimizer, tmp_path / "without"),
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    job.flush()
    for name, parameter in reference.named_parameters():
        assert torch.equal(job.read(name, 0, parameter.shape[0]), parameter), name
    assert_idle(job)


def run_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> list[float]:
    """The losses that Trainer logs in three steps of two micro-batches, with a schedule that it is given."""
    import transformers

    settings = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    data = [{name: tensor[0] for name, tensor in batch.items()} for (batch,) in make_batches(12, 1, sequences=1)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    trainer = transformers.Trainer(model, settings, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("precision", "activations"), [("fp32", "move"), ("mixed", "keep"), ("mixed", "mixed")])
def test_peft_trains_adapters_over_a_frozen_base(activations: str, precision: str, tmp_path: Path) -> None:
    import peft

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(make_model("llama"), config)
    if precision == "mixed":
        model.to(torch.bfloat16)  # the base is frozen: it computes in the dtype it has
    plain = PlainLoop(as_masters(copy.deepcopy(model)), ADAMW, precision)
    job = make_job(
        model, ADAMW, Setting(precision, "disk", hold=True, activations=ACTIVATIONS_OF[activations]), tmp_path
    )
    written = job.store.ledger.moved["host", "disk", "weight"]
    for micro_batches in make_batches(3, 2):
        for batch in micro_batches:
            for side in (job.model, plain.model):
                side(**batch).loss.backward()
            plain.take_gradients()
        job.step()
        plain.update()
    assert_same_weights(job, plain)
    assert all("lora" in name for name in plain.masters)
    adapters = sum(pages(4 * master.numel()) for master in plain.masters.values())
    assert job.store.ledger.moved["host", "disk", "weight"] - written <= 3 * adapters, "a frozen weight was written"
    assert_idle(job)


def as_masters(model: nn.Module) -> nn.Module:
    """What is trained, in fp32: it becomes the masters of a plain loop."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


# -- attach and detach -------------------------------------------------------------------------------------------------


def test_attach_and_detach_give_back_an_ordinary_module(tmp_path: Path) -> None:
    model = make_model("llama")
    reference = copy.deepcopy(model)
    options = {"lr": 1e-3}
    job = outsize.attach(model, torch.optim.AdamW, options, memory="4GiB", directory=tmp_path / "s", sequence_length=16)
    assert job.model is model
    optimizer = torch.optim.AdamW(reference.parameters(), **options)
    *batches, (seen,) = make_batches(4, 1)
    for (batch,) in batches:
        loss = job.model(**batch).loss
        loss.backward()
        job.step()
        expected = reference(**batch).loss
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss == expected
    assert job.detach() is model
    assert_ordinary(model, reference, seen, tmp_path)


def test_what_does_not_fit_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    model, options = make_model("llama"), {"lr": 1e-3}
    with pytest.raises(BudgetError, match="is too small"):
        outsize.attach(model, torch.optim.AdamW, options, memory="50MiB", directory=tmp_path / "s", sequence_length=16)
    assert not (tmp_path / "s").exists()
    job = outsize.attach(model, torch.optim.AdamW, options, memory="4GiB", directory=tmp_path / "s", sequence_length=16)
    assert job.detach() is model


@pytest.mark.parametrize(("family", "placement"), [("gpt2", "disk"), ("handwritten", "mixed"), ("handwritten", "near")])
def test_a_detached_module_trains_on_as_an_ordinary_one(family: str, placement: str, tmp_path: Path) -> None:
    pair = make_pair(family, True, ADAMW, Setting("fp32", placement, 2), tmp_path)
    *batches, (seen, later) = make_batches(3, 2)
    for micro_batches in batches:
        pair.step(micro_batches)
    model, reference = pair.job.detach(), pair.plain.model
    assert torch.equal(model(**seen).logits, reference(**seen).logits)
    for side in (model, reference):
        optimizer = torch.optim.SGD([p for p in side.parameters() if p.requires_grad], lr=0.1)
        side(**later).loss.backward()
        optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def assert_ordinary(model: nn.Module, reference: nn.Module, batch: dict[str, torch.Tensor], directory: Path) -> None:
    import transformers

    assert torch.equal(model(**batch).logits, reference(**batch).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(directory / "saved")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory / "saved", dtype=torch.float32)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_state_of_an_attached_module_is_refused_not_made_up(tmp_path: Path) -> None:
    pair = make_pair("llama", True, ADAMW, Setting("fp32", "disk", hold=True), tmp_path)
    model = pair.job.model
    for part in (model, model.model, model.model.layers[0], model.model.embed_tokens):
        with pytest.raises(ModelError, match=r"job\.detach\(\)"):
            part.state_dict()
    with pytest.raises(ModelError, match="attached to Outsize"):
        model.load_state_dict(pair.plain.model.state_dict())
    with pytest.raises(ModelError, match="attached to Outsize"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))
    detached = pair.job.detach().state_dict()
    assert all(torch.equal(detached[name], tensor) for name, tensor in pair.plain.model.state_dict().items())


def test_an_optimizer_class_of_ones_own_is_used_as_it_is(tmp_path: Path) -> None:
    """Outsize cannot know the arithmetic of a class it has never seen, so it gives it whole parameters."""
    pair = make_pair("llama", False, uniform_rule(Signs, {"lr": 1e-3}), Setting("mixed", "disk", hold=True), tmp_path)
    for (batch,) in make_batches(3, 1):
        pair.step([batch])
    pair.assert_equal()
    assert_idle(pair.job)


class Signs(torch.optim.Optimizer):
    """Steps by the sign of the gradient, as far as the weight is long: not elementwise, with a tensor and a number."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["sum"] = state.get("sum", torch.zeros_like(parameter)) + parameter.grad
                parameter.sub_(group["lr"] * parameter.norm() * state["sum"].sign() / state["count"])
