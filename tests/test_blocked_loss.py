"""The head and its loss over blocks of the vocabulary: the module's own loss but for rounding, and, bit for bit, what the
same blocks give in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exactness import (
    ACTIVATIONS_OF,
    VOCABULARY,
    Batch,
    Pair,
    PlainLoop,
    Setting,
    assert_idle,
    assert_same_weights,
    make_batches,
    make_job,
    make_model,
    make_pair,
    table_names,
)
from torch import nn
from torch.nn import functional

from outsize.errors import ModelError, RunError
from outsize.train.ending import base_model
from outsize.train.loss import Head, HeadBlock, blocked_cross_entropy, next_tokens
from outsize.train.optimizers import default_rule

ROWS = 100  # of a vocabulary of 256: two full blocks and a part of one
BLOCKS = [(start, min(start + ROWS, VOCABULARY)) for start in range(0, VOCABULARY, ROWS)]
ADAMW = default_rule("adamw", {"lr": 1e-3, "weight_decay": 0.1})


# -- against the formula -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(40,), (700, 3, 0)])  # 700 tokens are more than one span of them
def test_loss_and_gradients_are_those_of_cross_entropy(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compared in float64 with a bound on what rounding can do (Higham, Accuracy and Stability, 3.1 and 3.5): with unit
    roundoff u, a dot product of n terms is off by at most gamma(n) = n u / (1 - n u) times the sum of its terms' sizes."""
    generator = torch.Generator().manual_seed(0)
    hiddens = [torch.randn(n, 32, generator=generator).to(dtype) for n in tokens]
    weight = (0.3 * torch.randn(VOCABULARY, 32, generator=generator)).to(dtype)
    targets = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in tokens]
    found: dict[HeadBlock, torch.Tensor] = {}

    def take(block: HeadBlock, lane: int, gradient: torch.Tensor) -> None:
        found[block] = found[block] + gradient.double() if block in found else gradient.double()

    loss, gradients = blocked_cross_entropy(hiddens, targets, Head(BLOCKS, views_of(weight), take))
    by_weight = torch.cat([found[block] for block in BLOCKS])

    exact_hidden = torch.cat(hiddens).double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight.T
    exact = functional.cross_entropy(logits, torch.cat(targets))
    exact.backward()
    bounds = rounding_bounds(exact_hidden.detach(), exact_weight.detach(), torch.cat(targets), dtype)
    assert abs(float(loss) - float(exact.detach())) <= bounds[0] < 0.05 * float(loss)
    assert_within(torch.cat(gradients).double(), exact_hidden.grad, bounds[1])
    assert_within(by_weight, exact_weight.grad, bounds[2])


