"""How long something takes: out of the caches, from recycled memory, and while nobody else has the processor."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter
from typing import Any

import torch

from outsize.machine.allocator import recycling
from outsize.memory.host import allocate_slab

SAMPLES, ATTEMPTS = 3, 8  # of an operation: samples that are enough if they agree, and the most until they do
AGREE = 1.5  # times the shortest, that half of the samples may take at most; a late thread makes more of it
COLD = 128 << 20  # bytes gone through until what was touched before is out of the caches of a core (docs/log.md)
STEADY = 1.4  # times the least that a pulse took; who shares a core makes it twice as long (docs/log.md)
PATIENCE = 2.0  # seconds of a planning that are waited for others to leave the processor alone, at most


class Cooling:
    """Goes through `nbytes`, which leaves nothing of use in the caches of a core. Its slab lies in huge pages, which come
    fast, but only once: it is kept until `end`."""

    def __init__(self, nbytes: int = COLD) -> None:
        self.nbytes = nbytes
        self._slab: torch.Tensor | None = None

    def __call__(self) -> None:
        if self._slab is None:
            self._slab = allocate_slab(self.nbytes)
        self._slab.fill_(1)

    def end(self) -> None:
        self._slab = None


class Pulse:
    """Whether others slow the processor just now: a small product takes longer than it can.

    On a virtual machine the other half of a core may be somebody's. That comes and goes within tenths of a second, and
    no counter of the system shows it. Once `patience`, the seconds that are waited in all, has come to an end, what there is
    counts as steady."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._factors = torch.full((64, 512), 0.25), torch.full((512, 512), 0.25)
        self._least, self.patience = inf, patience

    def steady(self) -> bool:
        """The faster of two: a thread that slept is late for the first."""
        seconds = min(self._beat(), self._beat())
        self._least = min(self._least, seconds)
        return seconds <= STEADY * self._least or self.patience <= 0

    def wait(self) -> None:
        """Until it is steady, as long as there is patience left."""
        started = perf_counter()
        while not self.steady():
            now = perf_counter()
            self.patience -= now - started
            started = now

    def _beat(self) -> float:
        started = perf_counter()
        torch.mm(*self._factors)
        return perf_counter() - started


def usual_seconds(function: Callable[[], Any], before: Callable[[], Any], pulse: Pulse) -> float:
    """Of what has been done once: the median of a few samples, more where they disagree, so that a few interruptions do not
    count, of those that nobody disturbed and to which the operating system gave no fresh pages; if there are none, of those
    that come nearest to it. Results come from recycled memory, as in a step: fresh pages would take as long as many an
    operation, and it takes the heap some rounds to have room that is used again. `before` each: what leaves the caches as a
    step does, whatever the pulse has left there."""
    samples: list[tuple[bool, int, float]] = []
    with recycling():
        function()
        while len(samples) < ATTEMPTS and not _agree(_clean(samples)):
            pulse.wait()
            held = before()
            faults, started = _faults(), perf_counter()
            function()
            seconds, faults = perf_counter() - started, _faults() - faults
            samples.append((not pulse.steady(), faults, seconds))
            del held
    return median(_clean(samples) or [seconds for *_, seconds in sorted(samples)[:SAMPLES]])


def _clean(samples: list[tuple[bool, int, float]]) -> list[float]:
    return [seconds for disturbed, faults, seconds in samples if not disturbed and not faults]


def _agree(samples: list[float]) -> bool:
    return len(samples) >= SAMPLES and median(samples) <= AGREE * min(samples)


def _faults() -> int:
    return getrusage(RUSAGE_SELF).ru_minflt
