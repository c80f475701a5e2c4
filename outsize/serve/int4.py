"""Weights as 4-bit integers in groups of 32 inputs, with a scale and a middle for each group and output: 31% of the bytes of
bf16. Each is rounded to one of 16 steps from its group's least to its greatest.

Source: asymmetric quantization (Krishnamoorthi 2018, arXiv 1806.08342, section 2.1) in blocks (Dettmers and Zettlemoyer
2022, arXiv 2212.09720, section 2.2)."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function

GROUP = 32  # inputs; GGUF has as many in its blocks of 4 bits, which are so rounded to nearly their own numbers
OUTPUTS = 64  # the most that torch packs together
STEPS, MIDDLE = 15, 8  # from a group's least to its greatest; which of them torch adds the middle to
FEW_ROWS = 48  # of activations, for which torch's product is faster than one with the weight made floating point
PIECE = 1 << 20  # weights that are made integers, or floating point again, at once
PACK = torch.ops.aten._convert_weight_to_int4pack_for_cpu
INNER = 2  # an argument that packing has, but on processors no use for
RUNS = {"AVX512": 64, "AVX2": 32}  # outputs that lie together in a packed weight, by what the processor can


def int4_linear(hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`hidden` [..., inputs] times `weight` [outputs, inputs / 2] (uint8, as torch packs it), with `scale` [groups, outputs,
    scale and middle]. One call for whoever writes calls down: which product is taken depends on the number of rows."""
    if has_torch_function((hidden, weight, scale)):
        return handle_torch_function(int4_linear, (hidden, weight, scale), hidden, weight, scale)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    if len(rows) <= FEW_ROWS or not _run():
        found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, GROUP, scale)
    else:
        found = rows.new_empty(len(rows), len(weight))
        for piece in _pieces(*weight.shape):
            found[:, piece] = rows @ _floating(weight[piece], scale[:, piece])
    return found.view(*hidden.shape[:-1], len(weight))


def fits_int4(inputs: int, outputs: int) -> bool:
    return inputs % GROUP == 0 and outputs % OUTPUTS == 0


def to_int4(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [outputs, inputs] as that `int4_linear` wants, and its scale in `dtype`."""
    outputs, inputs = rows.shape
    found = torch.empty((outputs, inputs // 2), dtype=torch.uint8, device=rows.device)
    scale = torch.empty((inputs // GROUP, outputs, 2), dtype=dtype, device=rows.device)
    for piece in _pieces(*found.shape):
        groups = rows[piece].float().unflatten(1, (-1, GROUP))
        least, greatest = groups.amin(-1), groups.amax(-1)
        step = (greatest - least) / STEPS
        middle, step = (least + MIDDLE * step).to(dtype), step.to(dtype)
        step = torch.where(step > 0, step, torch.ones_like(step))  # else all are the middle
        steps = (groups - middle.float()[..., None]).div_(step.float()[..., None])
        steps = steps.round_().add_(MIDDLE).clamp_(0, STEPS)
        found[piece] = PACK(steps.flatten(1).int(), INNER)
        scale[:, piece] = torch.stack([step, middle], -1).transpose(0, 1)
    return found, scale


def _floating(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Packed weights as what they stand for [inputs, outputs], in the dtype of their scale. Outputs lie in runs: of each
    run and input, the first half in the lower bits of some bytes and the other half in the higher ones."""
    groups, outputs, _ = scale.shape
    run = _run()
    packed = weight.view(-1, 2 * weight.shape[1], run // 2)
    steps = torch.cat([packed & 15, packed >> 4], -1).view(torch.int8).sub_(MIDDLE).to(scale.dtype)
    steps = steps.view(-1, groups, GROUP, run).permute(1, 2, 0, 3)
    step, middle = (scale[..., number].contiguous().view(groups, 1, -1, run) for number in (0, 1))
    found = scale.new_empty(groups, GROUP, outputs // run, run)
    return torch.addcmul(middle, steps, step, out=found).view(-1, outputs)


def _run() -> int:
    """How many outputs lie together; 0 where torch packs them in some other way than `_floating` reads."""
    return RUNS.get(torch.backends.cpu.get_cpu_capability(), 0)


def _pieces(outputs: int, width: int) -> list[slice]:
    """Runs of the rows of a packed weight, `width` bytes each."""
    step = max(1, PIECE // (2 * width * OUTPUTS)) * OUTPUTS
    return [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
