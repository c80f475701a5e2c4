"""What operations took when they were last measured here: kept in a file, for when the machine is as fast as it was.

To measure a step's operations takes longer than to rehearse it. What they take depends on the machine and on what it
computes with, which the file's name tells apart; and on who else uses it, for which a few yardsticks stand that are measured
anew each time. What was measured while the machine was quiet is kept beside what was measured while it was busy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from outsize.machine.cache import cache_file
from outsize.machine.environment import TUNABLES
from outsize.machine.find import machine_file
from outsize.machine.machine import Machine

HOLDS = 0.1  # by which a yardstick may take more or less than it took, if what was measured beside it is to hold
TIMES = 4  # of which what was measured is kept: those to which something was added last
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", TUNABLES)
"""Variables that say which kernels torch takes, and how its threads wait for each other."""
PACKAGE = Path(__file__).parent.parent
MEASURED = [
    PACKAGE / "planner/prices.py",
    PACKAGE / "planner/samples.py",
    PACKAGE / "planner/meeting.py",
    PACKAGE / "planner/thrashed.py",
    PACKAGE / "planner/priced_update.py",
    PACKAGE / "train/update.py",
]
"""How it is measured, and what of our own is."""
Measure = Callable[[], float | None]


@dataclass
class Then:
    """Seconds by what was measured, at a time when the yardsticks took theirs."""

    yardsticks: Sequence[float] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def like(self, yardsticks: Sequence[float]) -> bool:
        """The machine was as fast as one with these."""
        pairs = zip(self.yardsticks, yardsticks, strict=False)
        return len(self.yardsticks) == len(yardsticks) and all(abs(b - a) <= HOLDS * a for a, b in pairs)


class KnownPrices:
    """Those of a time like now, and `others`, which stay in the file. Without a `path` nothing is kept."""

    def __init__(self, path: Path | None = None, then: Then | None = None, others: Sequence[Then] = ()) -> None:
        self.path, self.then, self.others = path, then or Then(), others
        self._kept = len(self.then.seconds)

    @classmethod
    def read(cls, path: Path, yardsticks: Sequence[float]) -> KnownPrices:
        """What is in the file of a time when the yardsticks took what they take now, if there is any."""
        kept = _read(path)
        alike = min((then for then in kept if then.like(yardsticks)), key=partial(_apart, yardsticks), default=None)
        alike = alike or Then(yardsticks)
        return cls(path, alike, [then for then in kept if then is not alike])

    def find(self, what: str, measure: Measure, instead: Callable[[], object] = lambda: None) -> float | None:
        """As it was measured before, and then `instead` is done; or as measured now. What could not be measured is tried
        again the next time: it may have been for want of memory."""
        if what in self.then.seconds:
            instead()
            return self.then.seconds[what]
        seconds = measure()
        if seconds is not None:
            self.then.seconds[what] = seconds
        return seconds

    def keep(self) -> None:
        """Write what is new. Where that cannot be, it is measured again the next time."""
        if self.path is None or len(self.then.seconds) == self._kept:
            return
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        said = [{"yardsticks": [*t.yardsticks], "seconds": t.seconds} for t in (self.then, *self.others)[:TIMES]]
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(said, indent=0))
            fresh.replace(self.path)
            self._kept = len(self.then.seconds)


def prices_file(machine: Machine) -> Path:
    """Where this machine's prices are kept: in another file after another probe, with another torch, with other threads, and
    where they are measured otherwise."""
    processor = machine.compute
    depends = (
        *(torch.__version__, torch.get_num_threads(), processor.name, processor.cores),
        *(torch.get_float32_matmul_precision(), *(os.environ.get(name) for name in SETTINGS)),
    )
    return cache_file("prices", ".json", depends, (machine_file(), *MEASURED))


def _apart(yardsticks: Sequence[float], then: Then) -> float:
    return sum(abs(now - was) / was for now, was in zip(yardsticks, then.yardsticks, strict=True))


def _read(path: Path) -> list[Then]:
    """What is in the file, if there is one, and it is one of ours."""
    try:
        return [
            Then(
                [float(each) for each in said["yardsticks"]],
                {str(what): float(each) for what, each in said["seconds"].items()},
            )
            for said in json.loads(path.read_bytes())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
