"""Packed numbers come back to the bit, any rows of them, and take no more room than they had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.errors import ModelError
from outsize.model.byte_groups import pack, unpack
from outsize.model.packed_file import CHUNK, read_packed, write_packed
from outsize.model.safetensors_file import DTYPES

KINDS = tuple(DTYPES.values())


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.binary(min_size=0, max_size=4096))
def test_any_bits_of_any_dtype_come_back(dtype: torch.dtype, data: bytes) -> None:
    """NaN patterns, negative zeros and denormals among them: bytes are compared, not numbers."""
    count = len(data) // dtype.itemsize
    given_bytes = np.frombuffer(data[: count * dtype.itemsize], np.uint8)
    groups = pack(given_bytes, dtype)
    numbers = count * (2 if dtype.is_complex else 1)
    assert all(len(group) <= numbers for group in groups)
    assert np.array_equal(unpack([memoryview(group) for group in groups], numbers, dtype), given_bytes)


def weights(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(shape, generator=generator)).to(dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.70), (torch.float32, 0.86), (torch.float16, 0.95)])
def test_what_is_like_weights_becomes_smaller(dtype: torch.dtype, most: float) -> None:
    """The exponent of normally distributed numbers has some 2.6 bits of information in its 8 (fp16: 5)."""
    values = weights(dtype, 1 << 19).view(torch.uint8).numpy()
    assert sum(map(len, pack(values, dtype))) < most * len(values)


def test_noise_is_kept_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)
    assert sum(map(len, pack(noise, torch.int16))) == len(noise)


TENSORS = {
    "table": weights(torch.bfloat16, 700, 1000),  # of more than one chunk
    "moments": weights(torch.float32, 3, 5, 7),
    "scalar": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "zeros": torch.zeros(CHUNK // 4 + 1),
}


def write(path: Path) -> int:
    specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        return TENSORS[name][start:stop] if TENSORS[name].dim() else TENSORS[name]

    return write_packed(path, specs, read)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))


def test_any_rows_of_a_packed_file_can_be_read(tmp_path: Path) -> None:
    size = write(tmp_path / "packed")
    assert size < 0.75 * sum(tensor.nbytes for tensor in TENSORS.values())
    found = read_packed(tmp_path / "packed")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert same(found[name].read(), tensor), name
    for start, stop in [(0, 1), (699, 700), (500, 640), (37, 37), (-2, None), (600, 9000)]:
        assert same(found["table"].read(start, stop), TENSORS["table"][start:stop])
    assert same(found["moments"].read(1, 2), TENSORS["moments"][1:2])


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    write(path)
    content = path.read_bytes()
    choice = np.random.default_rng(0)
    places = [*choice.integers(0, len(content), 60), *range(8), *range(len(content) - 40, len(content))]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(choice.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ModelError, match="packed"):
            for tensor in read_packed(path).values():
                tensor.read()
    for length in [0, 7, 31, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match="not a packed file, or one that was cut short"):
            read_packed(path)


def test_a_newer_version_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outsize.model.packed_file.VERSION", 2)
    write(tmp_path / "packed")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="has format version 2; this Outsize reads version 1"):
        read_packed(tmp_path / "packed")
