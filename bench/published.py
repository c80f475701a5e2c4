"""What others have published of large models on small machines, beside what the planner finds: python bench/published.py

Prints the table of docs/foresight.md. The planner rehearses each step on fake tensors: what its tensors, leases and
buffers take of a device, how long its operations take at the described rates, what it moves. Steps are not played, for
training does not run on devices yet: a step's time here is the longest of compute and each link alone, a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

from outsize.machine.find import find_machine
from outsize.machine.machine import Machine, Rate
from outsize.plan import RECOMPUTE, Request
from outsize.planner.needs import LOOSE, pinned_peak
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import FEWEST, Rehearsed, homes, rehearse
from outsize.planner.script import Live, Script, Spend
from outsize.planner.training import Task, sample_batches

CONTEXT = 1 << 30  # bytes of a device that the driver and its libraries take; assumed
SPARED = 0.9  # of the host's memory may hold state; assumed
VOCABULARY = 51200
READ, WRITTEN = 2, 1  # times a step that a weight passes a link; state does once each way


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
    """Bytes on each device, of which `inputs` are what units leave there for backward; bytes of all state; and seconds of
    compute and of each link."""

    parameters: int
    device_bytes: int
    inputs: int
    state_bytes: int
    seconds: dict[str, float]


def in_half_precision(machine: Machine) -> Machine:
    """With the better of both 16-bit rates for bf16: a V100 trains in fp16, which moves the same bytes."""

    def better(rates: dict[str, Rate]) -> dict[str, Rate]:
        return rates | {"bf16": max(rates["bf16"], rates.get("fp16", rates["bf16"]), key=lambda rate: rate.best)}

    processors = (replace(each, matmul=tuple(better(dict(each.matmul)).items())) for each in machine.processors)
    return replace(machine, processors=tuple(processors))


def find(row: Row, machine: Machine) -> Found:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from outsize.model.units import find_units
    from outsize.train.recipe import rule_of

    config = AutoConfig.for_model(
        "gpt2",
        n_layer=row.layers,
        n_embd=row.hidden,
        n_head=row.hidden // 128,
        n_positions=row.tokens,
        vocab_size=VOCABULARY,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    request = Request(1 << 60, row.tokens, row.batch, activations="recompute")
    rule, units = rule_of("adamw", {}), find_units(model)
    job = Task(model, units, rule, request).job
    plan = job.plan(request, tuple((unit.name, RECOMPUTE) for unit in units if unit.repeated))
    rehearsed = rehearse(model, plan, rule, RatedPrices(machine), sample_batches(model, request))
    held = LOOSE * pinned_peak(rehearsed.script, homes(plan, job.always))
    held += sum(job.sizes[name].bytes + job.sizes[name].state_bytes for name in job.always)
    state = sum(size.state_bytes for size in job.sizes.values())
    weights = sum(size.bytes for size in job.sizes.values())
    alive, count = over_units(rehearsed, most_alive), len(rehearsed.units)
    return Found(
        sum(size.weight.numel for size in job.sizes.values()),
        int(held + alive) + CONTEXT,
        int((alive - most_alive(rehearsed.over(rehearsed.units[:FEWEST]))) * (count - 2) / (count - FEWEST)),
        weights + state,
        _seconds(machine, rehearsed, weights, state),
    )


def most_alive(script: Script) -> int:
    """The most bytes of a step's tensors alive at once."""
    return max(accumulate((event.nbytes for event in script.steps[-1] if isinstance(event, Live)), initial=0))


def over_units(rehearsed: Rehearsed, of: Callable[[Script], float]) -> float:
    """`of(script)` for all units, from six and twelve of them."""
    few, many = (of(rehearsed.over(rehearsed.units[:count])) for count in (FEWEST, 2 * FEWEST))
    return few + (many - few) * (len(rehearsed.units) - FEWEST) / FEWEST


def _seconds(machine: Machine, rehearsed: Rehearsed, weights: int, state: int) -> dict[str, float]:
    def spent(lane: str, script: Script) -> float:
        return sum(event.seconds for event in script.steps[-1] if isinstance(event, Spend) and event.lane == lane)

    count, link = machine.compute.count, machine.link("host", "device")
    most = inf if link.shared is None else machine.limit(link.shared)
    bus = min(count * link.bytes_per_second, most)
    disk = machine.limit("disk")
    away = max(weights + state - SPARED * machine.capacity("host"), 0.0) / (weights + state)
    moved = (READ + WRITTEN) * weights + 2 * state
    update = over_units(rehearsed, lambda script: spent("update", script)) / count
    return {
        "compute": over_units(rehearsed, lambda script: spent("compute", script)) + update,
        "bus": max(READ * weights + state, WRITTEN * weights + state) / bus,
        "disk": away * moved / disk,
    }


def line(row: Row) -> str:
    machine = in_half_precision(find_machine(row.machine))
    found = find(row, machine)
    room = machine.capacity("device") - found.device_bytes
    fits = "yes" if room >= 0 else "with inputs moved" if room + found.inputs >= 0 else "no"
    rest = SPARED * machine.capacity("host") + machine.capacity("disk") / 2  # a block on disk has two extents
    longest = max(found.seconds, key=lambda name: found.seconds[name])
    cells = [
        row.who,
        f"`{row.machine}`",
        f"{found.parameters / 1e9:,.0f} B, {row.batch} x {row.tokens}",
        row.published,
        fits if found.state_bytes <= rest else "no",
        f"{found.device_bytes / 2**30:.1f} ({found.inputs / 2**30:.1f}) GiB",
        f"{max(room, 0) / 2e9:.1f} B" if machine.compute.count == 1 else "",
        f"{rest / found.state_bytes * found.parameters / 1e9:,.0f} B",
        f"{found.seconds[longest]:.1f} ({longest})",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    print(
        "| who | machine | model | published | fits | on a device (inputs) | weights on it up to | state up to "
        "| s/step at least |"
    )
    print("|---|---|---|---|---|---:|---:|---:|---:|")
    for row in ROWS:
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