def rounding_bounds(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """How far from the exact loss, gradient by `hidden` and gradient by `weight` rounding may lead; float64 inputs."""
    unit, stored = 2.0**-24, torch.finfo(dtype).eps / 2

    def gamma(terms: int) -> float:
        return terms * unit / (1 - terms * unit)

    (tokens, width), vocabulary = hidden.shape, weight.shape[0]
    logits = hidden @ weight.T
    # A logit: its dot product, then rounded to the dtype. Its log-sum-exp: a sum of `vocabulary` exponentials, each
    # off by a few units, and one log and exp more for each block.
    by_logit = float((gamma(width) * (hidden.abs() @ weight.abs().T) + stored * logits.abs()).max())
    by_sum = by_logit + gamma(vocabulary + 8 * len(BLOCKS)) * (1 + float(logits.logsumexp(-1).abs().max()))
    by_loss = by_logit + by_sum + gamma(tokens) * float((logits.logsumexp(-1) - logits.min(-1).values).max())
    # A share of the gradient: a probability off by that factor, one subtraction, one scaling, rounded to the dtype.
    probability = logits.softmax(-1)
    size = (probability + functional.one_hot(targets, vocabulary)) / tokens
    off = probability * (torch.tensor(by_logit + by_sum).expm1().item()) / tokens + (stored + 4 * unit) * size
    # Then a matrix product, of which each block's part (by hidden) or each span's and lane's (by weight) is rounded.
    by_hidden = (off + (gamma(vocabulary) + (len(BLOCKS) + 1) * stored) * size) @ weight.abs()
    by_weight = (off + (gamma(tokens) + 4 * stored) * size).T @ hidden.abs()
    return by_loss, by_hidden, by_weight


def assert_within(found: torch.Tensor, exact: torch.Tensor | None, bound: torch.Tensor) -> None:
    assert exact is not None
    worst = float(((found - exact).abs() / bound).max())
    assert worst <= 1, f"{worst} times what rounding may do"


def views_of(weight: torch.Tensor):
    @contextmanager
    def rows(block: HeadBlock) -> Iterator[torch.Tensor]:
        yield weight[block[0] : block[1]]

    return rows


# -- against a plain loop ----------------------------------------------------------------------------------------------


class BlockedLoop(PlainLoop):
    """A plain loop whose loss is made of the same blocks, all of them in memory."""

    def step(self, micro_batches: list[Batch]) -> float:
        outputs = [hidden_states(self.model, batch) for batch in micro_batches]
        picked = [next_tokens(out.detach(), b["labels"]) for out, b in zip(outputs, micro_batches, strict=True)]
        name = table_names(self.model)[-1]
        weight, sums = self.parameters[name].detach(), {}

        def take(block: HeadBlock, lane: int, gradient: torch.Tensor) -> None:
            sums[block] = sums[block] + gradient if lane else gradient.float()

        trained = take if name in self.masters else None
        hiddens, targets, places = zip(*picked, strict=True)
        loss, gradients = blocked_cross_entropy(hiddens, targets, Head(BLOCKS, views_of(weight), trained))
        if trained:
            self.masters[name].grad = torch.cat([sums[block] for block in BLOCKS])
        for output, gradient, where in zip(outputs, gradients, places, strict=True):
            full = torch.zeros_like(output)
            full.view(-1, full.shape[-1])[where] = gradient
            output.backward(full)
            self.take_gradients()
        self.update()
        return float(loss)

    def update(self) -> float | None:
        """The norm is of the norms of blocks, as they lie in the store."""
        clip, self.clip = self.clip, None
        if clip is not None:
            pieces = [
                piece
                for name, master in self.masters.items()
                for piece in (master.grad.split(ROWS) if name in table_names(self.model) else [master.grad])
            ]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(piece) for piece in pieces]))
            for piece in pieces:
                piece.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
        super().update()
        self.clip = clip
        return None


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    return base_model(model)(input_ids=batch["input_ids"], use_cache=False).last_hidden_state


def blocked_pair(family: str, tied: bool, setting: Setting, directory: Path, prepare=id) -> Pair:
    return make_pair(family, tied, ADAMW, replace(setting, table_rows=ROWS), directory, prepare, BlockedLoop)


def padded_batches(steps: int, accumulate: int) -> list[list[Batch]]:
    """As padding on the right looks, in some of the sequences; token 0 has padding_idx in these models."""
    batches = make_batches(steps, accumulate)
    for micro_batches in batches:
        for batch in micro_batches:
            batch["input_ids"][1, -5:] = 0
            batch["labels"][1, -4:] = -100  # the first padding token is learnt, so that its row matters as a target
            batch["labels"][1, -5] = 0
    return batches


CASES = [
    ("llama", True, Setting("fp32", "disk")),
    ("llama", False, Setting("fp32", "mixed", 3)),
    ("llama", True, Setting("fp32", "disk", 3)),
    ("llama", False, Setting("mixed", "disk", clip=0.05)),
    ("llama", True, Setting("mixed", "mixed", 3, clip=0.05)),
    ("gemma3", True, Setting("mixed", "disk")),
    ("gemma3", False, Setting("fp32", "near", 3, clip=0.05, gradient_home="host")),
    ("qwen3", True, Setting("mixed", "disk", 3, hold=True)),
    ("gpt2", True, Setting("fp32", "disk", activations=ACTIVATIONS_OF["mixed"])),
    ("mixtral", False, Setting("mixed", "near", 3)),
]


