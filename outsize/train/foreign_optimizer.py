"""State dicts of torch optimizers that others have saved, by parameter name.

torch numbers parameters in the order in which the optimizer was given them. Which number is which parameter is known when
the groups have names, when one group has all the model's parameters in their order, and when the transformers Trainer
made the groups; in any other case the state is refused, because a guess could not be seen to be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.errors import ModelError
from outsize.train.optimizer_file import OptimizerState, ParameterState


def by_name(path: Path, saved: Mapping[Any, Any], model: nn.Module, by_trainer: bool = False) -> OptimizerState:
    """`saved` has FileTensors in place of tensors; `model` may be on the meta device.

    Raises ModelError when it is not known which state is whose, or shapes do not fit."""
    if "state" not in saved:
        return _checked(path, _flattened(path, saved, model), model)
    state = saved["state"]
    groups = saved.get("param_groups", [])
    groups = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if all(isinstance(key, str) and not key.isdigit() for key in state):
        return _checked(path, state, model)
    names = _numbered(path, groups, model, by_trainer)
    return _checked(path, {names.get(int(key), key): value for key, value in state.items()}, model)


def _flattened(path: Path, saved: Mapping[Any, Any], model: nn.Module) -> dict[str, dict[str, Any]]:
    """`state.PARAMETER.KEY`, as torch.distributed.checkpoint flattens."""
    found: dict[str, dict[str, Any]] = {}
    names = sorted((name for name, _ in model.named_parameters()), key=len, reverse=True)
    for entry, value in saved.items():
        if not str(entry).startswith("state."):
            continue
        rest = str(entry).removeprefix("state.")
        name = next((name for name in names if rest.startswith(name + ".")), None)
        if name is None:
            raise ModelError(f"{path}: {entry} is the state of no parameter of {type(model).__name__}.")
        found.setdefault(name, {})[rest[len(name) + 1 :]] = value
    if not found:
        raise ModelError(f"{path}: its optimizer has no entry `state`, nor any that begins with `state.`.")
    return found


def _numbered(path: Path, groups: Sequence[Any], model: nn.Module, by_trainer: bool) -> dict[int, str]:
    numbers = [number for group in groups for number in group["params"]]
    named = [name for group in groups for name in group.get("param_names", [])]
    parameters = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if len(named) == len(numbers):
        return dict(zip(numbers, named, strict=True))
    if len(groups) == 1 and len(numbers) == len(parameters):
        return dict(zip(numbers, parameters, strict=True))
    if by_trainer and len(groups) == 2:
        decayed, other = _trainer_groups(model)
        if [len(decayed), len(other)] == [len(group["params"]) for group in groups]:
            return dict(zip(numbers, [*decayed, *other], strict=True))
    raise ModelError(
        f"{path}: which of the optimizer's {len(numbers)} parameters in {len(groups)} groups is which of the model's "
        f"{len(parameters)} is not said. Save it from an optimizer that was made of model.named_parameters(), or give "
        "--weights-only."
    )


def _trainer_groups(model: nn.Module) -> tuple[list[str], list[str]]:
    """Parameters with weight decay and without, as transformers' Trainer groups them, by its own function."""
    from transformers import Trainer

    decay = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType] - uses no self
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [name for name in names if name in decay], [name for name in names if name not in decay]


def _checked(path: Path, state: Mapping[Any, Any], model: nn.Module) -> OptimizerState:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parameters = {}
    for name, held in state.items():
        if name not in shapes:
            raise ModelError(
                f"{path}: its optimizer has a state of {name}, which {type(model).__name__} does not have."
            )
        tensors = {key: value for key, value in held.items() if hasattr(value, "read")}
        for key, tensor in tensors.items():
            elements = torch.Size(tensor.shape).numel()
            if elements == torch.Size(shapes[name]).numel() and elements > 1 and tuple(tensor.shape) != shapes[name]:
                raise ModelError(_misfit(path, name, key, tensor.shape, shapes[name]))
            if elements > torch.Size(shapes[name]).numel() and elements > 1:
                raise ModelError(_misfit(path, name, key, tensor.shape, shapes[name]))
        if not all(isinstance(value, int | float | None) for key, value in held.items() if key not in tensors):
            raise ModelError(f"{path}: the state of {name} is neither tensors nor numbers.")
        parameters[name] = ParameterState(tensors, {k: v for k, v in held.items() if k not in tensors}, {})
    return OptimizerState(0, (), parameters)


def _misfit(path: Path, name: str, key: str, found: Sequence[int], wanted: Sequence[int]) -> str:
    return (
        f"{path}: {key} of {name} has shape {list(found)}, for a parameter {list(wanted)}: they are not of one model."
    )
