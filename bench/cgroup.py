"""A memory cgroup for one process: what the kernel holds it to, page cache included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from child import Skip

MEMORY = Path("/sys/fs/cgroup/memory")  # of cgroup v1, which is what the machines have that this runs on


@contextmanager
def memory_cgroup(limit: int | None) -> Iterator[None]:
    """This process within `limit` bytes of memory, for whatever it loads from here on. Raises Skip where that cannot be."""
    if limit is None:
        yield
        return
    home = MEMORY / _own().lstrip("/")
    group = home / f"outsize-bench-{os.getpid()}"
    try:
        _remove_left(home)
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as problem:
        raise Skip(f"no memory cgroup (v1) can be made here: {problem}") from problem
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def _own() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    found = next((line.split(":memory:")[1] for line in lines if ":memory:" in line), None)
    if found is None:
        raise Skip("no memory cgroup (v1) can be made here: this process is in none")
    return found


def _remove_left(home: Path) -> None:
    """What a run that was killed has left behind."""
    for group in home.glob("outsize-bench-*"):
        with suppress(OSError):  # somebody is still in it
            group.rmdir()


def make_cold(folder: Path) -> None:
    """Out of the page cache with the files of a folder: what lies there from writing them is charged to nobody."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
