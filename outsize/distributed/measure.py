"""How fast bytes get from worker to worker, and how fast these compute: measured before anything is planned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from statistics import median
from time import perf_counter, process_time

import torch

from outsize.distributed.group import Group
from outsize.distributed.wire import Link, Wire
from outsize.machine.describe import count_cores, which_boot

SIZES = (1 << 12, 1 << 20, 1 << 23)  # bytes that each worker sends in an exchange: that shows latency, and bandwidth
LONG = 0.1  # seconds; a larger exchange would show no more
TIMES, MOST_TIMES = 3, 15
COOLED = 32 << 20  # bytes that are written between two tries
MATRICES, ROWS, COLUMNS = 32, 256, 1024  # of matrices whose product shows how fast a worker computes
ALIKE = 1.5  # times as much, and yet taken for as much


def measure_wire(group: Group, beside: int = 1) -> Wire:
    """Time exchanges of all workers at once, `beside` each other on a machine, over each kind of link; of one worker there is
    none. Memory: 48 MiB for a moment."""
    found, each = {}, max(beside / count_cores(), 1.0)  # for a core
    for level, (tier, _) in enumerate(group.arrangement.levels):
        _seconds(group, level, SIZES[0])  # connects
        nbytes, (seconds, busy) = SIZES[0], _seconds(group, level, SIZES[0])
        latency = seconds
        while seconds < LONG and nbytes < SIZES[-1]:
            nbytes = SIZES[SIZES.index(nbytes) + 1]
            seconds, busy = _seconds(group, level, nbytes)
        found[tier] = Link(nbytes / max(seconds - latency, 1e-9), latency, min(each * busy / seconds, 1.0))
    return found


def _seconds(group: Group, level: int, nbytes: int) -> tuple[float, float]:
    """Of one exchange in which each worker sends so many bytes, and of a core: the median, of the slowest worker each time,
    and of who works most."""
    others = group.arrangement.others(level)
    part = nbytes // len(others)
    outgoing, incoming = torch.zeros(part, dtype=torch.uint8), torch.empty(len(others), part, dtype=torch.uint8)
    cooling, seconds, busy = torch.empty(COOLED, dtype=torch.uint8), [], []
    while len(seconds) < TIMES or (sum(seconds) < LONG and len(seconds) < MOST_TIMES):  # on all workers as often
        cooling.fill_(1)  # bytes come from memory, as in a step, and not from a processor's own cache
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
    """How many times as long something takes while all `workers` of a machine compute as when one does: products of matrices,
    and what passes through memory."""

    products: float = 1.0
    memory: float = 1.0
    workers: int = 1

    def times(self, slower: float) -> Crowd:
        return replace(self, products=slower * self.products, memory=slower * self.memory)


def measure_crowd(group: Group) -> Crowd:
    """Let the workers of each machine compute in turn, and then all at once and in step, as exchanges make them: of the
    machine on which they suffer most. Nodes that are parts of one machine share what it has. Memory: 128 MiB for a moment."""
    machines = group.tell(which_boot() or group.rank // group.here)
    beside = [rank for rank, machine in enumerate(machines) if machine == machines[group.rank]]
    most = max(machines.count(machine) for machine in machines)
    if most == 1:
        return Crowd()
    works, alone = _works(), [0.0, 0.0]
    for turn in range(most):
        group.each(0)
        if group.rank in beside[turn : turn + 1]:
            alone = [_alone(work) for work in works]
    usual = [median(said) for said in zip(*group.among(beside, *alone), strict=True)]
    slower = [_in_step(group, beside, work, once) / once for work, once in zip(works, usual, strict=True)]
    return Crowd(*(max(1.0, *said) for said in zip(*group.each(*slower), strict=True)), workers=most)


def _works() -> list[Callable[[], object]]:
    """Products as of a step, for each of which a matrix comes from memory; and what does nothing but pass through it."""
    matrices, left = torch.ones(MATRICES, COLUMNS, COLUMNS), torch.ones(ROWS, COLUMNS)
    following, pairs = cycle(matrices), cycle(matrices.view(2, 2, -1))

    def add() -> None:
        into, other = next(pairs)
        into.add_(other)

    return [lambda: torch.mm(left, next(following)), add]


def _alone(work: Callable[[], object]) -> float:
    """Seconds that it takes, usually."""
    work()
    seconds, until = [], perf_counter() + LONG
    while not seconds or perf_counter() < until:
        started = perf_counter()
        work()
        seconds.append(perf_counter() - started)
    return median(seconds)


def _in_step(group: Group, beside: Sequence[int], work: Callable[[], object], alone: float) -> float:
    """Seconds that it takes while all those `beside` each other do it, each time until the last has done it. What they tell
    each other takes its time, too, which is not meant."""
    times = max(2, int(LONG / alone))

    def mean(work: Callable[[], object]) -> float:
        started = perf_counter()
        for _ in range(times):
            work()
            group.among(beside, 0)
        return (perf_counter() - started) / times

    group.among(beside, 0)
    telling = min(mean(lambda: None) for _ in range(TIMES))
    return median(mean(work) for _ in range(TIMES)) - telling


def leveled(values: Sequence[float], alike: float = ALIKE) -> list[float]:
    """What is nearly alike, not `alike` times as much, as the least of it: so that equal machines are equal whatever was
    measured."""
    levels: list[float] = []
    for value in sorted(values):
        if not levels or value >= alike * levels[-1]:
            levels.append(value)
    return [max(level for level in levels if level <= value) for value in values]
