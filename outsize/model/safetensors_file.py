"""Reading safetensors files by `pread`: only the bytes asked for ever enter memory.

The library's `safe_open` maps the file, and mapped pages count as resident memory of the process, so a model
read through it costs its whole size against the budget. Here the header is parsed (8 bytes of length, then
JSON; https://github.com/huggingface/safetensors#format) and rows are read straight into the tensor that is
returned; the page cache is told to forget them.
"""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from outsize.errors import ModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_CHUNK = 64 << 20  # bytes read before the page cache is told to forget them
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library


def whole_name(stem: str) -> str:
    """The file of a model (stem "model") that is not in shards."""
    return f"{stem}.safetensors"


def index_name(stem: str) -> str:
    """The file that says which shard has which tensor."""
    return f"{stem}.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Bytes from the start of the file."""

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) along the first dimension (all of a scalar), contiguous, in the file's dtype.

        Memory: the returned tensor, nothing else. Raises ModelError when the file ends early.
        """
        if not self.shape:
            return self._read_bytes((), 0)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return self._read_bytes((max(0, stop - start), *self.shape[1:]), start * row_bytes)

    def _read_bytes(self, shape: tuple[int, ...], skip: int) -> torch.Tensor:
        rows = torch.empty(shape, dtype=self.dtype)
        try:
            read_into(self.path, self.offset + skip, rows.reshape(-1).view(torch.uint8).numpy().data)
        except EOFError as error:
            raise ModelError(f"{self.path}: the file ends inside tensor {self.name}: {error}") from None
        return rows


def read_into(path: Path, offset: int, target: memoryview) -> None:
    """Fill `target` (bytes) from `offset` of the file, leaving nothing behind in the page cache.

    Raises EOFError with the number of bytes missing, ModelError when the file cannot be opened or read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(target):
                count = os.preadv(descriptor, [target[done : done + _CHUNK]], offset + done)
                if count == 0:
                    raise EOFError(f"{len(target) - done} of {len(target)} bytes are missing")
                os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, checked against the file's length; no data is read.

    Raises ModelError when the file is missing, truncated, not safetensors, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    length, entries = _parse_header(path, size)
    data_start = 8 + length
    tensors = {name: _tensor(path, name, entry, data_start) for name, entry in entries.items()}
    _check_extents(path, list(tensors.values()), data_start, size)
    return tensors


def _parse_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """The header's length in bytes and its tensor entries."""
    hint = "not a safetensors file, or one whose download was cut short"
    if size < 8:
        raise ModelError(f"{path}: {hint}: {size} bytes, and the length of the header alone takes 8")
    head = bytearray(8)
    read_into(path, 0, memoryview(head))
    length = int.from_bytes(head, "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise ModelError(f"{path}: {hint}: it claims a header of {length} bytes and has {size} bytes in all")
    text = bytearray(length)
    read_into(path, 8, memoryview(text))
    try:
        entries = json.loads(text)
    except ValueError as error:  # also what is not UTF-8
        raise ModelError(f"{path}: {hint}: its header of {length} bytes is not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: {hint}: its header is a JSON {type(entries).__name__}, not an object")
    entries.pop("__metadata__", None)
    return length, entries


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    malformed = ModelError(f"{path}: the header's entry of tensor {name} is malformed: {entry!r:.200}")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise malformed from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise malformed
    if dtype not in DTYPES:
        raise ModelError(f"{path}: tensor {name} has dtype {dtype}, which is none of {', '.join(DTYPES)}")
    tensor = StoredTensor(path, name, shape, DTYPES[dtype], data_start + begin)
    if end - begin != _nbytes(tensor):
        raise ModelError(
            f"{path}: the header gives tensor {name} {end - begin} bytes, "
            f"but {dtype} {list(shape)} takes {_nbytes(tensor)}; the file is damaged, fetch it again"
        )
    return tensor


def _nbytes(tensor: StoredTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.itemsize


def _check_extents(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """Tensors must follow one another without gap or overlap up to the last byte, as the format demands."""
    expected = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, _nbytes(tensor))):
        if tensor.offset != expected:
            raise ModelError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.offset} where byte {expected} is next; "
                "the header is damaged, fetch the file again"
            )
        expected += _nbytes(tensor)
        if expected > size:
            raise ModelError(
                f"{path}: truncated: tensor {tensor.name} ends at byte {expected} and the file has {size}; "
                "fetch it again"
            )
    if expected != size:
        raise ModelError(f"{path}: {size - expected} bytes follow the last tensor; the file is damaged")


def read_folder(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from model.safetensors or the shards its index names; `stem` replaces
    "model".

    Raises ModelError as `read_header`, and when the folder has no safetensors or lacks a shard.
    """
    whole, index = whole_name(stem), index_name(stem)
    if (folder / whole).is_file():
        return read_header(folder / whole)
    if (folder / index).is_file():
        return _read_shards(folder, index)
    refuse_pickles(sorted(path for path in folder.iterdir() if path.suffix in PICKLES))
    raise ModelError(f"{folder}: holds neither {whole} nor {index}; give a folder as save_pretrained writes it")


def refuse_pickles(paths: list[Path]) -> None:
    """Raise ModelError when there are any."""
    if paths:
        raise ModelError(
            f"{paths[0]}: a pickle can run any code when it is read, so Outsize does not read it. Convert it "
            "once on a machine where it fits, from a source you trust: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors"
        )


def _read_shards(folder: Path, index_name: str) -> dict[str, StoredTensor]:
    index = folder / index_name
    try:
        places: dict[str, str] = dict(json.loads(index.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{index}: no readable weight_map: {error!r}") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise ModelError(f"{index}: names the shard {shard!r}, which is not a file of this folder")
        if not (folder / shard).is_file():
            count = sum(place == shard for place in places.values())
            raise ModelError(f"{folder / shard}: this shard is missing, with {count} of {len(places)} tensors")
        tensors |= read_header(folder / shard)
    for name, shard in places.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise ModelError(f"{folder / shard}: tensor {name} is missing, which {index.name} places there")
    return tensors
