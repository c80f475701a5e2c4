"""What tells a model and a tokenizer from others, wherever their files are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import xxhash

INCIDENTAL = ("transformers_version", "_name_or_path")  # says nothing about the numbers


def fingerprint_model(config: Any) -> str:
    """Of a transformers configuration: 16 hexadecimal digits."""
    values = {key: value for key, value in config.to_dict().items() if key not in INCIDENTAL}
    return _digest(json.dumps(values, sort_keys=True, default=str))


def fingerprint_weights(
    config: Any, names: Iterable[str], read: Callable[[str, int, int], torch.Tensor], *facts: Any
) -> str:
    """Of a configuration, the first row of each weight, and whatever else is of account: 16 hexadecimal digits."""
    summed = Summed(read)
    for name in names:
        summed.read(name, 0, 1)
    return summed.digest(fingerprint_model(config), *facts)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary and special tokens: 16 hexadecimal digits."""
    return _digest(json.dumps([sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]))


class Summed:
    """Reads weights and sums up what passes by, so that their digest tells them from all others. `read(name, start,
    stop)` gives rows of a weight, on the host."""

    def __init__(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        self._read, self._sums = read, {}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows = self._read(name, start, stop)
        flat = rows.contiguous().view(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]
        self._sums[name, start] = xxhash.xxh3_128_hexdigest(data)
        return rows

    def digest(self, *facts: Any) -> str:
        """Of everything read, and of whatever else is of account: 16 hexadecimal digits."""
        return _digest(repr((sorted(self._sums.items()), facts)))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
