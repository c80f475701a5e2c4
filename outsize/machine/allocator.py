"""How the C library keeps memory that torch has freed. On glibc it may keep several times what is in use: aligned
allocations rarely fit the hole they left (docs/log.md has the measurements). Elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import platform

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


def give_back(beyond: int = 0) -> None:
    """Return what the heap holds unused, if that is more than `beyond` bytes. About 10 ms for 100 MiB, and as much again
    for the page faults when it is wanted back; asking alone takes microseconds."""
    library = _glibc()
    if library is not None and (beyond == 0 or _unused(library) > beyond):
        library.malloc_trim(0)


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


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "mallinfo2"):  # since glibc 2.33
        library.mallinfo2.restype = _Usage
    return library
