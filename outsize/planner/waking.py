"""What operations cost besides where several micro-batches take turns, each in a thread of its own.

libgomp keeps helpers for each thread that computes. Where they are more than the processors, together, none of them may spin
until there is work, and whoever begins an operation wakes a sleeping one (docs/log.md, Memory)."""

from __future__ import annotations

from time import perf_counter

import torch

from outsize.model.lanes import Lanes

TURNS, OPERATIONS = 12, 10  # of each lane, and done in each turn


def seconds_of_waking() -> float:
    """How much longer an operation takes in lanes than in one thread alone: at least, as the system now and then has both
    threads of an operation on one processor for a while."""
    numbers = torch.full((1 << 19,), 0.5, dtype=torch.bfloat16)
    alone, in_turns = [], []

    def turns(lanes: Lanes, into: list[float]) -> None:
        for _ in range(TURNS):
            started = perf_counter()
            for _ in range(OPERATIONS):
                torch.mul(numbers, numbers, out=numbers)
            into.append((perf_counter() - started) / OPERATIONS)
            lanes.pass_turn()

    lanes = Lanes()
    lanes.run([lambda: turns(lanes, alone)])
    lanes.run([lambda: turns(lanes, in_turns)] * 2)
    return max(min(in_turns) - min(alone), 0.0)
