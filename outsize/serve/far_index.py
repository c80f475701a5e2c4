"""What lies in a directory of keys and values that outlives the process: records, appended as pages are written.

A record is believed when its own checksum is right, a page when it has the checksum that its record says. So a process
may be killed at any time: a torn record ends the file, and a place that was being written again does not match its old
record any more. Nothing is synced: this is a cache, which a power failure may shorten."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

import xxhash

from outsize.errors import StorageError

RECORD = struct.Struct("<32sQQ")  # digest of the page, its place, checksum of its bytes
CHECK = struct.Struct("<Q")
SIZE = RECORD.size + CHECK.size


class FarIndex:
    """`index` beside `pages` in `directory`, for `count` places. `found` (place -> digest, checksum) is what was there.

    Raises StorageError when the directory cannot be used, or another process uses it."""

    def __init__(self, directory: Path, count: int) -> None:
        self.path, self.pages = directory / "index", directory / "pages"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._take_lock(directory)
            self.found = self._read(count)
            self._file = self._shortened()
        except OSError as problem:
            raise StorageError(
                f"{directory} cannot be used: {problem.strerror}. Choose another directory."
            ) from problem

    def _take_lock(self, directory: Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            os.close(self._lock)
            raise StorageError(f"{directory} is in use by another process. Choose another --kv-directory.") from problem

    @property
    def keys(self) -> dict[int, bytes]:
        """What was there, by place."""
        return {place: key for place, (key, _) in self.found.items()}

    def keep_common(self, others: list[dict[int, bytes]]) -> None:
        """Believe only what all workers have at the same place, each its part of the page."""
        same = {place for place, key in self.keys.items() if all(other.get(place) == key for other in others)}
        self.found = {place: found for place, found in self.found.items() if place in same}

    def add(self, place: int, key: bytes, checksum: int) -> None:
        """The page is written. Errors are not told: what is not in the index is computed again."""
        with suppress(OSError):
            os.write(self._file, _record(place, key, checksum))

    def close(self) -> None:
        os.close(self._file)
        os.close(self._lock)

    def _read(self, count: int) -> dict[int, tuple[bytes, int]]:
        """The last record of each place; of two places with one digest the later."""
        held = self.path.read_bytes() if self.path.exists() else b""
        places: dict[bytes, tuple[int, int]] = {}
        owners: dict[int, bytes] = {}
        for start in range(0, len(held) - SIZE + 1, SIZE):
            body = held[start : start + RECORD.size]
            if CHECK.unpack_from(held, start + RECORD.size)[0] != xxhash.xxh3_64_intdigest(body):
                break
            key, place, checksum = RECORD.unpack(body)
            if places.get(owners.get(place, b""), (None,))[0] == place:
                del places[owners[place]]
            owners[place] = key
            places[key] = (place, checksum)
        return {place: (key, checksum) for key, (place, checksum) in places.items() if place < count}

    def _shortened(self) -> int:
        """Write anew what counts, and go on there."""
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(b"".join(_record(place, *found) for place, found in self.found.items()))
        fresh.replace(self.path)
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)


def _record(place: int, key: bytes, checksum: int) -> bytes:
    body = RECORD.pack(key, place, checksum)
    return body + CHECK.pack(xxhash.xxh3_64_intdigest(body))
