"""Writing weights as safetensors that `from_pretrained` reads, run of rows by run of rows.

Names are those of the module's parameters and persistent buffers, a tied weight under one of its names. Fused
experts are written fused; transformers loads them so (its conversions apply only to names that match them).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from outsize.errors import ModelError, StorageError
from outsize.model.new_folder import sync
from outsize.model.safetensors_file import DTYPES, index_name, whole_name
from outsize.sizes import format_size

Shape = tuple[int, ...]
Specs = Mapping[str, tuple[Shape, torch.dtype]]
Read = Callable[[str, int, int], torch.Tensor]
"""(name, start, stop) -> rows [start, stop) along the first dimension; (0, 1) asks for a scalar."""

SHARD_BYTES = 5 * 10**9
_RUN_BYTES = 16 << 20
_PARTIAL = ".partial"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass
class _Shard:
    specs: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(*spec) for spec in self.specs.values())

    def in_order(self) -> list[tuple[str, tuple[Shape, torch.dtype]]]:
        """Larger elements first keeps every tensor aligned to its element size, as the safetensors library does."""
        return sorted(self.specs.items(), key=lambda item: -item[1][1].itemsize)


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters and persistent buffers by name, tied ones once: what there is to write."""
    once: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


def write_safetensors(
    directory: str | Path, specs: Specs, read: Read, max_shard_bytes: int = SHARD_BYTES, stem: str = "model"
) -> list[Path]:
    """Write the tensors in `specs` (shape and dtype) into model.safetensors, or shards and their index. `stem` replaces
    "model" in all names.

    Memory: what one `read` returns, at most 16 MiB or one row. Everything is written and made durable under
    temporary names first; then an earlier model of the folder gives way. Interrupted at any moment, the
    folder holds a complete model or none that loads, never a mixture; temporary names that a killed process
    left behind are removed. Returns the files written.
    Raises StorageError when the disk is full, ModelError when `read` gives another shape or dtype.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove(directory.glob(f"{stem}*{_PARTIAL}"))
        _check_space(directory, specs)
        return _write(directory, stem, _split(specs, max_shard_bytes), read)
    except OSError as error:
        raise StorageError(f"{directory}: the model cannot be written: {error.strerror}") from error
    finally:
        _remove(directory.glob(f"{stem}*{_PARTIAL}"))


def read_along(specs: Specs, read: Read, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Read what `write_safetensors` reads, in its order, and write nothing."""
    for shard in _split(specs, max_shard_bytes):
        for name, (shape, dtype) in shard.in_order():
            for _ in runs(name, shape, dtype, read):
                pass


def _write(directory: Path, stem: str, shards: list[_Shard], read: Read) -> list[Path]:
    names, index = _shard_names(stem, len(shards)), index_name(stem)
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / (name + _PARTIAL), shard, read)
    if len(shards) > 1:
        _write_index(directory / (index + _PARTIAL), names, shards)
        names = [*names, index]
        _remove([directory / whole_name(stem), directory / index])  # the earlier model, before its shards are replaced
    for name in names:  # the index last, without which shards are not a model
        os.replace(directory / (name + _PARTIAL), directory / name)
    _remove(path for path in directory.glob(f"{stem}*.safetensors*") if path.name not in names)
    sync(directory)
    return [directory / name for name in names]


def _split(specs: Specs, max_shard_bytes: int) -> list[_Shard]:
    """Fill shards in the order given; a tensor larger than `max_shard_bytes` has one of its own."""
    shards = [_Shard()]
    for name, spec in specs.items():
        if shards[-1].specs and shards[-1].nbytes + _nbytes(*spec) > max_shard_bytes:
            shards.append(_Shard())
        shards[-1].specs[name] = spec
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [whole_name(stem)]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(path: Path, shard: _Shard, read: Read) -> None:
    specs = shard.in_order()
    with path.open("wb", buffering=0) as file:
        file.write(_header(dict(specs)))
        for name, (shape, dtype) in specs:
            for rows in runs(name, shape, dtype, read):
                _write_all(file.fileno(), rows.reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def runs(name: str, shape: Shape, dtype: torch.dtype, read: Read) -> Iterator[torch.Tensor]:
    """A tensor as runs of rows of at most `_RUN_BYTES`, each checked."""
    rows = shape[0] if shape else 1
    step = max(1, _RUN_BYTES // max(1, _nbytes(shape[1:], dtype)))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        run = read(name, start, stop).detach().cpu().contiguous()
        wanted = (stop - start, *shape[1:]) if shape else ()
        if tuple(run.shape) != wanted or run.dtype != dtype:
            raise ModelError(
                f"rows {start} to {stop} of {name} came as {run.dtype} {list(run.shape)} "
                f"where {dtype} {list(wanted)} was to be written"
            )
        yield run


def _header(specs: Specs) -> bytes:
    """Length and JSON of the header, padded so that the data starts at a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        if dtype not in _CODES:
            raise ModelError(f"{name} is {dtype}, which safetensors cannot hold")
        begin, end = end, end + _nbytes(shape, dtype)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(path: Path, names: list[str], shards: list[_Shard]) -> None:
    index = {
        "metadata": {
            "total_size": sum(shard.nbytes for shard in shards),
            "total_parameters": sum(prod(shape) for shard in shards for shape, _ in shard.specs.values()),
        },
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.specs},
    }
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _check_space(directory: Path, specs: Specs) -> None:
    needed = sum(_nbytes(*spec) for spec in specs.values())
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise StorageError(
            f"{directory}: the model takes {format_size(needed)} and the disk has {format_size(free)} free; "
            f"free {format_size(needed - free)} more or choose another disk"
        )


def _nbytes(shape: Shape, dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
