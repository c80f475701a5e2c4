"""How the C library keeps memory that torch has freed. On glibc it may keep several times what is in use: aligned
allocations rarely fit the hole they left (docs/log.md has the measurements), unless what is freed is merged at once
(`outsize.machine.environment`). Elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from outsize.machine.describe import resident_bytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGEST_RECYCLED = 32 << 20  # bytes; glibc refuses a higher mmap threshold
NEVER = (1 << 31) - 1  # bytes; the largest threshold there is
HEAPS = 16  # at most; who looks for the first of them tries four times as often (`outsize.machine.threads`)
COMPILED_KERNELS = 64  # that oneDNN keeps


def limit_heaps() -> None:
    """Let threads have few heaps, but enough that those which help with a product or move bytes have one of their own: where
    all share one, attention's backward takes 1.8 times as long, waiting for its turn to allocate. An engine's thread
    has the first (`outsize.machine.threads`). To be called before there is a second thread."""
    _set(M_ARENA_MAX, HEAPS)


@contextmanager
def recycling() -> Iterator[None]:
    """Within it as much is recycled as can be; then what was set before counts again, if anything was."""
    library = _glibc()
    before = library.recycled if library is not None else None
    recycle_up_to(LARGEST_RECYCLED)
    try:
        yield
    finally:
        if before is not None:
            recycle_up_to(before)


def recycle_up_to(nbytes: int) -> None:
    """Allocations up to `nbytes` come from the heap and stay in it when freed, which is fast; larger ones go back to the
    operating system at once, which costs page faults but holds nothing. What is in the heap goes back by `give_back` only:
    a layer's tensors come again in the next."""
    _set(M_MMAP_THRESHOLD, min(max(nbytes, 1 << 20), LARGEST_RECYCLED))
    _set(M_TRIM_THRESHOLD, NEVER)
    library = _glibc()
    if library is not None:
        library.recycled = nbytes


def give_back() -> None:
    """Return what the heap holds unused. About 10 ms for 100 MiB, and as much again for the page faults when it is wanted
    back."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def compile_few_kernels() -> None:
    """Have oneDNN keep as many compiled kernels as a step uses, not a thousand: it compiles anew for every number of rows,
    and each takes some 130 KiB, or more, for as long as it is kept. To be called before the first product of the process."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_KERNELS))


class Ceiling:
    """What the process is to hold at most: above it the C library gives back what it keeps, when there has come enough
    of that since the last time."""

    WORTH = 16 << 20  # bytes; giving back takes a few ms even when there is nothing

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._left = 0

    def keep(self) -> None:
        """Call it often: it takes some 10 us where there is nothing to do."""
        if resident_bytes() > max(self.nbytes, self._left + self.WORTH):
            give_back()
            self._left = resident_bytes()


def _set(parameter: int, value: int) -> None:
    library = _glibc()
    if library is not None:
        library.mallopt(parameter, value)


class _Library(ctypes.CDLL):
    recycled: int | None = None
    """What `recycle_up_to` was told last: the C library does not say what it has been set to."""


@cache
def _glibc() -> _Library | None:
    return _Library(None) if platform.libc_ver()[0] == "glibc" else None


class Heap:
    """The C library's allocator, asked directly. `find` returns None where it is not a glibc that tells."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]

    @classmethod
    def find(cls) -> Heap | None:
        library = _glibc()
        return cls(library) if library is not None else None

    def allocate(self, nbytes: int, alignment: int) -> int:
        """Returns the address."""
        pointer = ctypes.c_void_p()
        if self._library.posix_memalign(ctypes.byref(pointer), alignment, nbytes) != 0:
            raise MemoryError(nbytes)
        return pointer.value or 0

    def is_mapped(self, address: int) -> bool:
        """The allocation has a map of its own, which goes back to the system as soon as it is freed (bit 1 of the size
        before each allocation: malloc/malloc.c of glibc)."""
        return bool(ctypes.c_size_t.from_address(address - ctypes.sizeof(ctypes.c_size_t)).value & 2)

    def is_first(self, address: int) -> bool:
        """The allocation lies in the process's first heap, not in one that was made for another thread (bit 2 there)."""
        return not ctypes.c_size_t.from_address(address - ctypes.sizeof(ctypes.c_size_t)).value & 4

    def free(self, address: int) -> None:
        self._library.free(address)
