"""A command that several workers carry out, seen from outside: the launcher, its workers, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from models import write_model
from workers import MACHINE

import outsize
from outsize.serve.batch import answer_file
from outsize.serving import Sampling

PATIENCE = 100  # seconds for anything to happen on a busy machine
PROMPTS = 800
SOME = 20  # answers, and then something happens


class Launched:
    """`process` is the launcher's, and `said` what all have said. The command's first word is a module."""

    def __init__(self, folder: Path, *command: object) -> None:
        self._log, self.scratch = folder / "said", folder / "scratch"
        self.scratch.mkdir(exist_ok=True)
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *map(str, command)],
                stdout=file,
                stderr=file,
                env=os.environ | {"TMPDIR": str(self.scratch), "OUTSIZE_MACHINE": str(MACHINE)},
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

    def end(self, tracebacks: int = 0) -> int:
        """The exit code, when all is over; whoever was seen is gone, and so is what they had on disk. A signal ends torchrun
        itself with a traceback."""
        code = self.process.wait(PATIENCE)
        end = time.monotonic() + PATIENCE
        while any(map(_runs, self._seen)):
            assert time.monotonic() < end, f"{[pid for pid in self._seen if _runs(pid)]} go on: {self.said}"
            time.sleep(0.02)
        assert not list(self.scratch.iterdir()) and self.said.count("Traceback") == tracebacks, self.said
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


@dataclass
class Work:
    """Prompts in `folder`, which two workers answer again and again until all are."""

    model: Path
    folder: Path
    launcher: tuple[object, ...] = ("outsize",)
    more: tuple[object, ...] = ("--workers", 2)

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    @contextmanager
    def under_way(self) -> Iterator[Launched]:
        """With some more answers than there were, and others to come."""
        before = self.count()
        files = ("--input", self.folder / "prompts.jsonl", "--output", self.answers)
        generate = ("generate", "--model", self.model, "--memory", "1GiB", *files, *self.more)
        with launched(self.folder, *self.launcher, *generate) as command:
            command.until(lambda: self.count() >= before + SOME)
            assert self.count() < PROMPTS
            yield command

    def count(self) -> int:
        return self.answers.read_bytes().count(b"\n") if self.answers.exists() else 0

    def compare(self) -> None:
        """Answer what is left, and everything again, without being disturbed; all must be the same."""
        undisturbed = self.folder / "undisturbed.jsonl"
        with outsize.Engine(str(self.model), memory="8GiB") as engine:
            for answers, left in ((self.answers, PROMPTS - self.count()), (undisturbed, PROMPTS)):
                assert answer_file(engine, self.folder / "prompts.jsonl", answers, Sampling(100, seed=0)) == left
        assert self.answers.read_bytes() == undisturbed.read_bytes()


def make_work(folder: Path, *how: tuple[object, ...]) -> Work:
    lines = [
        {"prompt": f"w{n % 99} w{n % 7}", "max_new_tokens": 16 + n % 7, "temperature": n % 2} for n in range(PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(line | {"ignore_end": True}) for line in lines))
    return Work(write_model(folder / "model"), folder, *how)