@pytest.mark.parametrize(("family", "tied", "setting"), CASES)
def test_equals_a_plain_loop_over_the_same_blocks(family: str, tied: bool, setting: Setting, tmp_path: Path) -> None:
    pair = blocked_pair(family, tied, setting, tmp_path)
    assert pair.job.plan.exactness == "rounding"
    for micro_batches in padded_batches(3, setting.accumulate):
        pair.step(micro_batches)
    pair.assert_equal()
    assert_idle(pair.job)


@pytest.mark.parametrize("tied", [True, False])
def test_a_held_update_comes_before_the_rows_of_a_table_in_one_block_are_gathered(tied: bool, tmp_path: Path) -> None:
    """Applying it at once, as an evaluation or a stop does, changes no number."""
    setting, found = Setting("mixed", "near", clip=0.05, table_rows=VOCABULARY), []
    for at_once in (False, True):
        (tmp_path / str(at_once)).mkdir()
        job = make_job(make_model("llama", tied), ADAMW, setting, tmp_path / str(at_once))
        losses = []
        for micro_batches in make_batches(4, 1):
            losses.append(job.train_step(micro_batches).loss)
            if at_once:
                job.flush()
        found.append(losses)
        job.flush()
        assert_idle(job)
    assert found[0] == found[1]


def test_micro_batches_share_a_table_in_one_block(tmp_path: Path) -> None:
    """Each gathers rows of its own, whichever of them runs."""
    found = []
    for rows in (VOCABULARY, ROWS):
        setting = Setting("fp32", "near", 2, table_rows=rows)
        (tmp_path / str(rows)).mkdir()
        job = make_job(make_model("llama", True), ADAMW, setting, tmp_path / str(rows))
        found.append([job.train_step(micro_batches).loss for micro_batches in make_batches(3, 2)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_frozen_table_is_left_alone(tmp_path: Path) -> None:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in table_names(model))

    pair = blocked_pair("llama", False, Setting("fp32", "disk", 2), tmp_path, freeze)
    for micro_batches in padded_batches(2, 2):
        pair.step(micro_batches)
    pair.assert_equal()
    for name in table_names(pair.plain.model):
        assert torch.equal(pair.job.read(name, 0, VOCABULARY), pair.plain.parameters[name])
    assert_idle(pair.job)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
def test_is_the_modules_own_loss_but_for_rounding(family: str, tied: bool, tmp_path: Path) -> None:
    """In training and, bit for bit the same number, in evaluation."""
    pair = blocked_pair(family, tied, Setting("fp32", "disk"), tmp_path)
    (batch,) = padded_batches(1, 1)[0]
    model = pair.plain.model
    with torch.no_grad():
        own = float(model(**batch).loss)
        hidden, targets, _ = next_tokens(hidden_states(model, batch), batch["labels"])
        weight = model.get_output_embeddings().weight
    bound = rounding_bounds(hidden.double(), weight.double(), targets, torch.float32)[0]
    evaluated = pair.job.evaluate(iter([batch]))
    assert abs(evaluated - own) <= 2 * bound  # both sides round
    assert pair.job.train_step([batch]).loss == evaluated
    assert_idle(pair.job)


def test_a_job_with_tables_detaches_into_an_ordinary_module(tmp_path: Path) -> None:
    pair = blocked_pair("llama", True, Setting("fp32", "disk", 2), tmp_path)
    first, (seen, _) = padded_batches(2, 2)
    pair.step(first)
    with pytest.raises(ModelError, match="loss=.module."):
        pair.job.model(**seen)  # its own loss would need the whole head
    model = pair.job.detach()
    assert torch.equal(model(**seen).logits, pair.plain.model(**seen).logits)
    model(**seen).loss.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_nothing_to_learn_is_an_error_not_a_weight_of_nan(tmp_path: Path) -> None:
    pair = blocked_pair("llama", True, Setting("fp32", "disk"), tmp_path)
    (batch,) = padded_batches(1, 1)[0]
    with pytest.raises(RunError, match="loss of step 1 is nan"):
        pair.job.train_step([{**batch, "labels": torch.full_like(batch["labels"], -100)}])
    assert_same_weights(pair.job, pair.plain)
    assert_idle(pair.job)
