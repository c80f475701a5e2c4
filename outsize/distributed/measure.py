"""How fast bytes get from worker to worker, and how fast these compute: measured before anything is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time

import torch

from outsize.distributed.group import Group
from outsize.distributed.wire import Link, Wire

SIZES = (1 << 12, 1 << 20, 1 << 23)  # bytes that each worker sends in an exchange: that shows latency, and bandwidth
LONG = 0.1  # seconds; a larger exchange would show no more
TIMES = 3
MATRICES, ROWS, COLUMNS = 16, 256, 1024  # of matrices whose product shows how fast a worker computes
ALIKE = 1.5  # times as much, and yet taken for as much


def measure_wire(group: Group) -> Wire:
    """Time exchanges of all workers at once, over each kind of link; of one worker there is none. Memory: 16 MiB for a
    moment."""
    found = {}
    for level, (tier, _) in enumerate(group.arrangement.levels):
        _seconds(group, level, SIZES[0])  # connects
        nbytes, (seconds, busy) = SIZES[0], _seconds(group, level, SIZES[0])
        latency = seconds
        while seconds < LONG and nbytes < SIZES[-1]:
            nbytes = SIZES[SIZES.index(nbytes) + 1]
            seconds, busy = _seconds(group, level, nbytes)
        found[tier] = Link(nbytes / max(seconds - latency, 1e-9), latency, min(busy / seconds, 1.0))
    return found


def _seconds(group: Group, level: int, nbytes: int) -> tuple[float, float]:
    """Of one exchange in which each worker sends so many bytes, and of a core: the median, of the slowest worker each time,
    and of who works most."""
    others = group.arrangement.others(level)
    part = nbytes // len(others)
    outgoing, incoming = torch.zeros(part, dtype=torch.uint8), torch.empty(len(others), part, dtype=torch.uint8)
    seconds, busy = [], []
    for _ in range(TIMES):
        group.each(0)  # begin together
        started, used = perf_counter(), process_time()
        group.send(dict.fromkeys(others, outgoing), dict(zip(others, incoming, strict=True)))
        took = zip(*group.each(perf_counter() - started, process_time() - used), strict=True)
        for found, said in zip((seconds, busy), took, strict=True):
            found.append(max(said))
    return median(seconds), median(busy)


def measure_speeds(group: Group) -> list[float]:
    """How fast workers compute, relative to the slowest: by the time of their processors alone, however many share these."""
    if group.size == 1:
        return [1.0]
    left, right = torch.ones(ROWS, COLUMNS), torch.ones(COLUMNS, COLUMNS)
    seconds = []
    for _ in range(TIMES):
        started = process_time()
        torch.mm(left, right)
        seconds.append((process_time() - started) / torch.get_num_threads())
    speeds = leveled([1 / max(said, 1e-9) for (said,) in group.each(min(seconds))])
    return [speed / min(speeds) for speed in speeds]


@dataclass(frozen=True)
class Crowd:
    """How many times as long something takes while all workers of a machine compute as when one does: products of matrices,
    and what passes through memory."""

    products: float = 1.0
    memory: float = 1.0

    def times(self, slower: float) -> Crowd:
        return Crowd(slower * self.products, slower * self.memory)


def measure_crowd(group: Group) -> Crowd:
    """Let the workers of each machine compute in turn, and then all at once: of the one who suffers most. Memory: 64 MiB
    for a moment."""
    turns = int(max(here for (here,) in group.each(group.here)))
    if turns == 1:
        return Crowd()
    matrices = torch.ones(MATRICES, COLUMNS, COLUMNS)
    works = [_products(matrices), _passes(matrices)]
    alone = [0.0, 0.0]
    for turn in range(turns):
        group.each(0)
        if group.rank % turns == turn:
            alone = [_rate(work) for work in works]
    together = []
    for work in works:
        group.each(0)
        together.append(_rate(work))
    slower = group.each(*(max(one / all_, 1.0) for one, all_ in zip(alone, together, strict=True)))
    return Crowd(*(max(found) for found in zip(*slower, strict=True)))


def _products(matrices: torch.Tensor) -> Callable[[], object]:
    """Products as of a step: one matrix comes from memory each time."""
    left = torch.ones(ROWS, COLUMNS)
    return lambda: [torch.mm(left, right) for right in matrices]


def _passes(matrices: torch.Tensor) -> Callable[[], object]:
    first, second = matrices.chunk(2)
    return lambda: first.add_(second)


def _rate(work: Callable[[], object]) -> float:
    """Times a second, for a while."""
    started, times = perf_counter(), 0
    while (seconds := perf_counter() - started) < LONG:
        work()
        times += 1
    return times / seconds


def leveled(values: Sequence[float], alike: float = ALIKE) -> list[float]:
    """What is nearly alike, not `alike` times as much, as the least of it: so that equal machines are equal whatever was
    measured."""
    levels: list[float] = []
    for value in sorted(values):
        if not levels or value >= alike * levels[-1]:
            levels.append(value)
    return [max(level for level in levels if level <= value) for value in values]
