"""A folder that appears complete or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outsize.errors import OptionError, StorageError

PARTIAL = ".partial"


@contextmanager
def new_folder(target: Path, notes: Path | None = None) -> Iterator[Path]:
    """Yields a folder beside `target` to be filled; at the end all of it is durable and takes the name `target`. When
    something fails it is removed; what a killed process left behind is removed by the next one with the same target, or
    by `remove_noted`: in the folder `notes`, if it can be written, lies a link to what is being filled.

    Raises OptionError when `target` exists and is not an empty folder, StorageError when the disk refuses."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} exists. Choose another folder, or remove it.")
    partial = _unfinished(target)
    try:
        make_durable(target.parent)
        remove_abandoned(target.parent, target.name)
        note = _note(partial, notes)
        lock = _make_locked(partial)
    except OSError as problem:
        raise StorageError(f"{target} cannot be written: {problem.strerror}. Choose another folder.") from problem
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(target)
        sync(target.parent)
    except OSError as problem:
        raise StorageError(
            f"{target} could not be written: {problem.strerror}. Nothing was left there; free space or choose another disk."
        ) from problem
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
        if note is not None:
            note.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """All of the folder is gone, or none of it, whatever ends this process. Raises StorageError."""
    unfinished = _unfinished(folder)
    try:
        folder.rename(unfinished)
        sync(folder.parent)
    except OSError as problem:
        raise StorageError(f"{folder} could not be removed: {problem.strerror}.") from problem
    shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}{PARTIAL}-{secrets.token_hex(4)}")


def made_for(name: str) -> str:
    """The name that a file or folder was to have that a killed process left under `name`."""
    hidden, partial, _ = name.partition(f"{PARTIAL}-")
    return hidden[1:] if partial and hidden.startswith(".") else name.removesuffix(PARTIAL)


def _make_locked(partial: Path) -> int:
    """The lock tells that somebody is still filling the folder. Returns its descriptor."""
    while True:
        partial.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():  # else another process took it for abandoned before it was locked
                return lock
            os.close(lock)


def _note(partial: Path, notes: Path | None) -> Path | None:
    if notes is None:
        return None
    with suppress(OSError):  # what is exported may be ours to read only
        notes.mkdir(exist_ok=True)
        (notes / partial.name).symlink_to(partial)
        return notes / partial.name
    return None


def remove_noted(notes: Path) -> None:
    """Remove what killed processes were filling, wherever it is."""
    for note in notes.glob(f".*{PARTIAL}-*"):
        with suppress(OSError):
            partial = note.readlink()
            if partial.name == note.name:
                remove_abandoned(partial.parent, made_for(partial.name))
            if not partial.exists():
                note.unlink()


def remove_abandoned(folder: Path, target: str | None = None) -> None:
    """Remove what killed processes left in `folder` of a folder `target`, or of any."""
    name = "*" if target is None else glob.escape(target)
    for path in folder.glob(f".{name}{PARTIAL}-*"):
        with suppress(OSError):  # another process is filling it, or we may not
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def make_durable(folder: Path) -> None:
    """Make a folder and those above it; what is durable in a folder whose own name is lost would be lost too."""
    if not folder.exists():
        make_durable(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
