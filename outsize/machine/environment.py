"""What libraries look up in the environment, and glibc only when a process begins."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping

TUNABLES = "GLIBC_TUNABLES"
MERGING = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
"""Small pieces that are freed become one with the free memory beside them at once. Otherwise the C library keeps the ends
that aligned allocations leave over for tiny ones, each of which then stands between two holes for tensors; a heap came to
hold up to four times what was in use (docs/log.md)."""


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What is to be added to this environment. What a user has set stays."""
    found: dict[str, str] = {}
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        # Idle compute threads spin for some 20 us, then sleep: spinning on takes cores from transfers, sleeping at once
        # makes every small operation wait for a wake-up (docs/log.md).
        found["GOMP_SPINCOUNT"] = "20000"
    tuned = _tuned(environment)
    if platform.libc_ver()[0] == "glibc" and not MERGING.keys() <= tuned.keys():
        found[TUNABLES] = ":".join(f"{name}={value}" for name, value in (MERGING | tuned).items())
    return found


def begin_again() -> None:
    """Have this very process begin again with these settings, if any is missing: glibc reads its own but once. To be called
    by the command alone, before there is anything to lose."""
    if missing := settings(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | missing)


def merges() -> bool:
    """This process's C library has been told to merge what is freed."""
    return MERGING.items() <= _tuned(os.environ).items()


def _tuned(environment: Mapping[str, str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in environment.get(TUNABLES, "").split(":") if "=" in pair)
