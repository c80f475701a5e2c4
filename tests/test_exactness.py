"""The promise: a model streamed from disk gives, bit for bit, what a plain PyTorch loop gives in memory.

The full cross product of what can be chosen would run for an hour; `covering` picks few cases in which every two choices
still meet each other."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest
import pytorch_optimizer
import schedulefree
import torch
from exactness import (
    ACTIVATIONS_OF,
    KINDS_OF_MODEL,
    HandWritten,
    Pair,
    Remember,
    Setting,
    assert_idle,
    assert_same_weights,
    make_batches,
    make_job,
    make_model,
    make_pair,
    read_gradients,
)

from outsize.memory.block import KINDS
from outsize.train.optimizers import OptimizerRule, default_rule, uniform_rule

CHOICES = {
    "family": KINDS_OF_MODEL,
    "tied": (True, False),
    "precision": ("fp32", "mixed"),
    "placement": ("disk", "mixed", "near", "device"),
    "optimizer": ("adamw", "fused adamw", "sgd", "adafactor", "muon"),
    "accumulate": (1, 4),
    "norm": ("not known", "held", "clipped"),
    "activations": tuple(ACTIVATIONS_OF),
    "leased": ("whole", "by parts"),
}
OPTIMIZERS: dict[str, OptimizerRule] = {
    "adamw": default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1}),
    "fused adamw": uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True}),
    "sgd": default_rule("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adafactor": default_rule("adafactor", {"lr": 1e-2}),
    "muon": default_rule("muon", {"lr": 1e-3, "betas": (0.9, 0.95)}),
}
STEPS = 3
CLIP = 0.05  # below every norm that occurs, so that it clips


def covering(choices: dict[str, tuple], seed: int = 0) -> list[dict]:
    """Cases in which every pair of values of two different choices occurs. Greedy over random candidates."""
    names, draw = list(choices), random.Random(seed)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in choices[a] for y in choices[b]}
    cases = []
    while missing:
        candidates = [{name: draw.choice(choices[name]) for name in names} for _ in range(60)]
        best = max(candidates, key=lambda case: len(missing & set(combinations(case.items(), 2))))
        cases.append(best)
        missing -= set(combinations(best.items(), 2))
    return cases


def name_case(case: dict) -> str:
    words = {"tied": ("untied", "tied")}
    parts = (words[key][value] if key in words else str(value) for key, value in case.items())
    return "-".join(part.replace(" ", "_") for part in parts)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights, too, are updated in several chunks of several pieces."""
    monkeypatch.setattr("outsize.train.update.CHUNK", 4096)
    monkeypatch.setattr("outsize.train.update.PIECE", 1024)


def setting_of(case: dict) -> Setting:
    return Setting(
        precision=case["precision"],
        placement=case["placement"],
        accumulate=case["accumulate"],
        hold=case["norm"] != "not known",
        clip=CLIP if case["norm"] == "clipped" else None,
        activations=ACTIVATIONS_OF[case["activations"]],
        gradient_home="host" if case["placement"] in ("near", "device") else "disk",
        parts=case["leased"] == "by parts",
    )


@pytest.mark.parametrize("case", covering(CHOICES), ids=name_case)
def test_streamed_training_equals_a_plain_loop(case: dict, tmp_path: Path) -> None:
    pair = make_pair(case["family"], case["tied"], OPTIMIZERS[case["optimizer"]], setting_of(case), tmp_path)
    first, *others = make_batches(STEPS, case["accumulate"])
    pair.step(first)  # gradients and state are new: only weights could have come from disk
    before = pair.job.store.ledger.moved.copy()
    for micro_batches in others:
        pair.step(micro_batches)
    moved = pair.job.store.ledger.moved - before
    near, kinds = pair.job.plan.near, [kind for kind in KINDS if kind != "activation"]
    read = sum(moved[source, near, kind] for kind in kinds for source in ("disk", "host"))
    if case["placement"] != "mixed":  # of which all that streams may find room
        assert (read == 0) == (case["placement"] == "near"), f"{read} bytes were read"
    pair.assert_equal()
    assert_idle(pair.job)


def test_every_two_choices_meet() -> None:
    cases = covering(CHOICES)
    for a, b in combinations(CHOICES, 2):
        assert {(case[a], case[b]) for case in cases} == {(x, y) for x in CHOICES[a] for y in CHOICES[b]}


@pytest.mark.parametrize(
    ("family", "precision"), [("llama", "fp32"), *((family, "mixed") for family in KINDS_OF_MODEL)]
)
def test_gradients_equal_those_of_a_plain_loop(family: str, precision: str, tmp_path: Path) -> None:
    """Each gradient, as the optimizer saw it: added up in fp32 and clipped."""
    setting = Setting(precision, "disk", accumulate=2, clip=CLIP)
    pair = make_pair(family, True, uniform_rule(Remember, {}), setting, tmp_path)
    pair.step(make_batches(1, 2)[0])
    found = read_gradients(pair.job)
    assert found.keys() == pair.plain.masters.keys()
    for name, master in pair.plain.masters.items():
        assert torch.equal(found[name], pair.plain.optimizers[0].state[master]["gradient"]), name
    pair.assert_equal()
    assert_idle(pair.job)


