"""What the command adds to its environment, and a process that begins again with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outsize.machine.environment import TUNABLES, settings

on_glibc = pytest.mark.skipif(TUNABLES not in settings({}), reason="only glibc has these settings, from 2.31 on")
WITHOUT = {name: value for name, value in os.environ.items() if name not in (TUNABLES, "GOMP_SPINCOUNT")}


def test_what_a_user_has_set_stays() -> None:
    assert "GOMP_SPINCOUNT" not in settings({"OMP_WAIT_POLICY": "ACTIVE"})
    assert "GOMP_SPINCOUNT" not in settings({"GOMP_SPINCOUNT": "7"})
    assert not settings(settings({}))


@on_glibc
def test_what_a_user_tells_glibc_stays() -> None:
    own = settings({TUNABLES: "glibc.malloc.tcache_count=3:glibc.malloc.arena_max=2"})[TUNABLES].split(":")
    assert set(own) == {"glibc.malloc.tcache_count=3", "glibc.malloc.arena_max=2", "glibc.malloc.mxfast=0"}


def ran(folder: Path, lines: str, *arguments: str) -> tuple[int, list[str]]:
    """The process that a script of these lines was, and what it printed."""
    script = folder / "script.py"
    script.write_text("import os, sys\nfrom outsize.machine.environment import begin_again, merges\n" + lines)
    command = [sys.executable, "-W", "error", str(script), *arguments]
    process = subprocess.Popen(command, env=WITHOUT, stdout=subprocess.PIPE, text=True)
    return process.pid, process.communicate(timeout=60)[0].splitlines()


@on_glibc
def test_a_process_begins_again_once_with_its_arguments(tmp_path: Path) -> None:
    script = "print(merges(), os.getpid(), *sys.argv[1:], flush=True)\nbegin_again()\nprint('ran')\n"
    process, said = ran(tmp_path, script, "one", "two words")
    assert said == [f"False {process} one two words", f"True {process} one two words", "ran"]


@on_glibc
def test_a_process_that_cannot_be_told_goes_on(tmp_path: Path) -> None:
    """Something between takes the variable away again."""
    script = (
        "os.environ.pop('GLIBC_TUNABLES', None)\n"
        "begin_again()\n"
        "print('ran', os.environ['GOMP_SPINCOUNT'], 'GLIBC_TUNABLES' in os.environ)\n"
    )
    assert ran(tmp_path, script)[1] == ["ran 20000 False"]


@on_glibc
@pytest.mark.parametrize(
    "command", [[str(Path(sys.executable).with_name("outsize"))], [sys.executable, "-m", "outsize"]]
)
def test_the_command_does_so(command: list[str]) -> None:
    """Each interpreter says that it imports `site`."""
    for told, begun in ((settings({}), 1), ({}, 2)):
        environment = {**WITHOUT, **told, "PYTHONPROFILEIMPORTTIME": "1"}
        done = subprocess.run([*command, "--help"], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "Usage" in done.stdout
        assert [line.split()[-1] for line in done.stderr.splitlines()].count("site") == begun


@on_glibc
def test_to_tell_it_later_is_not_taken_for_telling_it() -> None:
    program = "import os; os.environ.update({!r}); from outsize.machine.environment import merges; print(merges())"
    command = [sys.executable, "-c", program.format(settings({}))]
    assert subprocess.check_output(command, env=WITHOUT, text=True, timeout=60) == "False\n"
    assert subprocess.check_output(command, env=WITHOUT | settings({}), text=True, timeout=60) == "True\n"
