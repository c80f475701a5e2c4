"""What operations took when they were last measured here: kept in a file, for as long as the machine is as fast as it was.

To measure a step's operations takes longer than to rehearse it. What they take depends on the machine and on what it
computes with, which the file's name tells apart; and on who else uses it, for which a few yardsticks stand that are measured
anew each time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import torch

from outsize.machine.find import machine_file
from outsize.machine.machine import Machine

HOLDS = 0.1  # by which a yardstick may take more or less than it took, if what was measured beside it is to hold
KERNELS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # variables that say which kernels torch takes
PACKAGE = Path(__file__).parent.parent
MEASURED = [PACKAGE / "planner/prices.py", PACKAGE / "planner/priced_update.py", PACKAGE / "train/update.py"]
"""How it is measured, and what of our own is."""
Measure = Callable[[], float | None]


@dataclass
class KnownPrices:
    """Seconds by what was measured. `yardsticks` are the seconds of what was measured beside it. Without a `path` nothing is
    kept."""

    path: Path | None = None
    yardsticks: Sequence[float] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept = len(self.seconds)

    @classmethod
    def read(cls, path: Path, yardsticks: Sequence[float]) -> KnownPrices:
        """What is in the file, if there is one and the yardsticks are now what they were; else nothing."""
        try:
            said = json.loads(path.read_bytes())
            then = [float(each) for each in said["yardsticks"]]
            seconds = {str(what): float(each) for what, each in said["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls(path, yardsticks)
        return cls(path, then, seconds) if _alike(then, yardsticks) else cls(path, yardsticks)

    def find(self, what: str, measure: Measure, instead: Callable[[], object] = lambda: None) -> float | None:
        """As it was measured before, and then `instead` is done; or as measured now. What could not be measured is tried
        again the next time: it may have been for want of memory."""
        if what in self.seconds:
            instead()
            return self.seconds[what]
        seconds = measure()
        if seconds is not None:
            self.seconds[what] = seconds
        return seconds

    def keep(self) -> None:
        """Write what is new. Where that cannot be, it is measured again the next time."""
        if self.path is None or len(self.seconds) == self._kept:
            return
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps({"yardsticks": list(self.yardsticks), "seconds": self.seconds}, indent=0))
            fresh.replace(self.path)
            self._kept = len(self.seconds)


def prices_file(machine: Machine) -> Path:
    """Where this machine's prices are kept, in the user's cache: in another file after another probe, with another torch,
    with other threads, and where they are measured otherwise."""
    probed, processor = machine_file(), machine.compute
    depends = (
        *(version("outsize"), torch.__version__, torch.get_num_threads(), processor.name, processor.cores),
        *(torch.get_float32_matmul_precision(), *(os.environ.get(name) for name in KERNELS)),
        *(sha256(file.read_bytes()).hexdigest() for file in (probed, *MEASURED) if file.exists()),
    )
    cache = os.environ.get("XDG_CACHE_HOME")
    name = f"prices-{sha256(repr(depends).encode()).hexdigest()[:12]}.json"
    return (Path(cache) if cache else Path.home() / ".cache") / "outsize" / name


def _alike(then: Sequence[float], now: Sequence[float]) -> bool:
    return len(then) == len(now) and all(abs(b - a) <= HOLDS * a for a, b in zip(then, now, strict=True))
