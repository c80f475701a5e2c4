"""The tensors of a folder that Outsize writes or reads, whether as safetensors or packed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from outsize.model.conversion import FileTensor
from outsize.model.export import Read, Specs, write_safetensors
from outsize.model.packed_file import packed_name, read_packed, write_packed
from outsize.model.safetensors_file import index_name, read_folder, whole_name


def has_tensors(folder: Path, stem: str = "model") -> bool:
    return any((folder / name(stem)).is_file() for name in (packed_name, whole_name, index_name))


def read_tensors(folder: Path, stem: str = "model") -> Mapping[str, FileTensor]:
    """Every tensor by name; no data is read. `stem` is "model" or "optimizer". Raises ModelError."""
    if (folder / packed_name(stem)).is_file():
        return read_packed(folder / packed_name(stem))
    return read_folder(folder, stem)


def write_tensors(folder: Path, stem: str, specs: Specs, read: Read, compress: bool = False) -> None:
    """Write into a folder that is being made, as safetensors or packed. Raises as these do."""
    if compress:
        write_packed(folder / packed_name(stem), specs, read)
    else:
        write_safetensors(folder, specs, read, stem=stem)


def largest_share(specs: Specs) -> torch.dtype:
    """The dtype of most elements, which a configuration states."""
    counts: Counter[torch.dtype] = Counter()
    for shape, dtype in specs.values():
        counts[dtype] += prod(shape)
    return max(counts, key=lambda dtype: counts[dtype])
