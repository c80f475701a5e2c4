"""The tensors of a folder that Outsize writes or reads, whether as safetensors or packed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from outsize.model.conversion import FileTensor
from outsize.model.packed_file import packed_name, read_packed
from outsize.model.safetensors_file import read_folder


def read_tensors(folder: Path, stem: str = "model") -> Mapping[str, FileTensor]:
    """Every tensor by name; no data is read. `stem` is "model" or "optimizer". Raises ModelError."""
    if (folder / packed_name(stem)).is_file():
        return read_packed(folder / packed_name(stem))
    return read_folder(folder, stem)
