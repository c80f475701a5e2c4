"""Backward in two halves gives the gradients of one piece, bit for bit."""

from __future__ import annotations

import torch
from exactness import Mixer
from torch import nn

from outsize.model.halves import in_halves


class Block(nn.Module):
    """A bias, a gate, attention and a norm, none of whose weights is used twice."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.parts = nn.Linear(hidden, 3 * hidden)
        self.gate, self.out = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden)
        self.strength = nn.Parameter(torch.rand(hidden))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.parts(self.norm(states)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return states + self.out(mixed * torch.sigmoid(self.gate(states))) * self.strength


def test_the_second_half_finds_what_backward_in_one_piece_finds() -> None:
    blocks, states, gradient = nn.Sequential(Block(32), Block(32)), torch.rand(2, 9, 32), torch.rand(2, 9, 32)
    (expected, came), weights = backward(blocks, states, gradient)
    outcome = blocks(later := states.clone().requires_grad_())
    found, rest = in_halves(outcome, gradient, later)
    assert found is not None and torch.equal(found, came)
    assert all(weight.grad is None for weight in weights)
    arrived: list[str] = []
    for name, weight in blocks.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda weight, name=name: arrived.append(name))
    rest()
    assert all(torch.equal(weight.grad, known) for weight, known in zip(weights, expected, strict=True))  # pyright: ignore
    assert sorted(arrived) == sorted(name for name, _ in blocks.named_parameters())
    assert [name[0] for name in arrived] == sorted((name[0] for name in arrived), reverse=True), "not block by block"


def test_of_a_weight_that_is_used_twice_nothing_is_left_for_later() -> None:
    blocks, states, gradient = nn.Sequential(Mixer(32, 0.0), Block(32)), torch.rand(2, 9, 32), torch.rand(2, 9, 32)
    (expected, came), weights = backward(blocks, states, gradient)
    outcome = blocks(later := states.clone().requires_grad_())
    found, rest = in_halves(outcome, gradient, later)
    assert found is not None and torch.equal(found, came)
    assert all(weight.grad is not None for weight in weights)
    rest()
    assert all(torch.equal(weight.grad, known) for weight, known in zip(weights, expected, strict=True))  # pyright: ignore


def backward(
    blocks: nn.Module, states: torch.Tensor, gradient: torch.Tensor
) -> tuple[tuple[list[torch.Tensor], torch.Tensor], list[nn.Parameter]]:
    """In one piece: gradients of the weights and of what came; and the weights, without them."""
    blocks(came := states.clone().requires_grad_()).backward(gradient)
    weights = [weight for weight in blocks.parameters() if weight.requires_grad]
    found = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    assert came.grad is not None
    return ([gradient for gradient in found if gradient is not None], came.grad), weights
