"""How the C library keeps memory that torch has freed. On glibc it may keep several times what is in use: aligned
allocations rarely fit the hole they left (docs/log.md has the measurements). Elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
LARGEST_RECYCLED = 32 << 20  # bytes; glibc refuses a higher mmap threshold


def use_one_heap() -> None:
    """Let all threads allocate from one heap, so that what one frees another can use."""
    _set(M_ARENA_MAX, 1)


def recycle_up_to(nbytes: int) -> None:
    """Allocations up to `nbytes` come from the heap and stay in it when freed, which is fast; larger ones go back to the
    operating system at once, which costs page faults but holds nothing."""
    _set(M_MMAP_THRESHOLD, min(max(nbytes, 1 << 20), LARGEST_RECYCLED))
    _set(M_TRIM_THRESHOLD, 2 * LARGEST_RECYCLED)


def give_back(beyond: int = 0) -> bool:
    """Return what the heap holds unused to the system, if that is more than `beyond` bytes; True if so. About 10 ms for
    100 MiB, and as much again for the page faults when it is wanted back; asking alone takes microseconds."""
    library = _glibc()
    if library is None or (beyond and _unused(library) <= beyond):
        return False
    library.malloc_trim(0)
    return True


def _unused(library: ctypes.CDLL) -> int:
    return library.mallinfo2().fordblks if hasattr(library, "mallinfo2") else 0


class _Usage(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _set(parameter: int, value: int) -> None:
    library = _glibc()
    if library is not None:
        library.mallopt(parameter, value)


@cache
def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):  # since glibc 2.33
        library.mallinfo2.restype = _Usage
    return library


class Heap:
    """The C library's allocator, asked directly. `find` returns None where it is not a glibc that tells."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]

    @classmethod
    def find(cls) -> Heap | None:
        library = _glibc()
        return cls(library) if library is not None and hasattr(library, "mallinfo2") else None

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

    def free(self, address: int) -> None:
        self._library.free(address)
