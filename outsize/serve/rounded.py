"""Linear layers whose weights are held in fewer bits, on disk, in memory and in every pass. Approximate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from outsize.errors import OptionError
from outsize.model.units import find_units
from outsize.plan import INT4, INT8
from outsize.serve.int4 import GROUP, OUTPUTS, fits_int4, int4_linear, to_int4
from outsize.serve.int8 import INPUTS, fits_int8, int8_linear, to_int8

Read = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: `make` of one [outputs, inputs] what is held in its place and its scale, in a dtype, which
    `multiply` takes with hidden states. It `fits` some numbers of inputs and outputs, those with `shapes`."""

    about: str
    shapes: str
    fits: Callable[[int, int], bool]
    make: Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


ROUNDINGS = {
    INT8: Rounding(
        "8 bits, with a scale for each output", f"a multiple of {INPUTS} inputs", fits_int8, to_int8, int8_linear
    ),
    INT4: Rounding(
        f"4 bits, with a scale and a middle for each output and {GROUP} inputs (asymmetric)",
        f"multiples of {GROUP} inputs and {OUTPUTS} outputs",
        fits_int4,
        to_int4,
        int4_linear,
    ),
}


class RoundedLinear(nn.Module):
    """In place of a linear layer. Its weight and scale are on the meta device, until somebody brings them."""

    def __init__(self, linear: nn.Linear, how: Rounding) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = how.make(linear.weight.detach().to("meta"), linear.weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self._multiply = how.multiply

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self._multiply(hidden, self.weight, self.scale)
        return found if self.bias is None else found + self.bias


def use_rounded(model: nn.Module, weights: str, read: Read) -> Read:
    """Replace the linear layers of repeated units by ones that hold `weights` so; embeddings, head and norms stay as they
    are. Returns what reads the weights that the model then has, by names, as `read` does those it had.

    Raises OptionError when there is no such layer."""
    how = ROUNDINGS[weights]
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rounded: dict[str, RoundedLinear] = {}
    for parent in _repeated(model):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or users[id(child.weight)] != 1:
                continue
            if how.fits(child.in_features, child.out_features):
                replaced = rounded[names[id(child.weight)].removesuffix(".weight")] = RoundedLinear(child, how)
                setattr(parent, name, replaced)
    if not rounded:
        raise OptionError(
            f"No linear layer of {type(model).__name__} can be held as {weights}: there is none in a repeated block with "
            f"{how.shapes}. Leave out --weights {weights}."
        )
    return RoundedReader(how, rounded, read).read


class RoundedReader:
    """Reads `weight` and `scale` of the layers in `rounded`, by name, made of what `read` gives; all else as it is. Both
    are made at once, and what was not asked for yet is kept until another layer is read."""

    def __init__(self, how: Rounding, rounded: dict[str, RoundedLinear], read: Read) -> None:
        self._how, self._rounded, self._read = how, rounded, read
        self._made: dict[str, torch.Tensor] = {}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        layer, _, what = name.rpartition(".")
        if layer not in self._rounded or what not in ("weight", "scale"):
            return self._read(name, start, stop)
        if name not in self._made:
            module, weight = self._rounded[layer], f"{layer}.weight"
            self._made.clear()
            made = self._how.make(self._read(weight, 0, module.out_features), module.scale.dtype)
            self._made = dict(zip((weight, f"{layer}.scale"), made, strict=True))
        return self._made.pop(name)[start:stop]


def stored_names(model: nn.Module) -> list[str]:
    """Of its weights, those that are in its files: all but scales."""
    scales = {id(module.scale) for module in model.modules() if isinstance(module, RoundedLinear)}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in scales]


def describe_rounded(model: nn.Module, weights: str) -> str:
    """For people: how much of a model is held so, and of which layers in repeated blocks it is not."""
    layers = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    held = {id(parameter) for layer in layers for parameter in (layer.weight, layer.scale)}
    rounded = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in held)
    how = ROUNDINGS[weights]
    said = f"{rounded / (rounded + stored):.0%} of the weights are rounded to {how.about}"
    others = [child for parent in _repeated(model) for child in parent.children() if type(child) is nn.Linear]
    left = sum(not how.fits(child.in_features, child.out_features) for child in others)
    return f"{said}; {left} linear layers stay as they are, not having {how.shapes}" if left else said


def _repeated(model: nn.Module) -> list[nn.Module]:
    """All modules within repeated units, those included."""
    return [module for unit in find_units(model) if unit.repeated for module in unit.module.modules()]
