"""Prediction against measurement, over many jobs: `make foresight`, or python bench/foresight.py.

Probes the machine first. Each job is planned and run in a process of its own; docs/foresight.md gets the table.

python bench/foresight.py --only gpt2         those whose name has it; the table is printed, the page stays as it is
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from shapes import GPT2, QWEN3, SMOLLM2, WIDE, Shape, stack
from table import describe_machine
from train import GIB, HERE, STREAMED, Bench

BEGIN, END = "<!-- begin: written by bench/foresight.py -->", "<!-- end: written by bench/foresight.py -->"
OFF = {"peak": 0.05, "step": 0.15, "median step": 0.08}
"""How far measurement may be from prediction."""
LONGER = 1.35  # times the time of a token, at most, with four times as long a sequence in the memory of keep-all


KEPT = 3.5  # GiB, enough to keep everything of SmolLM2 over 2 x 512 tokens


@dataclass(frozen=True)
class Case:
    """A job: `shape` within `memory` GiB, other settings as `outsize train` has them."""

    shape: Shape
    memory: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = [f"{key.replace('_length', '')} {value}" for key, value in self.settings.items()]
        return ", ".join([f"{self.shape.name}: {self.memory:g} GiB", *told])


def tokens(count: int, **more: Any) -> dict[str, Any]:
    return {"sequence_length": count, **more}


CASES = [
    *(Case(SMOLLM2, memory) for memory in (0.8, 1, 1.5, 3)),
    Case(SMOLLM2, 1, tokens(128)),
    Case(SMOLLM2, 1.5, tokens(2048)),
    Case(SMOLLM2, 3, tokens(4096)),
    Case(SMOLLM2, 1.2, tokens(512, accumulate=4)),
    Case(SMOLLM2, 1, tokens(512, clip=1.0)),
    Case(SMOLLM2, 1.5, tokens(512, precision="fp32")),
    Case(SMOLLM2, 4, tokens(512, precision="fp32", clip=1.0)),
    Case(SMOLLM2, 0.9, tokens(512, precision="bf16")),
    *(Case(WIDE, memory) for memory in (1.2, 2, 8)),
    Case(WIDE, 8, tokens(2048, clip=1.0)),
    Case(WIDE, 2.5, tokens(1024, accumulate=2)),
    Case(stack(4), 0.8),
    Case(stack(4), 0.9, tokens(1024, accumulate=2)),
    Case(stack(4), 3, tokens(4096)),
    Case(stack(12), 0.9, tokens(256)),
    Case(stack(12), 2, tokens(1024, activations="move")),
    Case(GPT2, 0.9),
    Case(GPT2, 1.2, tokens(1024, clip=1.0)),
    Case(GPT2, 3, tokens(512, precision="fp32")),
    Case(QWEN3, 0.9, tokens(256)),
    Case(QWEN3, 1.5, tokens(1024)),
    Case(QWEN3, 3.5, tokens(2048, accumulate=2, clip=1.0)),
]


def probe(path: Path, folder: Path) -> None:
    """Measure this machine into the file `path`, as a user does before planning."""
    command = [sys.executable, "-m", "outsize", "probe", "--directory", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OUTSIZE_MACHINE": str(path)}, stdout=subprocess.DEVNULL)


def off(found: dict[str, Any], what: str) -> float:
    """How much more was measured than was predicted, as a share."""
    return found["measured"][what] / found["planned"][what] - 1


def rows(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| job | peak, predicted | measured | | s/step, predicted | measured | | read, predicted = measured |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"
    for name, found in results.items():
        if "planned" not in found:
            yield f"| {name} | {found.get('failed', '?').splitlines()[0][:160]} |||||||"
            continue
        planned, measured = found["planned"], found["measured"]
        same = planned["bytes_read"] == measured["bytes_read"]
        peaks = (f"{each['host_peak_bytes'] / 2**20:.0f} MiB" for each in (planned, measured))
        seconds = (f"{each['seconds_per_step']:.2f}" for each in (planned, measured))
        read = f"{planned['bytes_read'] / 1e9:.2f} GB" + ("" if same else f", {measured['bytes_read'] / 1e9:.2f}")
        cells = [name, *peaks, _signed(off(found, "host_peak_bytes"))]
        cells += [*seconds, _signed(off(found, "seconds_per_step")), read]
        yield "| " + " | ".join(cells) + " |"


def _signed(share: float) -> str:
    return f"{share:+.1%}"


def verdicts(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What had to be reached, and whether it was."""
    done = [found for found in results.values() if "planned" in found]
    peaks = [off(found, "host_peak_bytes") for found in done]
    steps = [off(found, "seconds_per_step") for found in done]
    over = [f for f in done if f["measured"]["host_peak_bytes"] > f["options"]["memory"]]
    yield "| | goal | measured | |"
    yield "|---|---:|---:|---|"
    yield _verdict("largest error of a peak", OFF["peak"], max(map(abs, peaks)))
    yield _verdict("largest error of a step", OFF["step"], max(map(abs, steps)))
    yield _verdict("median error of a step", OFF["median step"], statistics.median(map(abs, steps)))
    yield f"| peaks above the budget | 0 of {len(done)} | {len(over)} | {'**missed**' if over else 'reached'} |"


def _verdict(what: str, goal: float, share: float) -> str:
    return f"| {what} | {goal:.0%} | {share:.1%} | {'reached' if share <= goal else '**missed**'} |"


def longer(bench: Bench, settings: dict[str, str]) -> str:
    """Four times as long a sequence in the memory of keeping everything, against keeping everything: a verdict."""
    place, found = bench.prepare(SMOLLM2), []
    for length, activations in ((512, "keep"), (4 * 512, "auto")):
        name = f"{SMOLLM2.name}: 2 x {length} tokens within {KEPT:g} GiB, {activations}"
        options = tokens(length, batch_size=2, activations=activations, memory=int(KEPT * GIB), steps=5)
        bench.measure(name, "streamed", "foretell", settings, place=place, **options)
        found.append(bench.results[name])
    if not all("measured" in each for each in found):
        return "| 4 x the sequence length | failed | | |"
    short, long = (each["measured"]["tokens_per_second"] for each in found)
    reached = "reached" if short / long <= LONGER else "**missed**"
    what = f"time of a token, 2 x 2048 against keeping all of 2 x 512, both within {KEPT:g} GiB"
    return f"| {what} | {LONGER} x | {short / long:.2f} x | {reached} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="of each job; the first two are not counted")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--only", help="jobs whose name has this in it")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "foresight.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder.resolve(), arguments.steps)
    machine = bench.folder / "machine.toml"
    probe(machine, bench.folder)
    settings = {**STREAMED, "OUTSIZE_MACHINE": str(machine)}
    cases = [case for case in CASES if arguments.only is None or arguments.only in case.name]
    for case in cases:
        place = bench.prepare(case.shape)
        options = {"memory": int(case.memory * GIB), "steps": arguments.steps, **case.settings}
        bench.measure(case.name, "streamed", "foretell", settings, place=place, **options)
    results = {case.name: bench.results[case.name] for case in cases}
    more = [longer(bench, settings)] if arguments.only is None else []
    table = "\n".join([*verdicts(results), *more, "", *rows(results)])
    if arguments.only is not None:
        print("\n".join([*verdicts(results), "", *rows(results)]))
        return
    command = " ".join(["python", "bench/foresight.py", *sys.argv[1:]])
    head = f"`{command}`, {date.today()}: {describe_machine(bench.folder)}.\n\n"
    before, rest = arguments.page.read_text().split(BEGIN)
    arguments.page.write_text(f"{before}{BEGIN}\n{head}{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
