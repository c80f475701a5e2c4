"""Lossless packing of numbers: their bytes by significance, each group by itself through a Huffman coder.

Of trained floating-point numbers the exponents take few values and the mantissas are noise. So a float is rotated by one
bit, which brings its whole exponent into the highest byte and its sign into the lowest; bytes of equal significance are
put together; and each group is coded or, where that does not pay, kept. After Hershcovitch et al., ZipNN,
arXiv 2411.05239. The coder is zstandard with its search for repetitions all but switched off: on exponents that is
smaller and twice as fast than its own levels (docs/packing.md)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from outsize.errors import ModelError

if TYPE_CHECKING:
    import zstandard

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def word_size(dtype: torch.dtype) -> int:
    """Bytes of what is grouped: a number, or a half of a complex one."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize


def pack(data: np.ndarray, dtype: torch.dtype) -> list[bytes]:
    """The groups of `data` (1-D uint8, whole numbers of `dtype`), the lowest bytes first. One that is as long as the
    count of numbers is kept as it is, a shorter one is coded. Memory: twice `data`."""
    size = word_size(dtype)
    words = data.view(_WORDS[size])
    if _rotated(dtype):
        words = (words << 1) | (words >> (8 * size - 1))
    groups = words.view(np.uint8).reshape(-1, size)
    return [_shorter(np.ascontiguousarray(groups[:, number])) for number in range(size)]


def unpack(groups: list[memoryview], count: int, dtype: torch.dtype) -> np.ndarray:
    """The inverse of `pack` for `count` numbers, as 1-D uint8. Raises ModelError when a group is not of that length."""
    size = word_size(dtype)
    bytes_of = np.empty((count, size), np.uint8)
    for number, group in enumerate(groups):
        bytes_of[:, number] = _decoded(group, count)
    words = bytes_of.reshape(-1).view(_WORDS[size])
    if _rotated(dtype):
        words = (words >> 1) | (words << (8 * size - 1))
    return words.view(np.uint8)


def _rotated(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and word_size(dtype) > 1


def _shorter(group: np.ndarray) -> bytes:
    coded = _coder().compress(group.data)
    return coded if len(coded) < len(group) else group.tobytes()


def _decoded(group: memoryview, count: int) -> np.ndarray:
    if len(group) == count:
        return np.frombuffer(group, np.uint8)
    import zstandard

    try:
        values = _decoder().decompress(group, max_output_size=count)
    except zstandard.ZstdError as problem:
        raise ModelError(f"packed bytes cannot be decoded: {problem}") from None
    if len(values) != count:
        raise ModelError(f"packed bytes give {len(values)} numbers where {count} belong")
    return np.frombuffer(values, np.uint8)


@cache
def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError as problem:
        raise ModelError("Packed files need the package zstandard: pip install 'outsize[pack]'") from problem
    return zstandard


@cache
def _coder() -> zstandard.ZstdCompressor:
    library = _zstandard()
    parameters = library.ZstdCompressionParameters(
        strategy=library.STRATEGY_FAST,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
        min_match=7,
        target_length=0,
        write_checksum=False,
    )
    return library.ZstdCompressor(compression_params=parameters)


@cache
def _decoder() -> zstandard.ZstdDecompressor:
    return _zstandard().ZstdDecompressor()
