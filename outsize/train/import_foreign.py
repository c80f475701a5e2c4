"""A checkpoint of others as a folder like those that are exported: what `outsize train` can begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from outsize.errors import OptionError
from outsize.model.companions import persistent_buffers
from outsize.model.files import HuggingFaceFolder, ModelFiles
from outsize.model.foreign import Foreign, ForeignFiles, read_foreign
from outsize.model.load import ModelSource, open_model
from outsize.model.new_folder import new_folder
from outsize.model.tensor_files import largest_share, write_tensors
from outsize.train.foreign_optimizer import by_name
from outsize.train.optimizer_file import FACTS, STEM, OptimizerState, read_optimizer, tensor_name, write_facts


@dataclass(frozen=True)
class Imported:
    """What was found and written: how many parameters, and of how many the optimizer's state."""

    parameters: int
    states: int


def import_foreign(
    path: Path, model: str | None, target: Path, *, weights_only: bool = False, compress: bool = False
) -> Imported:
    """Write a new folder `target` from the checkpoint at `path`, with the configuration and tokenizer of `model` (None:
    of `path` itself; weights too, when `path` has only an optimizer's state). Memory: as exporting.

    Raises ModelError for what cannot be read safely or does not fit the model, OptionError when `model` is needed."""
    foreign = read_foreign(path)
    source = _opened(foreign, path, model)
    module = source.build(torch.float32)
    state = None if weights_only else _optimizer(foreign, module)
    buffers = persistent_buffers(module)
    specs = source.shapes() | {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        if name in buffers:
            return buffers[name][start:stop] if buffers[name].dim() else buffers[name]
        return source.read(name, start, stop)

    with new_folder(target) as folder:
        source.save_companions(folder, largest_share(specs))
        write_tensors(folder, "model", specs, read, compress)
        if state is not None:
            _write_state(folder, state, compress)
    return Imported(len(source.shapes()), len(state.parameters) if state else 0)


def _opened(foreign: Foreign, path: Path, model: str | None) -> ModelSource:
    if model is None and not (path / "config.json").is_file():
        raise OptionError(f"{path} has no config.json: give the model that it is of, --model FOLDER.")
    beside: ModelFiles = HuggingFaceFolder(path) if model is None else open_model(model).files
    if foreign.weights is None:
        if model is None:
            raise OptionError(f"{path} has no weights: give the model that they are in, --model FOLDER.")
        return ModelSource(beside)
    return ModelSource(ForeignFiles(path, beside, foreign.weights))


def _optimizer(foreign: Foreign, module: torch.nn.Module) -> OptimizerState | None:
    if (foreign.path / FACTS).is_file():
        return read_optimizer(foreign.path)
    if foreign.optimizer is None:
        return None
    return by_name(foreign.path, foreign.optimizer, module, foreign.by_trainer)


def _write_state(folder: Path, state: OptimizerState, compress: bool) -> None:
    tensors = {
        tensor_name(name, key): tensor
        for name, held in state.parameters.items()
        for key, tensor in held.tensors.items()
    }
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(folder, STEM, specs, lambda name, start, stop: tensors[name].read(start, stop), compress)
    write_facts(folder, state.step, state.groups, state.parameters)
