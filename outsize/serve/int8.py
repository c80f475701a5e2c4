"""Weights as 8-bit integers with one scale for each output: half the bytes of bf16. Each is rounded to one of 255 steps of
its row's largest.

Source: symmetric quantization by channel, to nearest (Krishnamoorthi 2018, arXiv 1806.08342, section 3)."""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function

STEPS = 127  # on each side of zero
FEW_ROWS = (
    16  # of activations, for which torch's product of integers is faster than one with the weight made floating point
)
INPUTS = 32  # that product reads so many weights of a row at once, and past the end of one whose length is no multiple
PIECE = 1 << 21  # weights that are made integers, or floating point again, at once


def int8_linear(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`hidden` [..., inputs] times `weight` [outputs, inputs] (int8), each output times its `scale` [outputs]. One call for
    whoever writes calls down: which product is taken depends on the number of rows."""
    if has_torch_function((hidden, weight, scale)):
        return handle_torch_function(int8_linear, (hidden, weight, scale), hidden, weight, scale)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if len(rows) <= FEW_ROWS and hidden.dtype is torch.bfloat16:
        found = torch.ops.aten._weight_int8pack_mm(rows, weight, scale)
    else:
        found = rows.new_empty(len(rows), len(weight))
        for piece in _pieces(weight):
            found[:, piece] = linear(rows, weight[piece].to(hidden.dtype)) * scale[piece]
    return found.view(*hidden.shape[:-1], len(weight))


def fits_int8(inputs: int, outputs: int) -> bool:
    return inputs % INPUTS == 0


def to_int8(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs] as that `int8_linear` wants, and its scale [outputs] in `dtype`."""
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest / STEPS, torch.ones_like(largest)).to(dtype)
    found = torch.empty_like(rows, dtype=torch.int8)
    for piece in _pieces(rows):
        steps = rows[piece].float() / scale[piece].float()[:, None]
        found[piece] = steps.round_().clamp_(-STEPS, STEPS)
    return found, scale


def _pieces(weight: torch.Tensor) -> list[slice]:
    """Runs of its rows."""
    step = max(1, PIECE // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]
