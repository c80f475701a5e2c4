"""What operations cost more while blocks stream: bytes on their way to and from the disk pass through the caches too, and
leave nothing there that was touched a while ago. A processor of many cores has a cache of hundreds of MiB, from which a step
that streams nothing still gets much."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from outsize.planner.known_prices import KnownPrices
from outsize.planner.prices import Thrashed
from outsize.planner.samples import COLD, Cooling, Pulse, usual_seconds

THRASHING = 512 << 20  # bytes gone through until all caches hold nothing of what was there; chosen (docs/log.md)
STEP = 64 << 20  # bytes, by which two amounts of memory to measure in are told apart, and that stay free; chosen
ROWS, COLUMNS = 512, 1024  # of the product


def thrashed(room: int, known: KnownPrices, pulse: Pulse) -> Thrashed:
    """As measured within `room` bytes of memory, or known of a time like now; nothing where that is too few."""
    most = min(room - COLD - STEP, THRASHING) // STEP * STEP
    if most <= COLD:
        return Thrashed()
    slabs = [Cooling(nbytes) for nbytes in (COLD, most)]
    try:
        found = [
            known.find(f"{name} after {most} bytes", partial(make, *slabs, pulse)) for name, make in MEASURED.items()
        ]
    finally:
        for slab in slabs:
            slab.end()
    return Thrashed(*(max(each or 0.0, 0.0) for each in found))


def _numbers(rows: int, columns: int) -> torch.Tensor:
    return torch.full((rows, columns), 0.25, dtype=torch.bfloat16)


def _longer(cold: Cooling, thrashing: Cooling, pulse: Pulse) -> float:
    """By how much an operation as fast as memory is takes longer, as a part of what it takes."""
    left, right = (_numbers(ROWS, 3 * COLUMNS) for _ in range(2))
    seconds = [usual_seconds(partial(torch.mul, left, right), slab, pulse) for slab in (cold, thrashing)]
    return seconds[1] / seconds[0] - 1.0


def _later(cold: Cooling, thrashing: Cooling, pulse: Pulse) -> float:
    """Seconds that a product takes longer for a byte of what it reads and writes."""
    left, right = _numbers(ROWS, COLUMNS), _numbers(COLUMNS, COLUMNS)
    seconds = [usual_seconds(partial(torch.mm, left, right), slab, pulse) for slab in (cold, thrashing)]
    return (seconds[1] - seconds[0]) / (2 * (2 * ROWS * COLUMNS + COLUMNS * COLUMNS))


MEASURED: dict[str, Callable[[Cooling, Cooling, Pulse], float]] = {"longer": _longer, "later": _later}
