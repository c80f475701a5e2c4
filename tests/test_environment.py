"""What the command adds to its environment, and a process that begins again with it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.machine.environment import TUNABLES, settings

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
WITHOUT = {name: value for name, value in os.environ.items() if name not in (TUNABLES, "GOMP_SPINCOUNT")}


def test_what_a_user_has_set_stays() -> None:
    assert "GOMP_SPINCOUNT" not in settings({"OMP_WAIT_POLICY": "ACTIVE"})
    assert "GOMP_SPINCOUNT" not in settings({"GOMP_SPINCOUNT": "7"})
    ours = settings({})
    assert not settings(ours)
    own = settings({TUNABLES: "glibc.malloc.tcache_count=3:glibc.malloc.arena_max=2"})[TUNABLES].split(":")
    assert set(own) == {"glibc.malloc.tcache_count=3", "glibc.malloc.arena_max=2", "glibc.malloc.mxfast=0"}


@on_glibc
def test_a_process_begins_again_once_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from outsize.machine.environment import begin_again, merges\n"
        "print(merges(), os.getpid(), *sys.argv[1:], flush=True)\n"
        "begin_again()\n"
        "print('ran')\n"
    )
    command = [sys.executable, "-W", "error", str(script), "one", "two words"]
    process = subprocess.Popen(command, env=WITHOUT, stdout=subprocess.PIPE, text=True)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert lines == [f"False {process.pid} one two words", f"True {process.pid} one two words", "ran"]
