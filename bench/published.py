"""What others have published of large models on small machines, beside what the planner finds: python bench/published.py

Prints the table of docs/foresight.md. The planner rehearses each step on fake tensors, with what forward leaves for backward
recomputed, so but for units' inputs that move, and all moved: what its tensors, leases and buffers take of a device, how
long its operations take at the described rates, what it moves. Of what fits the fastest counts, and the best mixture of some
layers moved and the others recomputed. Steps are not played yet, though plans for devices would be: a step's time here is
the longest of compute and each link alone, a bound.

python bench/published.py --only Fuyou        those rows whose paper or machine has this in its name
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

from outsize.asked import Request
from outsize.machine.devices import CONTEXT
from outsize.machine.find import find_machine
from outsize.machine.machine import Machine, Rate
from outsize.memory.block import Block
from outsize.plan import MOVE, RECOMPUTE, Activations
from outsize.planner.needs import LOOSE, pinned_peak
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import homes, rehearse
from outsize.planner.script import Create, Live, Script, Spend, Touched
from outsize.planner.search import JobSizes
from outsize.planner.training import Task, sample_batches

SPARED = 0.9  # of the host's memory may hold state; assumed
FEW = 2  # layers
VOCABULARY = 51200
READ, WRITTEN = 2, 1  # times a step that a weight passes a link; state does once each way
WAYS = {"recomputed": RECOMPUTE, "inputs moved": Activations("input", "disk"), "all moved": MOVE}
"""What becomes of what a unit's forward leaves for its backward."""


@dataclass(frozen=True)
class Row:
    """A GPT-2 of `layers` x `hidden`, `batch` x `tokens` on each device; `published` is what the paper says."""

    who: str
    machine: str
    layers: int
    hidden: int
    batch: int
    tokens: int
    published: str


ROWS = [
    Row("ZeRO-Offload", "v100-32gb", 50, 4096, 10, 1024, "10 B in 15.5 s (20.6)"),
    Row("ZeRO-Offload", "v100-32gb", 65, 4096, 4, 1024, "13 B is the largest"),
    Row("ZeRO-Infinity", "dgx-2", 50, 4096, 8, 1024, "10 B below 12.4 s (16.5)"),
    Row("ZeRO-Infinity", "dgx-2", 125, 8192, 24, 1024, "100 B below 371 s (495)"),
    Row("ZeRO-Infinity", "dgx-2", 128, 25600, 7, 1024, "1 T is the largest"),
    Row("Fuyou", "rtx-4090-12-ssd", 40, 5120, 32, 1024, "13 B in 16.4 s (21.8)"),
    Row("Fuyou", "rtx-4090-12-ssd", 96, 12288, 8, 1024, "175 B is the largest"),
]


