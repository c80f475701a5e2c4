"""A checkpoint as a folder that others read: weights, what belongs beside them, and the optimizer's state."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from outsize.errors import StorageError
from outsize.model.companions import copy_companions, kept_buffers
from outsize.model.export import Read, Specs
from outsize.model.new_folder import new_folder
from outsize.model.tensor_files import largest_share, write_tensors
from outsize.sizes import format_size
from outsize.train.checkpoint import Checkpoint, Remembered
from outsize.train.optimizer_file import STEM, Group, tensor_name, write_facts


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the weights and of the optimizer's tensors, as they are and on disk."""

    folder: Path
    step: int
    dtype: str
    weight_bytes: int
    optimizer_bytes: int
    written_bytes: int


def export_checkpoint(
    checkpoint: Checkpoint,
    target: Path,
    companions: Path | None,
    *,
    masters: bool = False,
    groups: Iterable[Group] | None = None,
    compress: bool = False,
    notes: Path | None = None,
) -> Exported:
    """Write the step into a new folder `target`: the weights as the model computes with them or, with `masters`, in fp32
    where the run keeps that; configuration and tokenizer out of `companions`; with `groups` (which may be empty, when
    they are not known) the optimizer's state. `compress` packs tensors without loss. Memory: some 50 MiB.

    `target` appears complete or not at all; `notes` as for `new_folder`. Raises OptionError when it exists, StorageError
    when the disk is full."""
    weights = {
        name: (entry.shape, checkpoint.master_dtype(name) if masters else entry.dtype)
        for name, entry in checkpoint.weights.items()
    }
    buffers = kept_buffers(companions) if companions else {}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if name in buffers:
            return buffers[name].read(start, stop)
        return (
            checkpoint.read_master(name, start, stop)
            if masters
            else checkpoint.read(checkpoint.weights[name], start, stop)
        )

    weights |= {name: (tensor.shape, tensor.dtype) for name, tensor in buffers.items()}
    states = _state_specs(checkpoint.optimizer) if groups is not None else {}
    if not compress:
        _check_space(target, _nbytes(weights) + _nbytes(states))
    with new_folder(target, notes) as folder:
        if companions is not None:
            copy_companions(companions, folder, largest_share(weights))
        write_tensors(folder, "model", weights, read, compress)
        if groups is not None:
            write_tensors(folder, STEM, states, _state_reader(checkpoint), compress)
            write_facts(folder, checkpoint.step, groups, _facts(checkpoint.optimizer))
        written = sum(path.stat().st_size for path in folder.iterdir())
    dtype = str(largest_share(weights))[6:]
    return Exported(target, checkpoint.step, dtype, _nbytes(weights), _nbytes(states), written)


# -- the optimizer's state ------------------------------------------------------------------------------------------------


def _state_specs(optimizer: dict[str, Remembered]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    specs = {}
    for name, state in optimizer.items():
        specs |= {tensor_name(name, key): (entry.shape, entry.dtype) for key, entry in state.tensors.items()}
        specs |= {tensor_name(name, key): (tuple(value.shape), value.dtype) for key, value in state.scalars.items()}
    return specs


def _state_reader(checkpoint: Checkpoint) -> Read:
    entries = {
        tensor_name(name, key): entry
        for name, state in checkpoint.optimizer.items()
        for key, entry in {**state.tensors, **state.scalars}.items()
    }

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        entry = entries[name]
        if torch.is_tensor(entry):
            return entry[start:stop] if entry.dim() else entry
        return checkpoint.read(entry, start, stop)

    return read


@dataclass(frozen=True)
class _Facts:
    tensors: list[str]
    numbers: dict
    group: dict


def _facts(optimizer: dict[str, Remembered]) -> dict[str, _Facts]:
    return {
        name: _Facts([*state.tensors, *state.scalars], state.numbers, state.group) for name, state in optimizer.items()
    }


# -- space --------------------------------------------------------------------------------------------------------------


def _nbytes(specs: Specs) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def _check_space(target: Path, needed: int) -> None:
    existing = next(path for path in [target.absolute(), *target.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise StorageError(
            f"{target}: the export takes {format_size(needed)} and the disk has {format_size(free)} free; free "
            f"{format_size(needed - free)} more, choose another disk, or give --compress."
        )
