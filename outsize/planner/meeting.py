"""What an operation of several threads costs in a step besides what it costs alone: they wait for each other at its end,
and now and then one is late, which the median of a few samples leaves out.

So layers are passed for real, forward and backward, and all that forward makes is kept. By how much the mean of operations
of one kind is above their median is what each of them costs besides: measured, and not fitted to the steps of a job."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from outsize.machine.allocator import give_back, recycling
from outsize.planner.prices import is_shared, looks
from outsize.planner.samples import Cooling

TOKENS, HIDDEN, INNER, LAYERS, PASSES = 512, 512, 1536, 4, 2  # some 80 MiB at once; chosen
TIMES, LONG = 7, 1.0  # passes, and seconds after which no more are made


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]`"""
        exact = inputs.float()
        normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)
        risen = self.rise(normed.to(inputs.dtype))
        return inputs + self.fall(nn.functional.silu(risen) * risen)


class Timed(TorchDispatchMode):
    """Seconds of each operation that threads share, by what it depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[Any, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = perf_counter() - started
        if is_shared(func, (args, result)):
            self.seconds[func, looks(args)].append(seconds)
        return result

    def late(self) -> float:
        """Seconds of an operation above what is usual for those like it."""
        return mean(seconds - usual for each in self.seconds.values() for usual in [median(each)] for seconds in each)


def seconds_of_meeting(cooling: Cooling) -> float:
    """Of each operation that several threads share; nothing where there is one thread."""
    if torch.get_num_threads() == 1:
        return 0.0
    cooling.end()  # to hold no more than that
    late = []
    with torch.random.fork_rng(devices=[]), recycling():
        layers = nn.Sequential(*(_Layer() for _ in range(LAYERS))).bfloat16()
        _pass(layers)
        end = perf_counter() + LONG
        while not late or len(late) < TIMES and perf_counter() < end:
            with Timed() as timed:
                _pass(layers)
            late.append(timed.late())
    give_back()
    return median(late)


def _pass(layers: nn.Module) -> None:
    inputs = hidden = torch.full((TOKENS, HIDDEN), 0.25, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(PASSES):
        hidden = layers(hidden)
    torch.autograd.grad(hidden, [inputs, *layers.parameters()], torch.ones_like(hidden))
