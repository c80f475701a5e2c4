"""The threads that torch computes with: OpenMP keeps a pool of them for each thread of the process that has computed."""

from __future__ import annotations

import ctypes

import torch

SOFT = 1  # omp_pause_soft, omp.h


def dismiss_threads() -> None:
    """Send away the pool of the calling thread, which is to compute no more for now; it comes back when it does.

    libgomp lets idle threads spin, as long as GOMP_SPINCOUNT says, only while there are no more of them than processors, in
    all pools together (gomp_managed_threads in its wait.h). A second pool makes every operation wait for the system to wake
    somebody, in both."""
    runtime = ctypes.CDLL(torch._C.__file__)  # a symbol is looked for in all that this library needs, too
    pause = getattr(runtime, "omp_pause_resource_all", None)
    if pause is not None:
        pause(SOFT)
