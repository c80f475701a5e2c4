"""An optimizer's state out of files into the store: cut into the chunks that the updater steps."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from outsize.errors import ModelError, OptionError
from outsize.model.conversion import FileTensor
from outsize.model.weights import RowBlock, Weight
from outsize.train.optimizer_file import OptimizerState, ParameterState, class_path
from outsize.train.optimizers import take_step
from outsize.train.update import Chunk, Updater


def bring_optimizer(updater: Updater, weights: Mapping[str, Weight], stored: OptimizerState) -> None:
    """Fill the state of every parameter that `stored` knows, as if the updater had taken its steps. Memory: a chunk.

    Raises ModelError when it is of another model, OptionError when of another optimizer class or other options."""
    for name, state in stored.parameters.items():
        weight = weights.get(name)
        if weight is None or weight.blocks[0].name not in updater.chunks:
            raise ModelError(f"The optimizer's state is of another model: {name} is not trained here.")
        for block in weight.blocks:
            for chunk in updater.chunks[block.name]:
                _check(name, stored.class_of(name), state, chunk)
                _fill(updater, weight, block, chunk, state)


def _check(name: str, cls: str | None, state: ParameterState, chunk: Chunk) -> None:
    own = class_path(chunk.kind.cls)
    if cls not in (None, own):
        raise OptionError(f"The state of {name} was written by {cls}; this run steps it with {own}. Give --optimizer.")
    wanted = {key for key, _, _ in chunk.layout.tensors} | set(chunk.layout.scalars)
    found = set(state.tensors) | set(state.numbers)
    evolving = chunk.kind.evolving(chunk.layout)
    if wanted != found or not evolving <= set(state.group):
        raise OptionError(
            f"{own} keeps {_listed(wanted | evolving)} for {name}, and the files have "
            f"{_listed(found | set(state.group))}: they are of another optimizer, or one with other options."
        )


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
        raise ModelError(
            f"{source.path}: {key} of {weight.name} has shape {list(source.shape)}, for a weight {list(weight.shape)}."
        )
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
