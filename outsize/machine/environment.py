"""What libraries look up in the environment, and glibc only when a process begins."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
BEGUN = "OUTSIZE_BEGUN"  # the process that has begun again already, whatever has become of its environment
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
    if _can_merge() and not MERGING.keys() <= tuned.keys():
        found[TUNABLES] = ":".join(f"{name}={value}" for name, value in (MERGING | tuned).items())
    return found


def begin_again() -> None:
    """Have this very process begin again with these settings, if one is missing that glibc reads but once. To be called by
    the command alone, before there is anything to lose; a process that runs the command among other things goes on."""
    missing = settings(os.environ)
    alone = sys.executable and threading.active_count() == 1
    if TUNABLES in missing and alone and os.environ.get(BEGUN) != str(os.getpid()):
        with suppress(OSError):
            begun = {**os.environ, **missing, BEGUN: str(os.getpid())}
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], begun)
    missing.pop(TUNABLES, None)
    os.environ.update(missing)


def merges() -> bool:
    """This process's C library has been told to merge what is freed."""
    return _can_merge() and MERGING.items() <= _tuned({TUNABLES: tunables()}).items()


@cache
def tunables() -> str:
    """What glibc has been told when this process began; to set the variable later tells it nothing."""
    try:
        pairs = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    told = (pair.decode(errors="replace").removeprefix(f"{TUNABLES}=") for pair in pairs)
    return ":".join(pair for pair in told if pair.startswith("glibc."))  # glibc takes them apart where they stand


def _tuned(environment: Mapping[str, str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in environment.get(TUNABLES, "").split(":") if "=" in pair)


@cache
def _can_merge() -> bool:
    """It is a glibc that knows both: from 2.31 on."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 31)
