"""What a disk may hold after a crash. Every call of a program that changes files is recorded where it enters the
operating system; from a prefix of the record, all that a file system may have made of it is built.

The model is that of ALICE (Pillai et al., OSDI 2014): what a file's fsync has covered is there; of all writes after it,
any may be there, any part of one too; of names made, replaced and removed in a folder since its fsync, the first few
may be there, whatever became of the files' contents."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

PAGE = 4096
CHANGES = (
    "open",
    "write",
    "pwritev",
    "ftruncate",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "replace",
    "unlink",
    "mkdir",
)


@dataclass(frozen=True)
class Op:
    """One change. `target` is the inode of a file or folder; `what` says what happens to it."""

    kind: str  # write, size, sync, create, replace, unlink, mkdir, mark
    target: int
    what: tuple[Any, ...] = ()


@dataclass
class Record:
    """The changes under `root`, in the order in which they happened; `mark` puts a note between them."""

    root: Path
    ops: list[Op] = field(default_factory=list)

    def mark(self, *note: Any) -> None:
        self.ops.append(Op("mark", 0, note))

    @contextmanager
    def recording(
        self, fault: Callable[[str, int], int | OSError | None] = lambda call, number: None
    ) -> Iterator[None]:
        """Record everything inside. `fault(call, number of the change)` may say that a call fails, or that a write takes
        only so many bytes."""
        with patch.multiple(os, **{name: self._wrapped(name, getattr(os, name), fault) for name in CHANGES}):
            yield

    def _wrapped(self, name: str, real: Callable[..., Any], fault: Callable[[str, int], Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any, **more: Any) -> Any:
            if not self._concerns(name, first, rest):
                return real(first, *rest, **more)
            injected = fault(name, len(self.ops))
            if isinstance(injected, OSError):
                raise injected
            if injected is not None and name == "pwritev":
                rest = ([rest[0][0][:injected]], *rest[1:])
            existed = name == "open" and os.path.exists(first)
            result = real(first, *rest, **more)
            self._note(name, first, rest, result, existed)
            return result

        return call

    def _concerns(self, name: str, first: Any, rest: tuple[Any, ...]) -> bool:
        path = Path(first if not isinstance(first, int) else os.readlink(f"/proc/self/fd/{first}"))
        inside = path == self.root or self.root in path.parents
        return inside and (name != "open" or bool(rest and rest[0] & (os.O_CREAT | os.O_TRUNC)))

    def _note(self, name: str, first: Any, rest: tuple[Any, ...], result: Any, existed: bool) -> None:
        if name == "open":
            if not existed:
                self.ops.append(Op("create", _inode(Path(first).parent), (Path(first).name, os.fstat(result).st_ino)))
            elif rest[0] & os.O_TRUNC:
                self.ops.append(Op("size", os.fstat(result).st_ino, (0, True)))
        elif name in ("write", "pwritev"):
            self._note_write(name, first, rest, result)
        elif name in ("ftruncate", "posix_fallocate"):
            self.ops.append(Op("size", os.fstat(first).st_ino, (sum(rest), name == "ftruncate")))
        elif name in ("fsync", "fdatasync"):
            self.ops.append(Op("sync", os.fstat(first).st_ino))
        elif name == "replace":
            self.ops.append(Op("replace", _inode(Path(first).parent), (Path(first).name, Path(rest[0]).name)))
        elif name == "unlink":
            self.ops.append(Op("unlink", _inode(Path(first).parent), (Path(first).name,)))
        else:
            self.ops.append(Op("mkdir", _inode(Path(first).parent), (Path(first).name, _inode(Path(first)))))

    def _note_write(self, name: str, file: int, rest: tuple[Any, ...], count: int) -> None:
        data = bytes(rest[0] if name == "write" else rest[0][0])[:count]
        start = rest[1] if name == "pwritev" else os.lseek(file, 0, os.SEEK_CUR) - count
        self.ops.append(Op("write", os.fstat(file).st_ino, (start, data)))


def _inode(path: Path) -> int:
    return path.stat().st_ino


NAMES = ("create", "replace", "unlink", "mkdir")  # changes of a folder


class Disk:
    """Files and folders by inode, as a list of changes leaves them."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.files: dict[int, bytearray] = {}
        self.folders: dict[int, dict[str, int]] = {root: {}}

    def apply(self, op: Op, torn: slice = slice(None)) -> None:
        """`torn`: the pages of a write that arrived."""
        if op.kind == "write":
            self._write(op.target, *op.what, torn)
        elif op.kind == "size":
            content = self.files.setdefault(op.target, bytearray())
            size, shrinks = op.what
            if shrinks:
                del content[size:]
            content.extend(bytes(max(size - len(content), 0)))
        elif op.kind in NAMES:
            self._rename(op)

    def _write(self, file: int, start: int, data: bytes, torn: slice) -> None:
        content = self.files.setdefault(file, bytearray())
        for page in range(0, max(len(data), 1), PAGE)[torn]:
            piece = data[page : page + PAGE]
            content.extend(bytes(max(start + page + len(piece) - len(content), 0)))
            content[start + page : start + page + len(piece)] = piece

    def _rename(self, op: Op) -> None:
        folder = self.folders.setdefault(op.target, {})
        if op.kind in ("create", "mkdir"):
            folder[op.what[0]] = op.what[1]
            if op.kind == "mkdir":
                self.folders.setdefault(op.what[1], {})
        elif op.kind == "replace":
            folder[op.what[1]] = folder.pop(op.what[0])
        else:
            folder.pop(op.what[0])

    def write_to(self, path: Path, folder: int | None = None) -> None:
        path.mkdir()
        for name, inode in self.folders[self.root if folder is None else folder].items():
            if inode in self.folders:
                self.write_to(path / name, inode)
            else:
                (path / name).write_bytes(self.files.get(inode, b""))


