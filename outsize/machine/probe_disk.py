"""How fast a directory's disk is: large aligned pieces past the page cache, by as many threads as the engine has, and
with the checksums that it takes of what it writes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

import xxhash

from outsize.errors import StorageError
from outsize.machine.machine import Spread
from outsize.sizes import format_size

PAGE = 4096
READERS, WRITERS = 2, 1  # threads, as in memory/transfer.py
SUMMED = 1 << 20  # bytes under one checksum, as in memory/checksum.py
SMALL_TRANSFERS = 200
F_NOCACHE = 48  # fcntl.h of macOS
# Buffers that are written from in turn: what a step writes no cache holds any more when its checksum is taken.
WRITTEN = 8


@dataclass(frozen=True)
class DiskEffort:
    """How much is measured: for so many `seconds` in each of so many `rounds`, on a file of `size` bytes or as much as is
    written in `fill_seconds`, in pieces of `piece` bytes."""

    seconds: float
    rounds: int
    size: int
    piece: int = 16 << 20  # as in memory/transfer.py
    fill_seconds: float = inf


FULL = DiskEffort(1.0, 8, 4 << 30)
QUICK = DiskEffort(0.05, 3, 64 << 20, 1 << 20)
ESTIMATE = DiskEffort(0.08, 3, 256 << 20, fill_seconds=1.0)


@dataclass(frozen=True)
class DiskProbe:
    """What was seen: reading alone, writing alone, both at once (`mixed` is their sum), one small transfer, and how many
    bytes a core moves in a second of its time."""

    read: Spread
    write: Spread
    mixed: Spread
    read_latency: Spread
    write_latency: Spread
    read_core: Spread
    write_core: Spread
    notes: tuple[str, ...]

    @property
    def spreads(self) -> list[Spread]:
        return [
            *(self.read, self.write, self.mixed, self.read_latency, self.write_latency),
            *(self.read_core, self.write_core),
        ]


def probe_disk(directory: Path, file_system: str, effort: DiskEffort, report: Callable[[str], None]) -> DiskProbe:
    """Measure with a file as large as `effort` says, and never more than a quarter of what is free.

    The file has no name, so nothing is left of it however the probe ends. It is written in full before anything is
    timed: space that was reserved and never written reads faster than any disk.

    Raises:
        StorageError: the directory cannot be written, or has too little space.
    """
    size = _file_size(directory, effort.size, effort.piece)
    with _scratch(directory) as (file, direct):
        disk = _Disk(file, direct, size, effort.piece)
        report(f"disk: writing {format_size(size)} to {directory}")
        disk.fill(effort.fill_seconds)
        seen: dict[tuple[str, ...], list[float]] = {("write",): [], ("read",): [], ("read", "write"): []}
        for number in range(effort.rounds):  # in turns, so that a passing disturbance is not all in one figure
            report(f"disk: round {number + 1} of {effort.rounds}")
            for directions, rates in seen.items():
                rates.append(disk.move(directions, effort.seconds))
        report("disk: small transfers")
        small_reads, small_writes = disk.small("read", SMALL_TRANSFERS), disk.small("write", SMALL_TRANSFERS)
    return DiskProbe(
        Spread.of("disk to host", "B/s", seen["read",]),
        Spread.of("host to disk", "B/s", seen["write",]),
        Spread.of("disk, both ways at once", "B/s", seen["read", "write"]),
        Spread.of("disk, a small read", "s", small_reads),
        Spread.of("disk, a small write", "s", small_writes),
        Spread.of("disk to host, in a second of a core", "B/s", disk.by_core["read"]),
        Spread.of("host to disk, in a second of a core", "B/s", disk.by_core["write"]),
        _notes(directory, file_system, direct, disk.size, seen["write",]),
    )


class _Disk:
    """A file of `size` bytes and the threads that move its pieces, round and round from its beginning."""

    def __init__(self, file: int, direct: bool, size: int, piece: int) -> None:
        self.file, self.direct, self.size, self.piece = file, direct, size, piece
        self.next = {"read": 0, "write": 0}
        self.by_core: dict[str, list[float]] = {"read": [], "write": []}
        self.lock = threading.Lock()
        self.noise = os.urandom(piece)  # a disk that compresses must find nothing to compress
        self.written = [self._buffer() for _ in range(WRITTEN)]

    def fill(self, seconds: float) -> None:
        """Write all of the file, or as much as can be in so many seconds: what was never written reads too fast."""
        started = perf_counter()
        for position in range(0, self.size, self.piece):
            self._transfer("write", self.written[0], position)
            if perf_counter() - started > seconds and position >= 3 * self.piece:
                self.size = position + self.piece
                break
        os.fsync(self.file)

    def move(self, directions: tuple[str, ...], seconds: float) -> float:
        """Return bytes a second, all `directions` at once for about `seconds`, until what was written is durable."""
        moved: list[int] = []
        errors: list[BaseException] = []
        started = perf_counter()

        def work(direction: str) -> None:
            try:
                buffers = self.written if direction == "write" else [self._buffer()]
                pieces, spent = 0, thread_time()
                while True:  # once at least, however long a busy machine took to begin
                    buffer = buffers[pieces % len(buffers)]
                    if direction == "write":
                        _sum(buffer)
                    self._transfer(direction, buffer, self._take(direction))
                    pieces += 1
                    if perf_counter() >= started + seconds:
                        break
                moved.append(pieces * self.piece)
                self.by_core[direction].append(moved[-1] / max(thread_time() - spent, 1e-9))
                if direction == "write":
                    _flush(self.file)
            except BaseException as error:
                errors.append(error)

        counts = {"read": READERS, "write": WRITERS}
        threads = [
            threading.Thread(target=work, args=(direction,), daemon=True)
            for direction in directions
            for _ in range(counts[direction])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(moved) / (perf_counter() - started)

    def small(self, direction: str, times: int) -> list[float]:
        """Return the seconds that single pages at random places took."""
        buffer = self._buffer()[:PAGE]
        places = random.Random(0)
        seconds = []
        for _ in range(times):
            position = places.randrange(self.size // PAGE) * PAGE
            started = perf_counter()
            self._transfer(direction, buffer, position)
            seconds.append(perf_counter() - started)
        return seconds

    def _take(self, direction: str) -> int:
        with self.lock:
            position = self.next[direction]
            self.next[direction] = (position + self.piece) % self.size
            return position

    def _transfer(self, direction: str, buffer: memoryview, position: int) -> None:
        call = os.preadv if direction == "read" else os.pwritev
        count = call(self.file, [buffer], position)
        if count != len(buffer):
            raise StorageError(f"the disk moved {count} of {len(buffer)} bytes; free some space and probe again.")
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, position, len(buffer), os.POSIX_FADV_DONTNEED)

    def _buffer(self) -> memoryview:
        """Memory as the store's slabs are: private, on whole pages as direct transfers need it, and huge ones where the
        kernel has them. In small pages the same disk moves a third (docs/log.md)."""
        memory = mmap.mmap(-1, self.piece, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(self.noise)
        return memoryview(memory)


@contextmanager
def _scratch(directory: Path) -> Iterator[tuple[int, bool]]:
    """Open a file without a name; yield its descriptor and whether it goes past the page cache."""
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            yield file.fileno(), _make_direct(file.fileno())
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk of {directory} became full while probing; free some space.") from problem
        raise StorageError(
            f"{directory} cannot be probed: {problem.strerror}. Choose another --directory."
        ) from problem


def _make_direct(file: int) -> bool:
    try:
        if hasattr(os, "O_DIRECT"):
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
            return True
        return sys.platform == "darwin" and fcntl.fcntl(file, F_NOCACHE, 1) == 0
    except OSError:
        return False


def _sum(buffer: memoryview) -> None:
    for start in range(0, len(buffer), SUMMED):
        xxhash.xxh3_64_intdigest(buffer[start : start + SUMMED])


def _flush(file: int) -> None:
    getattr(os, "fdatasync", os.fsync)(file)


def _file_size(directory: Path, wanted: int, piece: int) -> int:
    try:
        status = os.statvfs(directory)
    except OSError as problem:
        raise StorageError(
            f"{directory} cannot be probed: {problem.strerror}. Choose another --directory."
        ) from problem
    free = status.f_bavail * status.f_frsize
    size = min(wanted, free // 4) // piece * piece
    if size < 4 * piece:
        raise StorageError(
            f"{directory} has {format_size(free)} free; probing it needs {format_size(16 * piece)}. Free some space."
        )
    return size


def _notes(directory: Path, file_system: str, direct: bool, size: int, writes: list[float]) -> tuple[str, ...]:
    way = "past the page cache (O_DIRECT)" if direct else "through the page cache, which may flatter it"
    notes = [
        f"Disk: {directory} on {file_system}, a file of {format_size(size)} {way}.",
        "What a drive or a hypervisor caches of its own cannot be seen from here: data written a moment ago may have "
        "been read back faster than old data would be.",
    ]
    if max(writes[: len(writes) // 2]) > 1.5 * median(writes[len(writes) // 2 :]):
        notes.append("Writes became slower while they were measured: some cache was filling. A long run may be slower.")
    return tuple(notes)
