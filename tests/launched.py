"""A command that was started with `--workers`, seen from outside: the launcher, its workers, and what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 100  # seconds for anything to happen on a busy machine


class Launched:
    """`process` is the launcher's, and `said` what all have said."""

    def __init__(self, folder: Path, *command: object) -> None:
        self._log, self.scratch = folder / "said", folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "outsize", *map(str, command)],
                stdout=file,
                stderr=file,
                env=os.environ | {"TMPDIR": str(self.scratch)},
            )
        self._seen: set[int] = set()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def worker(self, rank: int) -> int:
        """The process of a worker."""
        self.until(lambda: len(self._children()) == 2)
        return next(pid for pid in self._seen if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())

    def _children(self) -> set[int]:
        self._seen.update(
            map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())
        )
        return self._seen

    def until(self, happened: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.005)

    def end(self) -> int:
        """The exit code, when all is over; whoever was seen is gone, and so is what they had on disk."""
        code = self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while any(map(_runs, self._seen)):
            assert time.monotonic() < end, f"{[pid for pid in self._seen if _runs(pid)]} go on: {self.said}"
            time.sleep(0.02)
        assert not list(self.scratch.iterdir()) and "Traceback" not in self.said, self.said
        return code

    def kill(self) -> None:
        for pid in (self.process.pid, *self._seen):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def launched(folder: Path, *command: object) -> Iterator[Launched]:
    """Whatever happens, nothing of it stays."""
    found = Launched(folder, *command)
    try:
        found.worker(0)
        yield found
    finally:
        found.kill()