def test_the_norm_is_that_of_torch(tmp_path: Path) -> None:
    pair = make_pair("llama", True, OPTIMIZERS["sgd"], Setting("fp32", "disk", clip=CLIP), tmp_path)
    (micro_batch,) = make_batches(1, 1)[0]
    pair.plain.model(**micro_batch).loss.backward()
    pair.plain.take_gradients()
    assert pair.job.train_step([micro_batch]).norm == pair.plain.update()
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_encoder_decoder_learns_its_first_label(accumulate: int, tmp_path: Path) -> None:
    pair = make_pair("t5", True, OPTIMIZERS["adamw"], Setting("fp32", "disk", accumulate), tmp_path)
    batches = make_batches(2, accumulate)
    for micro_batches in batches:
        micro_batches[0]["labels"][:, 1:] = -100
        pair.step(micro_batches)
    pair.assert_equal()
    assert_idle(pair.job)


@pytest.mark.parametrize("table_rows", [None, 40])
def test_a_micro_batch_that_teaches_nothing_changes_nothing(table_rows: int | None, tmp_path: Path) -> None:
    """As a long prompt does, whose answer is cut off."""
    weights, losses = [], []
    for count in (1, 2):
        model = make_model("llama")
        job = make_job(
            model, OPTIMIZERS["adamw"], Setting(table_rows=table_rows, accumulate=count), tmp_path / str(count)
        )
        learnt = make_batches(1, 1)[0][0]
        nothing = {**learnt, "labels": torch.full_like(learnt["labels"], -100)}
        job.train_step([learnt, nothing][:count])
        weights.append({name: job.read(name, 0, weight.shape[0]) for name, weight in job.weights.items()})
        losses.append(job.evaluate(iter([learnt, nothing][:count])))
        job.close()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("activations", ACTIVATIONS_OF)
def test_dropout_draws_the_numbers_it_draws_in_a_plain_loop(activations: str, tmp_path: Path) -> None:
    pair = dropout_pair(Setting("fp32", "disk", activations=ACTIVATIONS_OF[activations]), tmp_path)
    for step, micro_batches in enumerate(make_batches(STEPS, 1)):
        torch.manual_seed(step)
        plain, after = pair.plain.step(micro_batches), torch.get_rng_state()
        torch.manual_seed(step)
        assert pair.job.train_step(micro_batches).loss == plain
        assert torch.equal(torch.get_rng_state(), after)
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)


def test_dropout_is_the_same_whatever_is_kept_when_micro_batches_take_turns(tmp_path: Path) -> None:
    """Micro-batches that take turns draw their masks in another order than one after the other would; but the backward
    pass must see the masks of the forward pass, and must leave the random state as forward left it."""
    weights, states = [], []
    for name, activations in ACTIVATIONS_OF.items():
        torch.manual_seed(0)
        pair = dropout_pair(Setting("fp32", "disk", 3, activations=activations), tmp_path / name)
        for micro_batches in make_batches(2, 3):
            pair.job.train_step(micro_batches)
        pair.job.flush()
        weights.append(
            {name: pair.job.read(name, 0, w.shape[0] if w.shape else 1) for name, w in pair.job.weights.items()}
        )
        states.append(torch.get_rng_state())
        assert_idle(pair.job)
    for others, state in zip(weights[1:], states[1:], strict=True):
        assert all(torch.equal(weights[0][name], others[name]) for name in weights[0])
        assert torch.equal(states[0], state)


def dropout_pair(setting: Setting, directory: Path) -> Pair:
    directory.mkdir(exist_ok=True)

    def drop(model: HandWritten) -> None:
        for block in model.blocks:
            block.dropout.p = 0.3

    return make_pair("handwritten", True, OPTIMIZERS["adamw"], setting, directory, prepare=drop)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (pytorch_optimizer.Lion, {"lr": 1e-3, "weight_decay": 0.01}),
        (schedulefree.AdamWScheduleFree, {"lr": 1e-2, "warmup_steps": 2}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_optimizers_of_other_packages_equal_their_plain_loops(cls, options, precision: str, tmp_path: Path) -> None:
    """Schedule-free optimizers keep other weights for evaluation than for training; both must agree, in between and
    after coming back."""
    pair = make_pair("qwen3", True, uniform_rule(cls, options), Setting(precision, "disk"), tmp_path)
    batches = make_batches(4, 1)
    for micro_batches in batches[:3]:
        pair.step(micro_batches)
    assert pair.job.evaluate(iter([batches[3][0]])) == plain_evaluation(pair, batches[3][0])
    pair.step(batches[3])
    pair.assert_equal()
    assert_idle(pair.job)


def plain_evaluation(pair: Pair, batch: dict[str, torch.Tensor]) -> float:
    (optimizer,) = pair.plain.optimizers
    getattr(optimizer, "eval", lambda: None)()
    pair.plain.show()
    pair.plain.model.eval()
    with torch.no_grad():
        loss = float(pair.plain.model(**batch).loss)
    getattr(optimizer, "train", lambda: None)()
    pair.plain.show()
    pair.plain.model.train()
    return loss
