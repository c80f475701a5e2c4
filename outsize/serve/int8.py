"""Linear layers whose weights are held as 8-bit integers with one scale for each output: about half the bytes of bf16, on
disk, in memory and in every pass. Approximate: each weight is rounded to one of 255 steps of its row's largest.

Source: symmetric quantization by channel, to nearest (Krishnamoorthi 2018, arXiv 1806.08342, section 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import handle_torch_function, has_torch_function

from outsize.errors import OptionError
from outsize.model.units import find_units

STEPS = 127  # on each side of zero
FEW_ROWS = (
    16  # of activations, for which torch's product of integers is faster than one with the weight made floating point
)
INPUTS = 32  # that product reads so many weights of a row at once, and past the end of one whose length is no multiple
PIECE = 1 << 21  # weights that are made integers, or floating point again, at once

Read = Callable[[str, int, int], torch.Tensor]


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


class Int8Linear(nn.Module):
    """In place of a linear layer. Its weight and scale are on the meta device, until somebody brings them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        meta = linear.weight.to("meta")
        self.weight = nn.Parameter(torch.empty_like(meta, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty_like(meta[:, 0]), requires_grad=False)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = int8_linear(hidden, self.weight, self.scale)
        return found if self.bias is None else found + self.bias


def use_int8(model: nn.Module, read: Read) -> Read:
    """Replace the linear layers of repeated units; embeddings, head and norms stay as they are. Returns what reads the
    weights that the model then has, by names, as `read` does those it had.

    Raises OptionError when there is no such layer."""
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rounded: dict[str, torch.dtype] = {}
    blocks = [unit.module for unit in find_units(model) if unit.repeated]
    for parent in [module for block in blocks for module in block.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % INPUTS == 0 and users[id(child.weight)] == 1:
                rounded[names[id(child.weight)].removesuffix(".weight")] = child.weight.dtype
                setattr(parent, name, Int8Linear(child))
    if not rounded:
        raise OptionError(
            f"No linear layer of {type(model).__name__} can be held as int8: there is none in a repeated block with a "
            f"multiple of {INPUTS} inputs. Leave out --weights int8."
        )
    return Int8Reader(rounded, read).read


class Int8Reader:
    """Reads `weight` and `scale` of the layers in `rounded` (name -> dtype of the scale), made of what `read` gives; all
    else as it is."""

    def __init__(self, rounded: dict[str, torch.dtype], read: Read) -> None:
        self._rounded, self._read = rounded, read

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        layer, _, what = name.rpartition(".")
        if layer not in self._rounded or what not in ("weight", "scale"):
            return self._read(name, start, stop)
        rows = self._read(f"{layer}.weight", start, stop)
        scale = _scale(rows).to(self._rounded[layer])
        return scale if what == "scale" else _rounded(rows, scale)


def _scale(rows: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    largest = rows.abs().amax(1)
    return torch.where(largest > 0, largest / STEPS, torch.ones_like(largest))


def _rounded(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    found = torch.empty(rows.shape, dtype=torch.int8)
    for piece in _pieces(rows):
        steps = rows[piece].float() / scale[piece].float()[:, None]
        found[piece] = steps.round_().clamp_(-STEPS, STEPS)
    return found


def _pieces(weight: torch.Tensor) -> list[slice]:
    """Runs of its rows."""
    step = max(1, PIECE // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]
