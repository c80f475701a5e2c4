"""A thread that computes after another one has: it uses again what that one has freed, and the other's helpers go.

glibc gives a new thread the heap that it finds free (malloc/arena.c), and what is freed goes back to the heap it came from:
in a heap of its own an engine would hold what it takes beside what loading has left. OpenMP keeps a pool of helpers for each
thread that has computed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

from outsize.machine.allocator import Heap

SOFT = 1  # omp_pause_soft, omp.h
TRIES = 64  # threads started for one in the first heap; it takes at most two for each heap (`HEAPS`)
PROBE = 4096  # bytes: more than a thread keeps aside for itself


def start_computing(work: Callable[[], None], name: str, daemon: bool = False) -> threading.Thread:
    """Start a thread for `work` that allocates from the first heap, as the thread that loads and plans does. Which heap a
    new thread gets can only be tried: those that got another one wait until it has been found, and end."""
    found = threading.Event()
    others: list[threading.Thread] = []
    try:
        for left in reversed(range(TRIES)):
            answer: SimpleQueue[bool] = SimpleQueue()

            def begin(last: bool = not left, answer: SimpleQueue[bool] = answer) -> None:
                here = last
                try:
                    here = here or in_first_heap()
                finally:
                    answer.put(here)
                if here:
                    work()
                else:
                    found.wait()

            thread = threading.Thread(target=begin, name=name, daemon=daemon)
            thread.start()
            if answer.get():
                return thread
            others.append(thread)
    finally:
        found.set()
        for other in others:
            other.join()
    raise AssertionError("the last one works wherever it is")


def in_first_heap() -> bool:
    """The calling thread allocates from the process's first heap; so it does where the C library has no others."""
    heap = Heap.find()
    if heap is None:
        return True
    address = heap.allocate(PROBE, 64)
    try:
        return heap.is_first(address)
    finally:
        heap.free(address)


def dismiss_helpers() -> None:
    """Send away the pool of the calling thread, which is to compute no more for now; it comes back when it does.

    libgomp lets idle threads spin, as long as GOMP_SPINCOUNT says, only while there are no more of them than processors, in
    all pools together (gomp_managed_threads in its wait.h). A second pool makes every operation wait for the system to wake
    somebody, in both."""
    runtime = ctypes.CDLL(torch._C.__file__)  # a symbol is looked for in all that this library needs, too
    pause = getattr(runtime, "omp_pause_resource_all", None)
    if pause is not None:
        pause(SOFT)
