"""Prediction against measurement, over many jobs: `make foresight`, or python bench/foresight.py.

Probes the machine first. Each job is planned and run in a process of its own, and takes up to a minute and a half; what
is found is kept in foresight.json in the folder, and done jobs are not done again: remove the file to begin anew. Then
docs/foresight.md gets the table, of as many jobs as are done.

python bench/foresight.py --minutes 7         a portion: after so long no further job begins
python bench/foresight.py --only GPT-2        those whose name has it; the table is printed, the page stays as it is
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from shapes import GPT2, QWEN3, SMOLLM2, WIDE, Shape, stack
from table import describe_machine
from train import GIB, HERE, STREAMED, Bench

BEGIN, END = "<!-- begin: written by bench/foresight.py -->", "<!-- end: written by bench/foresight.py -->"
OFF = {"peak": 0.05, "step": 0.15, "median step": 0.08}
"""How far measurement may be from prediction."""
EVEN = 0.1
"""So much more or less than the probe says may the disk take for a step's bytes, to be called the disk that was probed."""
LONGER = 1.35  # times the time of a token, at most, with four times as long a sequence in the memory of keep-all
KEPT = 3.5  # GiB, enough to keep everything of SmolLM2 over 2 x 512 tokens
KNOWN = "foresight.json"


@dataclass(frozen=True)
class Case:
    """A job: `shape` within `memory` GiB, `length` tokens in a sequence, other settings as `outsize train` has them."""

    shape: Shape
    memory: float
    length: int = 512
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = [f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()]
        return ", ".join([f"{self.shape.name}: {self.memory:g} GiB", f"{self.length} tokens", *told])

    @property
    def options(self) -> dict[str, Any]:
        """As many steps as are done in a minute or so; the first two are not counted."""
        tokens = self.length * self.settings.get("accumulate", 1) * self.settings.get("batch_size", 1)
        steps = 8 if tokens <= 1024 else 6 if tokens <= 2048 else 5
        return {"memory": int(self.memory * GIB), "sequence_length": self.length, "steps": steps, **self.settings}


def case(shape: Shape, memory: float, length: int = 512, **settings: Any) -> Case:
    return Case(shape, memory, length, settings)


CASES = [
    *(case(SMOLLM2, memory) for memory in (0.8, 1, 1.5, 3)),
    case(SMOLLM2, 1, 128),
    case(SMOLLM2, 1.5, 2048),
    case(SMOLLM2, 1.2, accumulate=4),
    case(SMOLLM2, 1, clip=1.0),
    case(SMOLLM2, 1.5, precision="fp32"),
    case(SMOLLM2, 4, precision="fp32", clip=1.0),
    case(SMOLLM2, 0.9, precision="bf16"),
    *(case(WIDE, memory) for memory in (1.2, 2, 8)),
    case(WIDE, 8, 1024, clip=1.0),
    case(WIDE, 2.5, accumulate=2),
    case(stack(4), 0.8),
    case(stack(4), 0.9, 1024, accumulate=2),
    case(stack(4), 3, 4096),
    case(stack(12), 0.9, 256),
    case(stack(12), 2, 1024, activations="move"),
    case(GPT2, 0.9),
    case(GPT2, 1.2, 1024, clip=1.0),
    case(GPT2, 3, precision="fp32"),
    case(GPT2, 1.5, 128, precision="fp32", accumulate=4),
    case(QWEN3, 0.9, 256),
    case(QWEN3, 1.5, 1024),
    case(QWEN3, 3.5, 2048, accumulate=2, clip=1.0),
]


