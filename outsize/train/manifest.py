"""The two small files that give a run's blocks a meaning, as bytes; docs/commit.md describes them.

The *layout* names every durable block and the tensors in it, and never changes. The *manifest* of a step says where each
block is, with checksums. Each is one line of JSON and, on a second line, the digest of the first: a file that was
damaged in any bit is known as such."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from outsize.errors import RunError
from outsize.memory.block import Block, Part
from outsize.memory.checksum import PIECE, Sums, count_pieces
from outsize.memory.homes import Committed
from outsize.memory.tier import PAGE, Extent

VERSION = 2  # of both files


def seal(value: dict[str, Any]) -> bytes:
    """One line of JSON and its digest."""
    line = json.dumps({"version": VERSION, **value}, separators=(",", ":")).encode()
    return line + b"\n" + _digest(line) + b"\n"


def unseal(path: Path) -> dict[str, Any]:
    """The value that was sealed. Raises RunError, naming the file, when it is missing, damaged or of another version."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise RunError(
            f"{path} cannot be read: {problem.strerror}. Restore it, or start in another folder."
        ) from problem
    line, _, digest = content.partition(b"\n")
    if digest != _digest(line) + b"\n":
        raise RunError(f"{path} is damaged: its digest is not that of its content.")
    value = json.loads(line)
    if value["version"] != VERSION:
        raise RunError(
            f"{path} has format version {value['version']}; this Outsize reads version {VERSION}. "
            "Use the Outsize that wrote it."
        )
    return value


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).hexdigest().encode()


@dataclass(frozen=True)
class Layout:
    """Every durable block, in the order of creation: one logical entry for each tensor, whatever the plan was."""

    blocks: tuple[Block, ...]

    def encode(self) -> bytes:
        blocks = [
            [b.name, b.nbytes, [[p.name, p.kind, str(p.dtype)[6:], p.shape, p.offset] for p in b.parts]]
            for b in self.blocks
        ]
        return seal({"page": PAGE, "piece": PIECE, "blocks": blocks})

    @cached_property
    def digest(self) -> str:
        """What manifests call this layout."""
        return hashlib.blake2b(self.encode(), digest_size=16).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Layout:
        """Raises RunError as `unseal` does."""
        return cls(
            tuple(
                Block(name, tuple(Part(n, k, getattr(torch, d), tuple(s), o) for n, k, d, s, o in parts), nbytes)
                for name, nbytes, parts in unseal(path)["blocks"]
            )
        )


@dataclass(frozen=True)
class Manifest:
    """What a commit made durable: the step, where each durable block of the layout is, and facts: the optimizers'
    counters, the random state, and what the run is."""

    step: int
    layout: Layout
    places: dict[str, Committed]
    facts: dict[str, Any]

    def encode(self) -> bytes:
        ordered = [self.places[block.name] for block in self.layout.blocks]
        return seal(
            {
                "step": self.step,
                "layout": self.layout.digest,
                "extents": _pages(place.extent for place in ordered),
                "spares": _pages(place.spare for place in ordered),
                "sums": _text(np.concatenate([place.sums for place in ordered] or [np.empty(0, np.uint64)]), "<u8"),
                "facts": self.facts,
            }
        )

    @classmethod
    def read(cls, path: Path, layout: Layout) -> Manifest:
        """Raises RunError as `unseal` does, and when the manifest is of another layout."""
        said = unseal(path)
        if said["layout"] != layout.digest:
            raise RunError(f"{path} is not of the layout beside it: files of two runs were mixed. Restore its own.")
        starts, spares = (_numbers(said[name], "<i8") for name in ("extents", "spares"))
        sums, taken = _numbers(said["sums"], "<u8"), 0
        places = {}
        for block, start, spare in zip(layout.blocks, starts, spares, strict=True):
            count = count_pieces(block.nbytes) if start >= 0 else 0
            places[block.name] = Committed(
                _extent(int(start), block), _extent(int(spare), block), sums[taken : taken + count]
            )
            taken += count
        return cls(said["step"], layout, places, said["facts"])


def _pages(extents: Iterable[Extent | None]) -> str:
    return _text(np.array([-1 if extent is None else extent.start // PAGE for extent in extents]), "<i8")


def _extent(page: int, block: Block) -> Extent | None:
    return None if page < 0 else Extent(page * PAGE, block.nbytes)


def _text(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _numbers(text: str, kind: str) -> Sums:
    return np.frombuffer(base64.b64decode(text), kind)
