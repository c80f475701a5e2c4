"""Packed products give the numbers of the layers they stand for, and hold no byte in vain."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import tiny_model
from torch import nn

import outsize
from outsize.memory.ledger import Ledger
from outsize.planner.serving import discover
from outsize.serve.attention import use_paged_attention
from outsize.serve.products import LinearCalls, Product, can_pack

needs_bf16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this processor does not compute in bf16")


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_layers_beside_each_other_bit_for_bit(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    layers = [nn.Linear(96, size, bias=bias, dtype=torch.bfloat16).requires_grad_(False) for size in (96, 33, 200)]
    hidden = torch.randn((1, rows, 96), generator=generator).bfloat16()
    expected, ledger = [layer(hidden) for layer in layers], Ledger()
    product = Product(layers, torch.cat([layer.weight for layer in layers]), ledger)
    assert ledger.adopted["host"] == product.nbytes >= 2 * 96 * 329
    assert all(torch.equal(layer(hidden), out) for layer, out in zip(layers, expected, strict=True))
    other = hidden + 1  # whoever is called with something else gets his own
    assert torch.equal(layers[2](other), nn.functional.linear(other, layers[2].weight, layers[2].bias))
    product.remove()
    assert ledger.adopted["host"] == 0 and torch.equal(layers[1](hidden), expected[1])


def test_what_is_called_with_one_input_is_found() -> None:
    model = tiny_model("llama", tied=False).eval()
    use_paged_attention(model)
    _, groups, _ = discover(model)
    first = [".".join(name.split(".")[3:-1]) for group in groups[:4] for name in group]
    assert [len(group) for group in groups] == 3 * [3, 1, 2, 1] + [1]
    assert first == [
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]


class Picky(nn.Module):
    """Wants each output to itself, and calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.again = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.one(hidden).view(-1) + self.two(hidden).view(-1) + self.again(self.again(hidden)).view(-1)


def test_a_module_that_looks_at_outputs_otherwise_keeps_its_layers_apart() -> None:
    hidden = torch.zeros(2, 3, 4)
    with LinearCalls().watching(module := Picky()), pytest.raises(RuntimeError, match="view"):
        module(hidden)
    calls = LinearCalls(beside=False)
    with calls.watching(module):
        module(hidden)
    assert calls.groups() == [("one.weight",), ("two.weight",)]


@needs_bf16
@pytest.mark.parametrize("tied", [False, True])
def test_an_engine_that_packs_says_the_same(tmp_path: Path, tied: bool) -> None:
    model = copy.deepcopy(tiny_model("llama", tied=tied)).bfloat16().eval()
    model.save_pretrained(tmp_path)
    prompts = [[5, 6, 7, 8], [3] * 40, list(range(10, 60))]
    with torch.no_grad(), outsize.Engine(str(tmp_path), memory="4GiB", context=128, step_tokens=64) as engine:
        assert ("lm_head.weight" if not tied else "model.embed_tokens.weight",) in engine.plan.packed
        answers = engine.generate(prompts, max_new_tokens=16, ignore_end=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            logits = model(torch.tensor([[*prompt, *answer.tokens[:-1]]])).logits[0, len(prompt) - 1 :].float()
            said = logits[torch.arange(16), torch.tensor(answer.tokens)]
            # Sums in another order differ in the last of bf16's 8 bits, and a tie may end either way.
            assert bool((logits.max(-1).values - said <= 2**-6 * logits.abs().max(-1).values).all())
        held = engine.engine.store.ledger.held_in("host")
        plain = sum(p.numel() * 2 for p in model.parameters()) * (1 if not tied else 1.3)
        assert held - engine.engine.cache.bytes.numel() < plain + 4096 * 60
