"""The nouns of the store: a block is a named run of bytes that moves as a whole; its parts are tensors of one kind each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from outsize.memory.tier import PAGE, pages

KINDS = ("weight", "gradient", "master", "moment", "activation", "kv", "expert", "adapter")
ALIGNMENT = 64  # bytes; one cache line, so that no two parts share one and vector loads stay aligned


@dataclass(frozen=True)
class Part:
    """One tensor inside a block: what it is called, what it is for, and where it lies (`offset` in bytes)."""

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def view(self, storage: torch.Tensor) -> torch.Tensor:
        """This part as a tensor over `storage`, the block's bytes (1-D uint8)."""
        return storage[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Block:
    """The smallest thing that moves. `nbytes` is whole pages, at least one, so that it can be read past the page cache."""

    name: str
    parts: tuple[Part, ...]
    nbytes: int

    def views(self, storage: torch.Tensor) -> dict[str, torch.Tensor]:
        return {part.name: part.view(storage) for part in self.parts}

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    @cached_property
    def bytes_by_kind(self) -> dict[str, int]:
        """Every byte of the block under its kind; padding goes to the last part's kind."""
        found: dict[str, int] = {}
        for part, end in zip(self.parts, [*(p.offset for p in self.parts[1:]), self.nbytes], strict=True):
            found[part.kind] = found.get(part.kind, 0) + end - part.offset
        return found


def make_block(name: str, tensors: Iterable[tuple[str, str, torch.dtype, tuple[int, ...]]]) -> Block:
    """Lay (part name, kind, dtype, shape) one after the other into a block of whole pages."""
    parts: list[Part] = []
    offset = 0
    for part_name, kind, dtype, shape in tensors:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not a kind of byte; the kinds are {', '.join(KINDS)}")
        part = Part(part_name, kind, dtype, tuple(shape), offset)
        parts.append(part)
        offset = -(-(offset + part.nbytes) // ALIGNMENT) * ALIGNMENT
    return Block(name, tuple(parts), max(pages(offset), PAGE))


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Index ranges of `rows` in which each row follows the one before."""
    first = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            yield first, index
            first = index
