"""An optimizer's state out of files into the store: cut into the chunks that the updater steps."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from outsize.errors import ModelError, OptionError
from outsize.model.conversion import FileTensor
from outsize.model.weights import RowBlock, Weight
from outsize.train.optimizer_file import OptimizerState, ParameterState, class_path
from outsize.train.optimizers import OptimizerRule, take_step
from outsize.train.update import Chunk, Kind, Updater, find_kind


def check_optimizer(stored: OptimizerState, model: nn.Module, rule: OptimizerRule) -> None:
    """Before any work, as it needs shapes only. Raises ModelError when the state is of another model, OptionError when of
    another optimizer class or other options."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds: list[Kind] = []
    for name, state in stored.parameters.items():
        if name not in trained:
            raise ModelError(f"The optimizer's state is of another model: {name} is not trained here.")
        kind = find_kind(kinds, *rule(name, trained[name]))
        _check(name, stored.class_of(name), state, kind, tuple(trained[name].shape))


def _check(name: str, cls: str | None, state: ParameterState, kind: Kind, shape: tuple[int, ...]) -> None:
    own, layout = class_path(kind.cls), kind.layout(shape)
    if cls not in (None, own):
        raise OptionError(f"The state of {name} was written by {cls}; this run steps it with {own}. Give --optimizer.")
    wanted = {key for key, _, _ in layout.tensors} | set(layout.scalars)
    found = set(state.tensors) | set(state.numbers)
    evolving = kind.evolving(layout)
    if wanted != found or not evolving <= set(state.group):
        raise OptionError(
            f"{own} keeps {_listed(wanted | evolving)} for {name}, and the files have "
            f"{_listed(found | set(state.group))}: they are of another optimizer, or one with other options."
        )
    for key, expected, _ in layout.tensors:
        if tuple(state.tensors[key].shape) != tuple(expected):
            raise ModelError(_misfit(state.tensors[key], key, name, shape))


def _misfit(source: FileTensor, key: str, name: str, shape: tuple[int, ...]) -> str:
    return (
        f"{source.path}: {key} of {name} has shape {list(source.shape)}, for a weight {list(shape)}; they are not of one "
        "model."
    )


def bring_optimizer(updater: Updater, weights: Mapping[str, Weight], stored: OptimizerState) -> None:
    """Fill the state of every parameter that `stored` knows, as if the updater had taken its steps. Memory: a chunk.

    `stored` has passed `check_optimizer`. Raises ModelError when files are damaged."""
    for name, state in stored.parameters.items():
        for block in weights[name].blocks if name in weights else ():  # of a pipeline other workers have the rest
            for chunk in updater.chunks[block.name]:
                _fill(updater, weights[name], block, chunk, state)


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys)) or "nothing"


def _fill(updater: Updater, weight: Weight, block: RowBlock, chunk: Chunk, state: ParameterState) -> None:
    tensors = {key: _part(weight, block, chunk, key, state.tensors[key]) for key, _, _ in chunk.layout.tensors}
    if tensors:
        fresh = not updater.store.has_bytes(chunk.state)
        with updater.store.lease(chunk.state, fresh=fresh) as lease:
            lease.change()
            if fresh:
                lease.bytes.zero_()
            for key, value in tensors.items():
                lease.tensors[f"state.{key}"].copy_(value)
    if chunk.layout.scalars:
        # what the class remembers of a parameter of one element: which of it are tensors, and of what shape
        _, optimizer = take_step(chunk.kind.cls, chunk.kind.options, (1,) * len(chunk.shape), torch.float32)
        like = optimizer.state[optimizer.param_groups[0]["params"][0]]
        chunk.scalars = {key: _scalar(key, chunk, weight, block, state, like) for key in chunk.layout.scalars}
    chunk.group = {key: state.group[key] for key in chunk.kind.evolving(chunk.layout)}
    chunk.stepped = True


def _part(weight: Weight, block: RowBlock, chunk: Chunk, key: str, source: FileTensor) -> torch.Tensor:
    """What of a parameter's tensor belongs to a chunk: its elements, or all of it."""
    shape = next(shape for name, shape, _ in chunk.layout.tensors if name == key)
    if weight.whole and tuple(source.shape) == tuple(shape) and chunk.shape == weight.shape:
        return source.read()
    if tuple(source.shape) != weight.shape or prod(shape) != chunk.stop - chunk.start:
        raise ModelError(_misfit(source, key, weight.name, weight.shape))
    return _elements(source, weight, block, chunk).view(shape)


def _elements(source: FileTensor, weight: Weight, block: RowBlock, chunk: Chunk) -> torch.Tensor:
    row = max(1, weight.row_elements)
    first = block.start * row + chunk.start
    last = first + chunk.stop - chunk.start
    rows = source.read(first // row, -(-last // row)).reshape(-1)
    return rows[first - first // row * row :][: last - first]


def _scalar(
    key: str, chunk: Chunk, weight: Weight, block: RowBlock, state: ParameterState, like: Mapping[str, Any]
) -> Any:
    """A counter; or, in a chunk of one element, that element of a tensor."""
    wanted = like.get(key)
    if key in state.numbers:
        value = state.numbers[key]
        return torch.tensor(value, dtype=wanted.dtype) if torch.is_tensor(wanted) and value is not None else value
    source = state.tensors[key]
    if torch.is_tensor(wanted) and wanted.dim() and tuple(source.shape) == weight.shape:
        return _elements(source, weight, block, chunk).view(chunk.shape)
    return source.read()