@dataclass(frozen=True)
class Found:
    """Bytes on each device; bytes of all state, and of what moves out of all devices and back in a step; and seconds of
    compute and of each link."""

    parameters: int
    device_bytes: int
    state_bytes: int
    moved_bytes: int
    seconds: dict[str, float]

    @property
    def slowest(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def bound(self) -> float:
        return self.seconds[self.slowest]


def in_half_precision(machine: Machine) -> Machine:
    """With the better of both 16-bit rates for bf16: a V100 trains in fp16, which moves the same bytes."""

    def better(rates: dict[str, Rate]) -> dict[str, Rate]:
        return rates | {"bf16": max(rates["bf16"], rates.get("fp16", rates["bf16"]), key=lambda rate: rate.best)}

    processors = (replace(each, matmul=tuple(better(dict(each.matmul)).items())) for each in machine.processors)
    return replace(machine, processors=tuple(processors))


def task_of(row: Row, layers: int) -> Task:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from outsize.model.units import find_units
    from outsize.train.recipe import rule_of

    config = AutoConfig.for_model(
        "gpt2",
        n_layer=layers,
        n_embd=row.hidden,
        n_head=row.hidden // 128,
        n_positions=row.tokens,
        vocab_size=VOCABULARY,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function in one kernel, as the papers have it
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    return Task(model, find_units(model), rule_of("adamw", {}), Request(1 << 60, row.tokens, row.batch))


def find(row: Row, machine: Machine, how: Activations, job: JobSizes) -> Found:
    """Rehearsed with few layers and with twice as many: what those of the difference add, all others add too. `job` is that
    of all layers."""
    scripts: list[Script] = []
    held = 0
    for layers in (FEW, 2 * FEW):
        task = task_of(row, layers)
        plan = task.job.plan(task.request, tuple((unit.name, how) for unit in task.units if unit.repeated))
        batches = sample_batches(task.model, task.request)
        scripts.append(rehearse(task.model, plan, task.rule, RatedPrices(machine), batches).whole)
        held = LOOSE * pinned_peak(scripts[-1], homes(plan, task.job.always))

    def whole(of: Callable[[Script], float]) -> float:
        few, many = map(of, scripts)
        return few + (many - few) * (row.layers - FEW) / FEW

    held += sum(job.sizes[name].bytes + job.sizes[name].state_bytes for name in job.always)
    state = sum(size.state_bytes for size in job.sizes.values())
    weights = sum(size.bytes for size in job.sizes.values())
    moved = int(whole(moved_out)) * machine.compute.count
    return Found(
        sum(size.weight.numel for size in job.sizes.values()),
        int(held + whole(most_alive)) + CONTEXT,
        weights + state,
        moved,
        seconds_of(machine, whole, weights, state, moved),
    )


def mixed(one: Found, other: Found, layers: int) -> tuple[int, Found]:
    """How many layers are best done as in `other`, and all others as in `one`; and what that takes. Of a device it takes what
    the worse one does."""

    def at(count: int) -> Found:
        seconds = {
            name: (one.seconds[name] * (layers - count) + other.seconds[name] * count) / layers for name in one.seconds
        }
        moved = (one.moved_bytes * (layers - count) + other.moved_bytes * count) // layers
        most = max(one.device_bytes, other.device_bytes)
        return replace(one, seconds=seconds, moved_bytes=moved, device_bytes=most)

    return min(((count, at(count)) for count in range(layers + 1)), key=lambda found: found[1].bound)


def most_alive(script: Script) -> int:
    """The most bytes of a step's tensors alive at once."""
    return max(accumulate((event.nbytes for event in script.steps[-1] if isinstance(event, Live)), initial=0))


def moved_out(script: Script) -> float:
    """Bytes of activations that one device moves out in a step, and in again."""
    blocks: dict[str, Block] = {}
    for event in (*script.setup, *(event for step in script.steps for event in step)):
        if isinstance(event, Create) and "activation" in event.block.bytes_by_kind:
            blocks[event.block.name] = event.block
    written = (event.name for event in script.steps[-1] if isinstance(event, Touched) and event.what == "fresh")
    return sum(blocks[name].nbytes for name in written if name in blocks)


def seconds_of(
    machine: Machine, whole: Callable[[Callable[[Script], float]], float], weights: int, state: int, activations: int
) -> dict[str, float]:
    """Of compute, of each device's own link or what all together are limited to, and of the disk."""

    def spent(lane: str) -> float:
        return whole(lambda script: sum(e.seconds for e in script.steps[-1] if isinstance(e, Spend) and e.lane == lane))

    count, link = machine.compute.count, machine.link("host", "device")
    most = inf if link.shared is None else machine.limit(link.shared)
    bus = min(count * link.bytes_per_second, most)
    disk = machine.limit("disk")
    room = SPARED * machine.capacity("host") - activations
    away = max(weights + state - max(room, 0.0), 0.0) / (weights + state)
    moved = away * ((READ + WRITTEN) * weights + 2 * state) + 2 * max(-room, 0.0)
    return {
        "compute": spent("compute") + spent("update") / count,
        "bus": max(READ * weights + state + activations, WRITTEN * weights + state + activations) / bus,
        "disk": moved / disk,
    }


def line(row: Row) -> str:
    machine = in_half_precision(find_machine(row.machine))
    rest = SPARED * machine.capacity("host") + machine.capacity("disk") / 2  # a block on disk has two extents

    def fits(found: Found) -> bool:
        return found.device_bytes <= machine.capacity("device") and found.state_bytes + found.moved_bytes <= rest

    job = task_of(row, row.layers).job
    tried = {what: find(row, machine, how, job) for what, how in WAYS.items()}
    count, best = mixed(tried["inputs moved"], tried["all moved"], row.layers)
    tried["mixed"] = best
    what, found = min(tried.items(), key=lambda one: (not fits(one[1]), one[1].bound))
    room = machine.capacity("device") - found.device_bytes
    cells = [
        row.who,
        f"`{row.machine}`",
        f"{found.parameters / 1e9:,.0f} B, {row.batch} x {row.tokens}",
        what if fits(found) else "does not fit",
        f"{found.device_bytes / 2**30:.1f} GiB",
        f"{max(room, 0) / 2e9:.1f} B" if machine.compute.count == 1 else "",
        f"{rest / found.state_bytes * found.parameters / 1e9:,.0f} B",
        *(f"{each.bound:.1f} ({each.slowest})" for each in tried.values()),
        f"{count} of {row.layers}",
        row.published,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose paper or machine has this in its name")
    only = parser.parse_args().only
    print(
        "| who | machine | model, batch x sequence | the fastest that fits | on a device | weights on it | state "
        "| s/step at least, recomputed | inputs moved | all moved | the best of both | layers moved | published |"
    )
    print("|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for row in ROWS:
        if only in row.who or only in row.machine:
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
