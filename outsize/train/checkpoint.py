"""A committed or kept step as logical entries: one for each parameter, one for each tensor that its optimizer keeps.

The store cuts parameters into blocks and chunks; here they are whole again, whatever budget or placement the run had.
Nothing but the state's own files is needed: no model, no training job."""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch

from outsize.errors import DamageError, RunError
from outsize.memory.block import Block, Part
from outsize.memory.checksum import CheckedExtents
from outsize.memory.codec import join_master
from outsize.memory.disk import DiskTier
from outsize.train.logical import Place, chunk_place, weight_place
from outsize.train.manifest import Manifest
from outsize.train.packed_step import PackedStep
from outsize.train.state import Held, StateFolder, kept_step

LOW, STATE = "low", "state."


@dataclass(frozen=True)
class Piece:
    """A part of a block that holds elements [start, stop) of a logical entry, row-major."""

    block: Block
    part: Part
    start: int

    @property
    def stop(self) -> int:
        return self.start + prod(self.part.shape)


@dataclass
class Entry:
    """A logical tensor: its pieces in the order of their elements. `numbers` are elements that the manifest holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece] = field(default_factory=list)
    numbers: dict[int, float] = field(default_factory=dict)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Elements of the rows [start, stop); a scalar is one row."""
        row = prod(self.shape[1:])
        return start * row, stop * row

    def rows_shape(self, start: int, stop: int) -> tuple[int, ...]:
        return (stop - start, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class Remembered:
    """What the optimizer of a parameter remembers: tensors, 0-d counters among them; numbers; and the entries of its
    parameter group that steps change."""

    tensors: dict[str, Entry]
    scalars: dict[str, torch.Tensor]
    numbers: dict[str, Any]
    group: dict[str, Any]


class Bytes(Protocol):
    """Where a step's blocks come from."""

    def holds(self, block: Block) -> bool:
        """Whether the block had been written at that step."""
        ...

    def read(self, block: Block, offset: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D uint8) with the block's bytes from `offset` on. Raises DamageError."""
        ...


class Extents:
    """Blocks in the extents that a manifest names, compared with its checksums."""

    def __init__(self, manifest: Manifest, disk: DiskTier) -> None:
        self._places, self._disk = manifest.places, CheckedExtents(disk)
        for block in manifest.layout.blocks:
            place = manifest.places[block.name]
            if place.extent is not None:
                disk.claim(place.extent)
                self._disk.expect(place.extent, place.sums, block)

    def holds(self, block: Block) -> bool:
        return self._places[block.name].extent is not None

    def read(self, block: Block, offset: int, out: torch.Tensor) -> None:
        extent = self._places[block.name].extent
        assert extent is not None
        self._disk.read(extent, offset, out)


class Checkpoint:
    """The logical entries of one step. Memory of a read: what it returns, and as much again for a master.

    Raises RunError when the state cannot be seen as such entries, DamageError when bytes are not those committed."""

    def __init__(self, manifest: Manifest, bytes_of: Bytes) -> None:
        self.step, self._bytes_of = manifest.step, bytes_of
        self.weights: dict[str, Entry] = {}
        self._states: dict[str, dict[str, list[tuple[Place, Block, Part]]]] = defaultdict(lambda: defaultdict(list))
        for block in manifest.layout.blocks:
            self._sort(block)
        for entry in self.weights.values():
            rows = sum(piece.part.shape[0] for piece in entry.pieces) if entry.shape else 1
            entry.shape = (rows, *entry.shape[1:]) if entry.shape else ()
        for name, shape in manifest.facts.get("shapes", {}).items():
            self.weights[name].shape = tuple(shape)
        self._low = {name: self._low_bits(name) for name in self.weights if LOW in self._states[name]}
        self.optimizer = self._optimizer(manifest.facts["optimizer"])

    # -- what there is --------------------------------------------------------------------------------------------------

    def _sort(self, block: Block) -> None:
        if (place := weight_place(block.name)) is not None:
            part = block.parts[0]
            entry = self.weights.setdefault(place.parameter, Entry(part.shape, part.dtype))
            entry.pieces.append(Piece(block, part, place.row * prod(part.shape[1:]) + (place.offset or 0)))
        elif (place := chunk_place(block.name)) is not None:
            for part in block.parts:
                self._states[place.parameter][part.name].append((place, block, part))

    def _first(self, name: str, place: Place) -> int:
        return place.row * prod(self.weights[name].shape[1:]) + (place.offset or 0)

    def _low_bits(self, name: str) -> Entry:
        pieces = [Piece(block, part, self._first(name, place)) for place, block, part in self._states[name][LOW]]
        return Entry(self.weights[name].shape, torch.int16, pieces)

    def _optimizer(self, facts: list[dict[str, Any]]) -> dict[str, Remembered]:
        found: dict[str, dict[Place, dict[str, Any]]] = defaultdict(dict)
        for fact in facts:
            for chunk in fact["chunks"]:
                place = chunk_place(chunk)
                assert place is not None
                found[place.parameter][place] = fact
        return {name: self._remembered(name, found[name]) for name in self.weights if name in found}

    def _remembered(self, name: str, facts: Mapping[Place, dict[str, Any]]) -> Remembered:
        tensors = {
            part[len(STATE) :]: self._state_entry(name, part[len(STATE) :], held)
            for part, held in self._states[name].items()
            if part.startswith(STATE)
        }
        agreed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for place, fact in facts.items():
            scalars = dict(fact["scalars"])
            if place.offset is not None:  # a chunk of one element: its tensors are too small to have a block
                self._take_elements(name, place, scalars, tensors)
            agreed.append((scalars, fact["group"]))
        if any(other != agreed[0] for other in agreed):
            raise RunError(
                f"The chunks of {name} have taken different numbers of steps; no single optimizer is like that."
            )
        scalars, group = ({key: revive(value) for key, value in values.items()} for values in agreed[0])
        counters = {key: value for key, value in scalars.items() if torch.is_tensor(value)}
        numbers = {key: value for key, value in scalars.items() if key not in counters}
        return Remembered(tensors, counters, numbers, group)

    def _state_entry(self, name: str, key: str, held: list[tuple[Place, Block, Part]]) -> Entry:
        _, block, part = held[0]
        if len(held) == 1 and held[0][0].offset is None:
            return Entry(part.shape, part.dtype, [Piece(block, part, 0)])
        weight = self.weights[name]
        pieces = [Piece(block, part, self._first(name, place)) for place, block, part in held]
        if sum(prod(piece.part.shape) for piece in pieces) < prod(weight.shape) - len(held):
            raise RunError(
                f"The optimizer keeps {key} of {name} for {len(held)} runs of its rows apart, as no ordinary optimizer "
                "does; it cannot be given out as one tensor. Export without --optimizer."
            )
        return Entry(weight.shape, part.dtype, pieces)

    def _take_elements(self, name: str, place: Place, scalars: dict[str, Any], tensors: dict[str, Entry]) -> None:
        for key, value in list(scalars.items()):
            if isinstance(value, dict) and isinstance(value["tensor"], list):
                entry = tensors.setdefault(key, Entry(self.weights[name].shape, getattr(torch, value["dtype"])))
                entry.numbers[self._first(name, place)] = scalars.pop(key)["tensor"][0]

    # -- reading ----------------------------------------------------------------------------------------------------------

    def master_dtype(self, name: str) -> torch.dtype:
        """fp32 where the run keeps a master in full; else the dtype in which the weight computes."""
        return torch.float32 if name in self._low else self.weights[name].dtype

    def read(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight as the model computes with it, or of an optimizer's tensor."""
        return self._elements(entry, *entry.span(start, stop)).view(entry.rows_shape(start, stop))

    def read_master(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight in `master_dtype`."""
        weight = self.weights[name]
        if name not in self._low:
            return self.read(weight, start, stop)
        high = self._elements(weight, *weight.span(start, stop))
        out = torch.empty(high.numel(), dtype=torch.float32)
        join_master(high, self._elements(self._low[name], *weight.span(start, stop)), out, torch.empty_like(out))
        return out.view(weight.rows_shape(start, stop))

    def _elements(self, entry: Entry, start: int, stop: int) -> torch.Tensor:
        out = torch.empty(stop - start, dtype=entry.dtype)
        for piece in entry.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                self._read_piece(piece, first - piece.start, out[first - start : last - start])
        for position, value in entry.numbers.items():
            if start <= position < stop:
                out[position - start] = value
        return out

    def _read_piece(self, piece: Piece, skip: int, out: torch.Tensor) -> None:
        if not self._bytes_of.holds(piece.block):  # low bits and state that nothing was ever written to are 0
            out.zero_()
            return
        self._bytes_of.read(piece.block, piece.part.offset + skip * out.element_size(), out.view(torch.uint8))


def revive(value: Any) -> Any:
    """A number as the manifest keeps it; tensors as tensors."""
    if isinstance(value, dict) and "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


@contextmanager
def open_checkpoint(folder: StateFolder, step: int | None = None) -> Iterator[Checkpoint]:
    """The committed step, or the kept one that is asked for. Nobody can train meanwhile on a committed step: while a run
    goes on, only its kept steps can be read.

    Raises RunError when there is no such step or it cannot be read now."""
    with nobody_writing(folder) as free:
        held = _find(folder, step, free)
        if isinstance(held, int):
            packed = PackedStep(folder, held)
            yield Checkpoint(packed.manifest, packed)
            return
        manifest = folder.read() if held is None else folder.read_kept(held)
        assert manifest is not None
        try:
            with DiskTier(folder.blocks, 1 << 62, writable=False) as disk:
                yield Checkpoint(manifest, Extents(manifest, disk))
        except DamageError as problem:
            if free or held in folder.kept_names():
                raise
            raise RunError(f"Step {manifest.step} was let go by the run that goes on. Take a newer one.") from problem


def _find(folder: StateFolder, step: int | None, free: bool) -> Held:
    """How the step can be read. `free`: nobody is writing, so that the committed step is as readable as kept ones."""
    kept = {kept_step(name): name for name in folder.kept_names()}
    packed = folder.packed_steps()
    known = ", ".join(map(str, sorted({*kept, *packed}))) or "none"
    manifest = folder.read()
    if manifest is None and step is None:
        raise RunError(f"{folder.directory} has no committed step yet.")
    wanted = manifest.step if step is None and manifest is not None else step
    committed = manifest is not None and manifest.step == wanted
    if committed and free:
        return None
    if wanted in kept:
        return kept[wanted]
    if wanted in packed:
        return wanted
    if committed:
        raise RunError(
            f"{folder.directory} is being written by another process, and its committed step changes with it. Kept "
            f"steps can be read: {known}. `outsize checkpoint keep` keeps the next one."
        )
    raise RunError(f"Step {step} is not kept in {folder.directory}. Kept steps: {known}.")


@contextmanager
def nobody_writing(folder: StateFolder) -> Iterator[bool]:
    """Hold the run's lock together with other readers. False when a process that writes has it."""
    try:
        lock = os.open(folder.directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # copied without it, or not ours to read: nobody here is writing
        yield True
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(lock)
