"""What belongs beside weights: configuration, generation settings, tokenizer, and the module's persistent buffers.

A run keeps them in a folder of its own, so that its steps can be given out when the model it began with is gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from outsize.model.conversion import FileTensor
from outsize.model.export import write_safetensors
from outsize.model.load import ModelSource
from outsize.model.new_folder import new_folder
from outsize.model.safetensors_file import read_header, whole_name

COMPANIONS = "companions"
"""The folder's name within a run."""
_BUFFERS = "buffers"


def keep_companions(source: ModelSource, model: nn.Module, folder: Path) -> None:
    """Write them into `folder`, complete or not at all; nothing when it is there already."""
    if folder.exists():
        return
    buffers = persistent_buffers(model)
    with new_folder(folder) as partial:
        source.save_companions(partial)
        if buffers:
            specs = {name: (tuple(buffer.shape), buffer.dtype) for name, buffer in buffers.items()}
            write_safetensors(
                partial, specs, lambda name, start, stop: _rows(buffers[name], start, stop), stem=_BUFFERS
            )


def copy_companions(companions: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy all but the buffers, for weights of `dtype`."""
    for path in sorted(companions.iterdir()):
        if path.name == "config.json":
            config = _with_dtype(json.loads(path.read_text()), str(dtype).removeprefix("torch."))
            (folder / path.name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        elif path.name != whole_name(_BUFFERS):
            shutil.copyfile(path, folder / path.name)


def kept_buffers(companions: Path) -> Mapping[str, FileTensor]:
    path = companions / whole_name(_BUFFERS)
    return read_header(path) if path.exists() else {}


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop] if tensor.dim() else tensor


def _with_dtype(config: dict, dtype: str) -> dict:
    """The configuration, and those within it, saying in which dtype the weights are."""
    within = {key: _with_dtype(value, dtype) for key, value in config.items() if isinstance(value, dict)}
    return config | within | ({"dtype": dtype} if "dtype" in config else {})
