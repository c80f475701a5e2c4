"""Files of losslessly packed tensors: written in one pass, read row by row. docs/packing.md specifies them.

A tensor is cut into chunks of a MiB, a chunk into groups of bytes (byte_groups.py); an index at the end of the file says
how long each is, with a checksum. So any rows can be read by decoding the chunks they lie in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from outsize.errors import ModelError
from outsize.model.byte_groups import pack, unpack, word_size
from outsize.model.export import Read, Specs, runs
from outsize.model.safetensors_file import DTYPES, read_into

MAGIC = b"OUTSIZEP"
VERSION = 1
CHUNK = 1 << 20  # bytes before packing
_TAIL = 24  # length of the index, its checksum, MAGIC
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def packed_name(stem: str) -> str:
    return f"{stem}.packed"


def write_packed(path: Path, specs: Specs, read: Read) -> int:
    """Write the tensors in `specs` (shape and dtype) into one packed file; returns its bytes. Memory: what one `read`
    returns, at most 16 MiB or one row, twice. Raises ModelError as `write_safetensors`, OSError as the disk does."""
    tensors: dict[str, Any] = {}
    with path.open("wb") as file:
        end = file.write(MAGIC)
        for name, (shape, dtype) in specs.items():
            if dtype not in _CODES:
                raise ModelError(f"{name} is {dtype}, which packed files cannot hold")
            tensors[name] = {"dtype": _CODES[dtype], "shape": list(shape), "offset": end, "chunks": []}
            for chunk in _chunks(name, shape, dtype, read):
                groups = pack(chunk, dtype)
                tensors[name]["chunks"].append([_checksum(b"".join(groups)), *map(len, groups)])
                end += sum(file.write(group) for group in groups)
        index = json.dumps({"version": VERSION, "chunk": CHUNK, "tensors": tensors}, separators=(",", ":")).encode()
        file.write(index + len(index).to_bytes(8, "little") + xxhash.xxh3_64_digest(index) + MAGIC)
    return path.stat().st_size


def _chunks(name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Read) -> Iterator[np.ndarray]:
    """A tensor's bytes in pieces of CHUNK, whatever runs they are read in."""
    rest = np.empty(0, np.uint8)
    for run in runs(name, shape, dtype, read):
        rest = np.concatenate([rest, run.reshape(-1).view(torch.uint8).numpy()])
        whole = len(rest) // CHUNK * CHUNK
        yield from (rest[start : start + CHUNK] for start in range(0, whole, CHUNK))
        rest = rest[whole:]
    if len(rest):
        yield rest


def _checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of a packed file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    chunk: int
    chunks: list[list[Any]]

    @cached_property
    def _offsets(self) -> list[int]:
        """Where in the file each chunk begins, and where the last ends."""
        return list(accumulate((sum(sizes) for _, *sizes in self.chunks), initial=self.offset))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self._offsets[-1]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) along the first dimension (all of a scalar). Memory: these rows, and a few chunks. Raises
        ModelError when the bytes are not those that were written."""
        if not self.shape:
            shape, first = (), 0
        else:
            start, stop, _ = slice(start, stop).indices(self.shape[0])
            shape, first = (max(0, stop - start), *self.shape[1:]), start * prod(self.shape[1:]) * self.dtype.itemsize
        rows = torch.empty(shape, dtype=self.dtype)
        out = rows.reshape(-1).view(torch.uint8).numpy()
        for number in range(first // self.chunk, -(-(first + len(out)) // self.chunk)):
            begin = number * self.chunk
            values = self._unpack(number)
            low, high = max(first, begin), min(first + len(out), begin + len(values))
            out[low - first : high - first] = values[low - begin : high - begin]
        return rows

    def _unpack(self, number: int) -> np.ndarray:
        checksum, *sizes = self.chunks[number]
        stored = memoryview(bytearray(sum(sizes)))
        try:
            read_into(self.path, self._offsets[number], stored)
        except EOFError as problem:
            raise ModelError(f"{self.path}: the file ends inside tensor {self.name}: {problem}") from None
        if _checksum(stored) != checksum:
            raise ModelError(
                f"{self.path}: tensor {self.name} is damaged in chunk {number}; restore it from another copy"
            )
        ends = list(accumulate(sizes, initial=0))
        groups = [stored[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        count = min(self.chunk, self.nbytes - number * self.chunk) // word_size(self.dtype)
        return unpack(groups, count, self.dtype)


def read_packed(path: Path) -> dict[str, PackedTensor]:
    """The tensors of a packed file by name; no data is read.

    Raises ModelError when the file is missing, cut short, of a newer version, or its index is damaged."""
    damaged = f"{path}: not a packed file, or one that was cut short"
    try:
        size = path.stat().st_size
    except OSError as problem:
        raise ModelError(f"{path}: cannot be read: {problem.strerror}") from problem
    tail = _bytes(path, max(0, size - _TAIL), min(_TAIL, size))
    if size < len(MAGIC) + _TAIL or tail[16:] != MAGIC or _bytes(path, 0, len(MAGIC)) != MAGIC:
        raise ModelError(damaged)
    length = int.from_bytes(tail[:8], "little")
    if length > size - _TAIL - len(MAGIC):
        raise ModelError(damaged)
    index = _bytes(path, size - _TAIL - length, length)
    if xxhash.xxh3_64_digest(index) != tail[8:16]:
        raise ModelError(f"{path}: its index is damaged; restore it from another copy")
    said = json.loads(index)
    if said["version"] != VERSION:
        raise ModelError(f"{path} has format version {said['version']}; this Outsize reads version {VERSION}.")
    return {
        name: _tensor(path, name, said["chunk"], entry, size - _TAIL - length)
        for name, entry in said["tensors"].items()
    }


def _tensor(path: Path, name: str, chunk: int, entry: dict[str, Any], end: int) -> PackedTensor:
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise ModelError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is none of {', '.join(DTYPES)}")
    tensor = PackedTensor(path, name, shape, dtype, entry["offset"], chunk, entry["chunks"])
    groups = {len(sizes) for _, *sizes in tensor.chunks}
    if len(tensor.chunks) != -(-tensor.nbytes // chunk) or groups - {word_size(dtype)} or tensor.end > end:
        raise ModelError(f"{path}: the index contradicts itself at tensor {name}; restore it from another copy")
    return tensor


def _bytes(path: Path, offset: int, count: int) -> bytes:
    data = bytearray(count)
    read_into(path, offset, memoryview(data))
    return bytes(data)
