"""Files of `torch.save`, read without running anything in them and without holding their tensors.

torch itself unpickles them with `weights_only=True` onto the meta device, which says where in the file each tensor's bytes
are; rows are then read from there. What its safe unpickler refuses is refused here, by name."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from outsize.errors import ModelError
from outsize.model.safetensors_file import read_into

_REFUSED = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True)
class TorchTensor:
    """One tensor in a file of `torch.save`; `offset` is that of its first byte in the file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    stride: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) along the first dimension (all of a scalar). Memory: these rows; of a tensor that is saved
        transposed or as a view, all that it spans. Raises ModelError when the file ends early."""
        if not self.shape:
            return self._bytes(0, 1).view(())
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype)
        if self.stride == torch.empty(self.shape, device="meta").stride():
            return self._bytes(start * self.stride[0], prod(shape)).view(shape)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._bytes(0, span).as_strided(self.shape, self.stride)[start:stop].contiguous()

    def _bytes(self, skip: int, count: int) -> torch.Tensor:
        values = torch.empty(count, dtype=self.dtype)
        try:
            read_into(self.path, self.offset + skip * self.dtype.itemsize, values.view(torch.uint8).numpy().data)
        except EOFError as problem:
            raise ModelError(f"{self.path}: the file ends inside a tensor: {problem}") from None
        return values


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What was saved, each tensor replaced by a TorchTensor. `start` and `length` name a part of the file, in bytes.

    Raises ModelError when it is no such file or damaged, and when reading it would run code."""
    try:
        with Section(path, start, length) as file:
            places = _stored_records(path, file)
            file.seek(0)
            saved = torch.load(file, map_location="meta", weights_only=True)  # pyright: ignore[reportArgumentType]
    except pickle.UnpicklingError as problem:
        raise ModelError(_refusal(path, str(problem))) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError) as problem:
        raise ModelError(f"{path}: cannot be read as a file of torch.save: {problem}") from None
    return replace_tensors(saved, lambda tensor: _located(path, tensor, start, places))


def _refusal(path: Path, said: str) -> str:
    found = _REFUSED.search(said)
    what = f"it names {found[1]}, which could run code" if found else said.splitlines()[0]
    return (
        f"{path}: refused: {what}. Only tensors, numbers, texts, lists and dictionaries are read. Save those alone: "
        "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, PATH)."
    )


def _stored_records(path: Path, file: Section) -> dict[int, int]:
    """Where the tensors' records begin in the section, and their bytes. Raises ModelError for other kinds of file."""
    if not zipfile.is_zipfile(file):
        raise ModelError(
            f"{path}: not a file of torch.save, one that was cut short, or one of the format before PyTorch 1.6. "
            "For the last: save it again with a newer PyTorch."
        )
    with zipfile.ZipFile(file) as archive:
        records = [info for info in archive.infolist() if "/data/" in info.filename]
        order = next((archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")), b"little")
    if any(info.compress_type != zipfile.ZIP_STORED for info in records) or order != b"little":
        raise ModelError(f"{path}: its tensors are compressed or big-endian; save it again with torch.save.")
    return {_data_start(file, info.header_offset): info.file_size for info in records}


def _data_start(file: Section, header: int) -> int:
    """A record's bytes follow its local header: 30 bytes, then name and extra field of the lengths given there."""
    file.seek(header + 26)
    lengths = file.read(4)
    return header + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _located(path: Path, tensor: torch.Tensor, start: int, places: dict[int, int]) -> TorchTensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise ModelError(f"{path}: holds a sparse or quantised tensor, which is not read.")
    record: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    stride = tensor.stride()
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
    size = tensor.dtype.itemsize
    if tensor.numel() and (record not in places or (last + 1) * size > places[record]):
        raise ModelError(f"{path}: a tensor of {list(tensor.shape)} reaches outside its record; the file is damaged.")
    offset = start + record + int(tensor.storage_offset()) * size
    return TorchTensor(path, tuple(tensor.shape), tensor.dtype, offset, stride)


def replace_tensors(value: Any, place: Callable[[torch.Tensor], Any]) -> Any:
    """The same dictionaries and lists with other leaves."""
    if torch.is_tensor(value):
        return place(value)
    if isinstance(value, dict):
        return {key: replace_tensors(each, place) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [replace_tensors(each, place) for each in value]
    return value


class Section(io.RawIOBase):
    """Bytes [start, start + length) of a file, as a file."""

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._start, self._at = start, 0
        self._length = max(0, os.fstat(self._file).st_size - start) if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file, [view], self._start + self._at)
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
