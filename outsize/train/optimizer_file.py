"""An optimizer's state as files that plain PyTorch reads: one entry for each parameter and tensor.

optimizer.safetensors (or shards, or optimizer.packed) holds `state.PARAMETER.KEY`, named as torch.distributed.checkpoint
flattens an optimizer; counters are 0-d tensors. optimizer.json says which keys each parameter has, with what is not a
tensor. docs/formats.md has both, and ten lines that read them without Outsize."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from outsize.errors import ModelError, OptionError
from outsize.model.conversion import FileTensor
from outsize.model.tensor_files import read_tensors

STEM, FACTS = "optimizer", "optimizer.json"
VERSION = 1


@dataclass(frozen=True)
class Group:
    """Parameters that have the same optimizer class (its dotted path) and hyper-parameters."""

    cls: str
    options: Mapping[str, Any]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class ParameterState:
    """One parameter's: tensors by key, numbers by key, and entries of the parameter group that steps change."""

    tensors: Mapping[str, FileTensor]
    numbers: Mapping[str, Any]
    group: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerState:
    """What is in the files. `groups` is empty when whoever wrote them did not know the hyper-parameters."""

    step: int
    groups: tuple[Group, ...]
    parameters: Mapping[str, ParameterState]

    def class_of(self, parameter: str) -> str | None:
        return next((group.cls for group in self.groups if parameter in group.parameters), None)


def tensor_name(parameter: str, key: str) -> str:
    return f"state.{parameter}.{key}"


def write_facts(folder: Path, step: int, groups: Iterable[Group], states: Mapping[str, Any]) -> None:
    """optimizer.json; `states` have, by parameter, mappings `tensors`, `numbers` and `group`."""
    said = {
        "format": "optimizer state",
        "version": VERSION,
        "step": step,
        "groups": [
            {"class": group.cls, "options": dict(group.options), "parameters": list(group.parameters)}
            for group in groups
        ],
        "state": {
            name: {"tensors": sorted(state.tensors), "numbers": dict(state.numbers), "group": dict(state.group)}
            for name, state in states.items()
        },
    }
    (folder / FACTS).write_text(json.dumps(said, indent=1) + "\n")


def read_optimizer(folder: Path) -> OptimizerState:
    """Raises ModelError when files are missing, damaged, of another version, or do not belong together."""
    try:
        said = json.loads((folder / FACTS).read_text())
        version, step = said["version"], int(said["step"])
        groups = tuple(Group(g["class"], g["options"], tuple(g["parameters"])) for g in said["groups"])
        states = {name: (s["tensors"], dict(s["numbers"]), dict(s["group"])) for name, s in said["state"].items()}
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no {FACTS}: no optimizer's state is there. outsize checkpoint export --optimizer writes one, "
            "outsize checkpoint import makes one of other formats."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ModelError(f"{folder / FACTS} cannot be read: {problem!r}. Export it again.") from None
    if version != VERSION:
        raise ModelError(f"{folder / FACTS} has format version {version}; this Outsize reads version {VERSION}.")
    held = read_tensors(folder, STEM)
    parameters = {name: _gather(folder, name, held, *state) for name, state in states.items()}
    return OptimizerState(step, groups, parameters)


def _gather(
    folder: Path, name: str, held: Mapping[str, FileTensor], keys: list[str], numbers: dict, group: dict
) -> ParameterState:
    for key in keys:
        if tensor_name(name, key) not in held:
            raise ModelError(f"{folder}: tensor {tensor_name(name, key)} is missing, which {FACTS} announces.")
    return ParameterState({key: held[tensor_name(name, key)] for key in keys}, numbers, group)


def load_optimizer_state(folder: str | Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Give `optimizer`, over parameters of `model`, the state in an exported folder. Returns the step it is of.

    Hyper-parameters stay as they are in `optimizer`; counters that a class keeps in its groups are set. As in
    `Optimizer.load_state_dict`, floating-point tensors take the dtype of their parameter: load the exported weights in
    the dtype they have. With several optimizers (Muon and AdamW) call it for each. Memory: the state, one tensor at a
    time beyond it. Raises ModelError when the folder is of another model, OptionError of another optimizer class."""
    stored = read_optimizer(Path(folder))
    names = {parameter: name for name, parameter in model.named_parameters()}
    if strange := sorted(set(stored.parameters) - set(names.values())):
        raise ModelError(f"{folder} is of another model: {type(model).__name__} has no parameter {strange[0]}.")
    given = {names[p]: (p, group) for group in optimizer.param_groups for p in group["params"] if p in names}
    wanted = [name for name in given if name in stored.parameters]
    for name in wanted:
        _check(stored, name, optimizer)
    for name in wanted:
        parameter, group = given[name]
        optimizer.state[parameter] = _state(stored.parameters[name], parameter, group)
        group.update({key: _listed(group.get(key), value) for key, value in stored.parameters[name].group.items()})
    return stored.step


def _check(stored: OptimizerState, name: str, optimizer: Optimizer) -> None:
    known, cls = stored.class_of(name), class_path(type(optimizer))
    if known not in (None, cls):
        raise OptionError(f"The state of {name} was written by {known}; it is not one for {cls}.")


def _state(stored: ParameterState, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    on_device = group.get("fused") or group.get("capturable")
    state: dict[str, Any] = dict(stored.numbers)
    for key, tensor in stored.tensors.items():
        value = tensor.read()
        if value.numel() > 1 and value.shape.numel() == parameter.numel() and value.shape != parameter.shape:
            raise ModelError(
                f"{tensor.path}: {key} has shape {list(value.shape)} for a parameter {list(parameter.shape)}."
            )
        if value.dim() == 0 and parameter.dim() > 0:
            state[key] = value.to(parameter.device) if on_device else value
        else:
            dtype = parameter.dtype if value.is_floating_point() else value.dtype
            state[key] = value.to(parameter.device, dtype)
    return state


def _listed(before: Any, value: Any) -> Any:
    return tuple(value) if isinstance(before, tuple) else value


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
