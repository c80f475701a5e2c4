"""A folder that appears complete or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from outsize.errors import OptionError, StorageError

_PARTIAL = ".partial-"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields a folder beside `target` to be filled; at the end all of it is durable and takes the name `target`. When
    something fails it is removed; what a killed process left behind is removed by the next one with the same target.

    Raises OptionError when `target` exists and is not an empty folder, StorageError when the disk refuses."""
    target = target.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} exists. Choose another folder, or remove it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}", dir=target.parent))
    except OSError as problem:
        raise StorageError(f"{target} cannot be written: {problem.strerror}. Choose another folder.") from problem
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tells that somebody is still filling it
        yield partial
        partial.chmod(0o755)
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


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"):
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path)
        except BlockingIOError:
            pass  # another process is filling it
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