def probe(path: Path, folder: Path) -> None:
    """Measure this machine into the file `path`, as a user does before planning."""
    command = [sys.executable, "-m", "outsize", "probe", "--directory", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OUTSIZE_MACHINE": str(path)}, stdout=subprocess.DEVNULL)


def off(found: dict[str, Any], what: str) -> float:
    """How much more was measured than was predicted, as a share."""
    return found["measured"][what] / found["planned"][what] - 1


def rows(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield (
        "| job | peak, predicted | measured | | s/step, predicted | measured | | read, predicted = measured "
        "| its bytes alone, to the probe |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---|---:|"
    for name, found in results.items():
        if "planned" not in found:
            yield f"| {name} | {found['failed'][:160].replace(chr(10), ' ')} ||||||||"
            continue
        planned, measured = found["planned"], found["measured"]
        same = planned["bytes_read"] == measured["bytes_read"]
        peaks = (f"{each['host_peak_bytes'] / 2**20:.0f} MiB" for each in (planned, measured))
        seconds = (f"{each['seconds_per_step']:.2f}" for each in (planned, measured))
        read = f"{planned['bytes_read'] / 1e9:.2f} GB" + ("" if same else f", {measured['bytes_read'] / 1e9:.2f}")
        cells = [name, *peaks, _signed(off(found, "host_peak_bytes"))]
        drift = found.get("drift")
        cells += [*seconds, _signed(off(found, "seconds_per_step")), read, "" if drift is None else _signed(drift)]
        yield "| " + " | ".join(cells) + " |"


def _signed(share: float) -> str:
    return f"{share:+.1%}"


def verdicts(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What had to be reached, and whether it was."""
    done = [found for found in results.values() if "planned" in found]
    peaks = [off(found, "host_peak_bytes") for found in done]
    steps = [off(found, "seconds_per_step") for found in done]
    if not done:
        return
    over = [f for f in done if f["peak_bytes"] > f["options"]["memory"]]  # the report's pictures included
    yield "| | goal | measured | |"
    yield "|---|---:|---:|---|"
    yield _verdict("largest error of a peak", OFF["peak"], max(map(abs, peaks)))
    yield _verdict("largest error of a step", OFF["step"], max(map(abs, steps)))
    yield _verdict("median error of a step", OFF["median step"], statistics.median(map(abs, steps)))
    even = [step for found, step in zip(done, steps, strict=True) if abs(found.get("drift", inf)) <= EVEN]
    if even:
        what = f"largest error of the {len(even)} steps whose bytes alone took what the probe says, within {EVEN:.0%}"
        yield _verdict(what, OFF["step"], max(map(abs, even)))
    yield f"| peaks above the budget | 0 of {len(done)} | {len(over)} | {'**missed**' if over else 'reached'} |"


def _verdict(what: str, goal: float, share: float) -> str:
    return f"| {what} | {goal:.0%} | {share:.1%} | {'reached' if share <= goal else '**missed**'} |"


# Four times as long a sequence in the memory that keeping everything takes, against keeping everything.
SHORT = case(SMOLLM2, KEPT, 512, batch_size=2, activations="keep")


def longer(kept: dict[str, Any]) -> Case:
    """The job to compare with SHORT, of which `kept` is the result: the budget is what that has held at its peak."""
    memory = round(kept["measured"]["host_peak_bytes"] / GIB, 3)
    return case(SMOLLM2, memory, 2048, batch_size=2)


def stretched(short: dict[str, Any], long: dict[str, Any]) -> str:
    rates = [found["measured"]["tokens_per_second"] for found in (short, long)]
    times = rates[0] / rates[1]
    reached = "reached" if times <= LONGER else "**missed**"
    what = "time of a token, 2 x 2048 tokens in the memory of 2 x 512 with all kept, against that"
    return f"| {what} | {LONGER} x | {times:.2f} x | {reached} |"


class Portion:
    """Jobs one after the other, while there is time."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.bench = Bench(folder, steps=0, file=KNOWN)
        if (folder / KNOWN).exists():
            known = json.loads((folder / KNOWN).read_text())
            self.bench.results = {name: found for name, found in known.items() if "failed" not in found}
        self.end = monotonic() + 60 * minutes
        machine = folder / "machine.toml"
        if not machine.exists():
            probe(machine, folder)
        self.settings = {**STREAMED, "OUTSIZE_MACHINE": str(machine)}

    def do(self, job: Case) -> dict[str, Any] | None:
        """What was found, now or before; None: there is no time left."""
        if job.name not in self.bench.results:
            if monotonic() > self.end:
                return None
            place = self.bench.prepare(job.shape)
            self.bench.measure(job.name, "streamed", "foretell", self.settings, place=place, **job.options)
        found = self.bench.results[job.name]
        moved = found.get("measured", {})
        if not moved.get("bytes_written"):
            return found
        alone = f"{job.name}: its bytes alone"
        amounts = {"read": int(moved["bytes_read"]), "written": int(moved["bytes_written"])}
        self.bench.measure(alone, "floors", "disk", self.settings, place=str(self.bench.folder), steps=3, **amounts)
        return found | {"drift": self.bench.results[alone]["seconds"] / self._probed(**amounts) - 1}

    def _probed(self, read: int, written: int) -> float:
        """Seconds of so many bytes, by the disk's rates in the machine's file."""
        from outsize.machine.file import read_machine

        machine = read_machine(Path(self.settings["OUTSIZE_MACHINE"]))
        alone, out = (machine.link(*way).bytes_per_second for way in (("disk", "host"), ("host", "disk")))
        both = machine.limit("disk")
        return max(read - written, 0) / alone + 2 * min(read, written) / both + max(written - read, 0) / out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after so long no further job begins")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/foresight"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--only", help="jobs whose name has this in it")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "foresight.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    portion = Portion(arguments.folder.resolve(), arguments.minutes)
    jobs = [job for job in CASES if arguments.only is None or arguments.only in job.name]
    if arguments.only is not None:
        results = {job.name: found for job in jobs if (found := portion.do(job)) is not None}
        print("\n".join([*verdicts(results), "", *rows(results)]))
        return
    short = portion.do(SHORT)
    long = portion.do(longer(short)) if short is not None and "measured" in short else None
    results = {job.name: found for job in jobs if (found := portion.do(job)) is not None}
    more = [stretched(short, long)] if short is not None and long is not None and "measured" in long else []
    done = f"{len(results)} of {len(CASES)} jobs are done"
    print(done, file=sys.stderr)
    table = "\n".join([*verdicts(results), *more, "", *rows(results)])
    head = f"`python bench/foresight.py`, {date.today()}: {describe_machine(portion.bench.folder)}. {done}.\n\n"
    before, rest = arguments.page.read_text().split(BEGIN)
    arguments.page.write_text(f"{before}{BEGIN}\n{head}{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
