"""A file as a tier, read and written past the page cache: no hidden second copy of the model in RAM."""

from __future__ import annotations

import errno
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch

from outsize.errors import StorageError
from outsize.memory.host import allocate_slab
from outsize.memory.tier import PAGE, Extent, Tier, copy_now, pages
from outsize.sizes import format_size

BOUNCE = 4 << 20  # bytes of aligned buffer per thread, for spans that are not whole aligned pages
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)  # what file systems say of O_DIRECT and fallocate


class DiskTier(Tier):
    """One file at `path`, made if missing, kept on close. `capacity` None means what the disk has free. Without
    `writable` the file must be there, and is only read.

    `direct` tells whether O_DIRECT is in use. Where the file system refuses it the page cache is used, and
    dropped again behind each read and each flush; a warning says so once.

    Raises StorageError when the file cannot be made, is too short, or the disk is full; each with path and
    numbers. Spans that do not begin and end on a page share it with their neighbours: only one thread may
    write such spans of one extent at a time."""

    def __init__(self, path: Path, capacity: int | None = None, writable: bool = True) -> None:
        self.path, self._writable = path, writable
        self._local = threading.local()
        try:
            if writable:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self.direct = _open(path, os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY)
        except OSError as problem:
            raise StorageError(
                f"{path} cannot be {'written' if writable else 'read'}: {problem.strerror}. Choose a directory you may "
                "use."
            ) from problem
        super().__init__("disk", self._size() + _free_bytes(self._file) if capacity is None else capacity)

    def claim(self, extent: Extent) -> None:
        if self._size() < extent.end:
            raise self._truncated(self._size(), extent.end)
        super().claim(extent)

    def flush(self) -> None:
        try:
            getattr(os, "fdatasync", os.fsync)(self._file)
        except OSError as problem:
            raise self._failed("flush", self.used, problem) from problem
        self._drop_cache(0, 0)  # written pages could not go before

    def __enter__(self) -> DiskTier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _provide(self, extent: Extent) -> None:
        """Take the space from the file system at once, so that a full disk shows before the work begins."""
        if not self._writable:
            return
        size = self._size()
        growth = extent.end - size
        try:
            if growth > _free_bytes(self._file):  # asking would fill the disk to the brim before it failed
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _reserve(self._file, extent)
        except OSError as problem:
            if growth > 0:
                with suppress(OSError):
                    os.ftruncate(self._file, size)
            raise self._failed("reserve", extent.nbytes, problem) from problem

    def _withdraw(self, extent: Extent) -> None:
        pass  # the file keeps the space for the next extent

    def _fill(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        position = extent.start + offset
        if _whole_pages(position, target):
            self._read_pages(position, target)
            return
        for here, window, span, piece in self._pieces(position, target):
            self._read_pages(here, window)
            copy_now(piece, window[span])

    def _store(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        position = extent.start + offset
        if _whole_pages(position, source):
            self._write_pages(position, source)
            return
        for here, window, span, piece in self._pieces(position, source):
            if piece.numel() < window.numel():
                self._read_pages(here, window)  # the rest of these pages stays as it is
            copy_now(window[span], piece)
            self._write_pages(here, window)

    def _pieces(self, position: int, data: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, slice, torch.Tensor]]:
        """Cut `data`, which belongs at `position` of the file, to the size of this thread's aligned buffer.

        Yields (position of whole pages, the buffer for them, the piece's span in it, the piece)."""
        bounce = self._bounce(pinned=data.is_cuda)
        done = 0
        while done < data.numel():
            lead = (position + done) % PAGE
            count = min(data.numel() - done, BOUNCE - lead)
            yield (
                position + done - lead,
                bounce[: pages(lead + count)],
                slice(lead, lead + count),
                data[done : done + count],
            )
            done += count

    def _bounce(self, pinned: bool) -> torch.Tensor:
        name = "pinned" if pinned else "plain"
        if not hasattr(self._local, name):
            setattr(self._local, name, allocate_slab(BOUNCE, pinned))
        return getattr(self._local, name)

    def _read_pages(self, position: int, target: torch.Tensor) -> None:
        done = self._repeat("read", os.preadv, position, target)
        if done < target.numel():
            raise self._truncated(position + done, position + target.numel())
        self._drop_cache(position, target.numel())

    def _write_pages(self, position: int, source: torch.Tensor) -> None:
        done = self._repeat("write", os.pwritev, position, source)
        if done < source.numel():
            raise self._failed("write", source.numel() - done, OSError(errno.EIO, "the disk took no more"))

    def _repeat(self, verb: str, call: Callable, position: int, data: torch.Tensor) -> int:
        """Call until all of `data` is through or nothing moves; return how many bytes were.

        A direct transfer that stopped inside a page is taken up again at that page: the next must be
        aligned too."""
        view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType]
        done = 0
        while done < len(view):
            try:
                count = call(self._file, [view[done:]], position + done)
            except OSError as problem:
                raise self._failed(verb, len(view), problem) from problem
            whole = count // PAGE * PAGE if self.direct else count
            if whole == 0:
                break
            done += whole
        return done

    def _drop_cache(self, position: int, nbytes: int) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, position, nbytes, os.POSIX_FADV_DONTNEED)

    def _size(self) -> int:
        return os.fstat(self._file).st_size

    def _truncated(self, end: int, wanted: int) -> StorageError:
        return StorageError(
            f"{self.path} ends at byte {end}, before byte {wanted} that it should hold: it was cut short. "
            "Restore the file, or start anew in an empty directory."
        )

    def _failed(self, verb: str, nbytes: int, problem: OSError) -> StorageError:
        free = format_size(_free_bytes(self._file))
        if problem.errno in NO_SPACE:
            return StorageError(
                f"The disk of {self.path} is full: {format_size(nbytes)} wanted, {free} free. "
                "Free space and start again: a run continues at its last committed step."
            )
        return StorageError(
            f"Could not {verb} {format_size(nbytes)} of {self.path} ({free} free on its disk): "
            f"{problem.strerror}. Check the disk, or choose another directory."
        )


def _open(path: Path, flags: int) -> tuple[int, bool]:
    """Open; return the descriptor and whether it goes past the page cache."""
    flags |= os.O_CLOEXEC
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as problem:
            if problem.errno not in UNSUPPORTED:
                raise
    warnings.warn(
        f"The file system of {path} has no O_DIRECT: the page cache is used and dropped behind transfers.",
        stacklevel=3,
    )
    return os.open(path, flags, 0o600), False


def _reserve(file: int, extent: Extent) -> None:
    """Make the file hold the extent, with disk space behind it where the file system can promise that."""
    try:
        os.posix_fallocate(file, extent.start, extent.nbytes)
    except (OSError, AttributeError) as problem:  # macOS has no such function
        if isinstance(problem, OSError) and problem.errno not in UNSUPPORTED:
            raise
        os.ftruncate(file, max(os.fstat(file).st_size, extent.end))


def _whole_pages(position: int, data: torch.Tensor) -> bool:
    aligned = position % PAGE == 0 and data.numel() % PAGE == 0
    return aligned and not data.is_cuda and data.data_ptr() % PAGE == 0


def _free_bytes(file: int) -> int:
    """Free space for this user on the disk of an open file; a file system that does not say how large it is counts as
    endless."""
    status = os.fstatvfs(file)
    return status.f_bavail * status.f_frsize if status.f_blocks else sys.maxsize // 2