def crash_states(ops: list[Op], root: int, choice: random.Random, lost_syncs: bool = False) -> Iterator[Disk]:
    """Disks that a crash after `ops` may leave. `lost_syncs`: a disk that says "synced" of data and forgets it."""
    safe = _durable(ops, lost_syncs)
    data = [n for n, op in enumerate(ops) if n not in safe and op.kind in ("write", "size")]
    for names in _name_choices(ops, safe):
        for arrived in _data_choices(ops, data, choice):
            disk = Disk(root)
            for number, op in enumerate(ops):
                if number in arrived:
                    disk.apply(op, arrived[number])
                elif number in safe or number in names:
                    disk.apply(op)
            yield disk


def _durable(ops: list[Op], lost_syncs: bool) -> set[int]:
    """Numbers of the changes that a later sync of their file or folder has covered."""
    safe: set[int] = set()
    waiting: dict[int, list[int]] = {}
    for number, op in enumerate(ops):
        if op.kind == "sync":
            done = waiting.pop(op.target, [])
            safe.update(n for n in done if not lost_syncs or ops[n].kind in NAMES)
        elif op.kind != "mark":
            waiting.setdefault(op.target, []).append(number)
    return safe


def _name_choices(ops: list[Op], safe: set[int]) -> list[set[int]]:
    """The first few of the changes of names that no sync has covered, none and all of them included."""
    waiting = [n for n, op in enumerate(ops) if op.kind in NAMES and n not in safe]
    return [set(waiting[:count]) for count in range(len(waiting) + 1)]


def _data_choices(ops: list[Op], waiting: list[int], choice: random.Random) -> Iterator[dict[int, slice]]:
    """Which of the uncovered writes arrived: none, all, all but one, one alone, half of one, and some at random."""
    whole = slice(None)
    everything = dict.fromkeys(waiting, whole)
    yield {}
    if waiting:
        yield everything
    few = waiting if len(waiting) <= 3 else choice.sample(waiting, 3)
    for number in few:
        if len(waiting) > 1:
            yield {number: whole}
            yield {n: whole for n in waiting if n != number}
        yield everything | {number: slice(None, None, 2)}
        yield everything | {number: slice(1, None, 2)}
    if len(waiting) > 3:
        yield {number: whole for number in waiting if choice.random() < 0.5}


HARMLESS = ("unlink", "mkdir")
"""Calls whose failure need not be an error: a folder may be there, a file that is let go may be gone."""


def failing_at(number: int, code: int, lasts: bool) -> Callable[[str, int], OSError | None]:
    """A disk of which one call fails, with EIO, say, or ENOSPC; and, if it `lasts`, every later one."""
    failed = False

    def fault(call: str, now: int) -> OSError | None:
        nonlocal failed
        if now < number or (failed and not lasts) or call in HARMLESS:
            return None
        failed = True
        return OSError(code, os.strerror(code))

    return fault
