"""Folders of torch.distributed.checkpoint, read without running anything in them and without their tensors in memory.

The folder's `.metadata` is a pickle, for which torch has no safe reader. It needs only the classes that describe shards: an
unpickler that knows these by name and no others cannot be made to call anything else."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from outsize.errors import ModelError
from outsize.model.conversion import FileTensor
from outsize.model.torch_file import read_torch_file

METADATA = ".metadata"

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "int16",
        "int32", "int64", "uint8",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
}  # fmt: skip
_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}  # names only, of any system
"""What may be named in the metadata: data classes, dtypes, and a look-up of a layout by its name."""


@dataclass(frozen=True)
class _Shard:
    """A piece of a tensor, `offsets` from its corner, in bytes [start, start + length) of a file."""

    path: Path
    start: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass
class DistributedTensor:
    """A tensor that is spread over the folder's files."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: Sequence[_Shard]
    _opened: dict[int, FileTensor] = field(default_factory=dict)

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) along the first dimension (all of a scalar). Memory: these rows, and those of one shard."""
        if not self.shape:
            return self._open(0).read()
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        out = torch.empty((max(0, stop - start), *self.shape[1:]), dtype=self.dtype)
        for number, shard in enumerate(self.shards):
            first, last = max(start, shard.offsets[0]), min(stop, shard.offsets[0] + shard.sizes[0])
            if first < last:
                inner = tuple(slice(o, o + s) for o, s in zip(shard.offsets[1:], shard.sizes[1:], strict=True))
                rows = self._open(number).read(first - shard.offsets[0], last - shard.offsets[0])
                out[(slice(first - start, last - start), *inner)] = rows
        return out

    def _open(self, number: int) -> FileTensor:
        if number not in self._opened:
            shard = self.shards[number]
            found = read_torch_file(shard.path, shard.start, shard.length)
            if tuple(getattr(found, "shape", (-1,))) != shard.sizes or found.dtype != self.dtype:
                raise ModelError(f"{shard.path}: the shard of {self.name} is not what {METADATA} says; fetch it again.")
            self._opened[number] = found
        return self._opened[number]


def read_distributed(folder: Path) -> dict[str, Any]:
    """What was saved, as nested dictionaries; tensors as DistributedTensor.

    Raises ModelError when the folder is damaged, lacks a file, or its metadata names anything that could run code."""
    metadata = _read_metadata(folder / METADATA)
    found: dict[str, Any] = {}
    try:
        for name, described in metadata.state_dict_metadata.items():
            path = (metadata.planner_data or {}).get(name, (name,))
            _put(found, tuple(path), _value(folder, name, described, metadata.storage_data))
    except (AttributeError, TypeError, KeyError, ValueError) as problem:
        raise ModelError(f"{folder / METADATA}: cannot be understood: {problem!r}") from None
    return found


def _read_metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except (
        OSError,
        EOFError,
        pickle.UnpicklingError,
        TypeError,
        AttributeError,
        ValueError,
        IndexError,
        KeyError,
    ) as problem:
        raise ModelError(f"{path}: cannot be read: {problem}") from None
    if not isinstance(metadata, Metadata):
        raise ModelError(
            f"{path}: holds a {type(metadata).__name__}, not the metadata of torch.distributed.checkpoint."
        )
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ModelError(
                f"{METADATA}: refused: it names {module}.{name}, which torch.distributed.checkpoint does not need and "
                "which could run code."
            )
        return _PATHS[name] if module == "pathlib" else super().find_class(module, name)


def _value(folder: Path, name: str, described: Any, places: dict[Any, Any]) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    if not isinstance(described, TensorStorageMetadata):
        info = _checked(folder, places[MetadataIndex(name)])
        return read_torch_file(folder / info.relative_path, info.offset, info.length)
    shards = []
    for chunk in described.chunks:
        info = _checked(folder, places[MetadataIndex(name, chunk.offsets)])
        path = folder / info.relative_path
        shards.append(_Shard(path, info.offset, info.length, tuple(chunk.offsets), tuple(chunk.sizes)))
    shape = tuple(described.size)
    if sum(torch.Size(shard.sizes).numel() for shard in shards) != torch.Size(shape).numel():
        raise ModelError(f"{folder / METADATA}: the shards of {name} do not make up its {list(shape)}; fetch it again.")
    return DistributedTensor(folder, name, shape, described.properties.dtype, shards)


def _checked(folder: Path, info: Any) -> Any:
    path = folder / info.relative_path
    if Path(info.relative_path).name != info.relative_path:
        raise ModelError(
            f"{folder / METADATA}: names the file {info.relative_path!r}, which is not one of this folder."
        )
    if getattr(info, "transform_descriptors", None):
        raise ModelError(f"{path}: was written through extensions ({info.transform_descriptors}), which are not read.")
    if not path.is_file():
        raise ModelError(f"{path}: this shard is missing; fetch it again.")
    return info


def _put(found: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        found = found.setdefault(key, {})
    found[path[-1]] = value
