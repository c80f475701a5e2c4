"""Real workers for tests: processes connected by Gloo, forked from one that has made the imports, which take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from outsize.machine.find import DESCRIBED

CHILD = Path(__file__).with_name("worker_child.py")
MACHINE = DESCRIBED / "two-cores.toml"  # so that planning, of each worker of each run, has nothing to measure


@dataclass(frozen=True)
class Case:
    """A job that `workers` train for `steps` steps over `sequences` sequences a step, in micro-batches of `batch`.

    `split`: of ZeRO 3, weights of more elements than this, of which there are so many `copies`, and so many bytes are
    gathered `ahead`. `parts`: in which proportion they divide state. `legs`: of how many layers, in a pipeline; as many
    workers have each, or each worker as many, on a way of that shape. `fails`: the step at whose beginning the last layer
    fails on all workers, before it is tried again. `by_parts`: layers are leased so."""

    workers: int = 2
    zero: int = 3
    family: str = "llama"
    tied: bool = False
    optimizer: str = "adamw"
    precision: str = "fp32"
    placement: str = "disk"
    steps: int = 3
    sequences: int = 4
    batch: int = 1
    clip: float | None = None
    table_rows: int | None = None
    hidden: int = 64
    split: int = 256
    activations: str = "recompute"
    nodes: int = 1
    close: int = 1
    copies: int = 1
    ahead: int = 0
    parts: tuple[int, ...] = ()
    legs: tuple[int, ...] = ()
    legs_shape: str = "loop"
    schedule: str = "1f1b"
    layers: int = 4
    fails: int | None = None
    by_parts: bool = False


@dataclass
class Found:
    """What the workers found: losses, norms and weights (of a pipeline, of all), what each held, moved and waited for, and,
    in a pipeline or alone, the loss of two micro-batches afterwards."""

    losses: list[float]
    norms: list[float | None]
    weights: dict[str, torch.Tensor]
    ledgers: list[dict[str, Any]] = field(default_factory=list)
    evaluated: float | None = None


class Crew:
    """The forking process, seen from here."""

    def __init__(self) -> None:
        self._found: dict[Case, Found] = {}
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OUTSIZE_MACHINE": str(MACHINE)},
            cwd=CHILD.parent.parent,
        )

    def run(self, case: Case, folder: Path) -> Found:
        """What it finds is kept for the next test that asks, but for a folder called again. Raises AssertionError with what
        the workers said when one of them fails."""
        if case in self._found and folder.name != "again":
            return self._found[case]
        folder.mkdir(parents=True)
        self.call("train", case.workers, folder, asdict(case))
        found = [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(case.workers)]
        weights = {name: weight for each in reversed(found) for name, weight in each["weights"].items()}
        (evaluated,) = {each.get("evaluated") for each in found}
        ledgers = [each["ledger"] for each in found]
        self._found[case] = Found(found[0]["losses"], found[0]["norms"], weights, ledgers, evaluated)
        return self._found[case]

    def call(self, do: str, workers: int, folder: Path, told: dict[str, Any]) -> None:
        """Have every worker do something; all must end well."""
        codes = self.attempt(do, workers, folder, told)
        said = "\n".join((folder / f"log-{rank}").read_text() for rank in range(workers))
        assert not any(codes), f"workers ended with {codes} and said\n{said}"

    def attempt(self, do: str, workers: int, folder: Path, told: dict[str, Any]) -> list[int]:
        """How they ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = {"do": do, "workers": workers, "folder": str(folder), "told": told}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def crew() -> Iterator[Crew]:
    made = Crew()
    try:
        yield made
    finally:
        made.close()
