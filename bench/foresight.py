"""Prediction against measurement, over many jobs: `make foresight`, or python bench/foresight.py.

A round probes the machine, then plans and runs each job in a process of its own, which takes up to a minute and a half.
Of several rounds each job's middle one counts, as others use this machine's processor and disk too. What is found is
kept in foresight.json in the folder, and done jobs are not done again: remove the file to begin anew. Then
docs/foresight.md gets the table, of as many jobs as are done.

python bench/foresight.py --rounds 1          some forty minutes
python bench/foresight.py --minutes 7         a portion: after so long no further job begins
python bench/foresight.py --only GPT-2        those whose name has it; the table is printed, the page stays as it is
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
Found = dict[str, Any]
Results = dict[str, list[Found]]  # of each job, in each round that it was done


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


def off(found: Found, what: str) -> float:
    """How much more was measured than was predicted, as a share."""
    return found["measured"][what] / found["planned"][what] - 1


def step_off(found: Found) -> float:
    return off(found, "seconds_per_step")


def measured_ones(rounds: list[Found]) -> list[Found]:
    return [found for found in rounds if "planned" in found]


def middle(rounds: list[Found]) -> Found:
    """The round whose step is neither the fastest nor the slowest, compared with its plan; of two the one that is farther
    off."""
    ordered = sorted(rounds, key=step_off)
    return max(ordered[(len(rounds) - 1) // 2 : len(rounds) // 2 + 1], key=lambda found: abs(step_off(found)))


def rows(results: Results) -> Iterator[str]:
    yield (
        "| job | peak, predicted | measured | | s/step, predicted | measured | | all rounds | read, predicted = measured "
        "| its bytes alone, to the probe |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---|---|---:|"
    for name, rounds in results.items():
        if not (measured := measured_ones(rounds)):
            yield f"| {name} | {rounds[0]['failed'][:160].replace(chr(10), ' ')} |||||||||"
            continue
        found = middle(measured)
        planned, then = found["planned"], found["measured"]
        same = planned["bytes_read"] == then["bytes_read"]
        peaks = (f"{each['host_peak_bytes'] / 2**20:.0f} MiB" for each in (planned, then))
        seconds = (f"{each['seconds_per_step']:.2f}" for each in (planned, then))
        read = f"{planned['bytes_read'] / 1e9:.2f} GB" + ("" if same else f", {then['bytes_read'] / 1e9:.2f}")
        cells = [name, *peaks, _signed(off(found, "host_peak_bytes"))]
        drift = found.get("drift")
        cells += [*seconds, _signed(step_off(found)), ", ".join(_signed(step_off(each)) for each in measured), read]
        cells += ["" if drift is None else _signed(drift)]
        yield "| " + " | ".join(cells) + " |"


def _signed(share: float) -> str:
    return f"{share:+.1%}"


def verdicts(results: Results) -> Iterator[str]:
    """What had to be reached, and whether it was: of a step by the middle round of each job, of memory by all rounds."""
    done = [measured for rounds in results.values() if (measured := measured_ones(rounds))]
    if not done:
        return
    every = [found for rounds in done for found in rounds]
    failed = sum(map(len, results.values())) - len(every)
    peaks = [off(found, "host_peak_bytes") for found in every]
    steps = [abs(step_off(middle(rounds))) for rounds in done]
    over = [f for f in every if f["peak_bytes"] > f["options"]["memory"]]  # the report's pictures included
    yield "| | goal | measured | |"
    yield "|---|---:|---:|---|"
    yield f"| rounds that failed | 0 | {failed} | {'**missed**' if failed else 'reached'} |"
    yield _verdict("largest error of a peak, of all rounds", OFF["peak"], max(map(abs, peaks)))
    yield _verdict("largest error of a step, of middle rounds", OFF["step"], max(steps))
    yield _verdict("median error of a step, of middle rounds", OFF["median step"], statistics.median(steps))
    yield _late("rounds", every)
    even = [found for found in every if abs(found.get("drift", inf)) <= EVEN]
    if even:
        yield _late(f"rounds whose bytes alone took what the probe says, within {EVEN:.0%},", even)
    yield f"| peaks above the budget | 0 of {len(every)} | {len(over)} | {'**missed**' if over else 'reached'} |"


def _late(which: str, rounds: list[Found]) -> str:
    most = OFF["step"]
    errors = [abs(step_off(found)) for found in rounds]
    late = f"{sum(error > most for error in errors)} of {len(errors)}, up to {max(errors):.1%}"
    return f"| {which} in which a step is off by more than {most:.0%} | | {late} | |"


def _verdict(what: str, goal: float, share: float) -> str:
    return f"| {what} | {goal:.0%} | {share:.1%} | {'reached' if share <= goal else '**missed**'} |"


# Four times as long a sequence in the memory that keeping everything takes, against keeping everything.
SHORT = case(SMOLLM2, KEPT, 512, batch_size=2, activations="keep")


def longer(kept: Found) -> Case:
    """The job to compare with SHORT, of which `kept` is the result: the budget is what that has held at its peak."""
    memory = round(kept["measured"]["host_peak_bytes"] / GIB, 3)
    return case(SMOLLM2, memory, 2048, batch_size=2)


def stretched(pairs: list[tuple[Found, Found]]) -> Iterator[str]:
    """The longest in comparison, of all rounds in which both were measured."""
    rates = [[found["measured"]["tokens_per_second"] for found in pair] for pair in pairs]
    if rates:
        times = max(short / long for short, long in rates)
        reached = "reached" if times <= LONGER else "**missed**"
        what = "time of a token, 2 x 2048 tokens in the memory of 2 x 512 with all kept, against that"
        yield f"| {what} | {LONGER} x | {times:.2f} x | {reached} |"


class Round:
    """The machine probed, and jobs one after the other, while there is time."""

    def __init__(self, number: int, folder: Path, end: float) -> None:
        self.bench = Bench(folder, steps=0, file=KNOWN)
        self.bench.recall()
        self.end, self.note = end, f" (round {number})"
        machine = folder / f"machine-{number}.toml"
        if not machine.exists() and monotonic() < end:
            probe(machine, folder)
        self.settings = {**STREAMED, "OUTSIZE_MACHINE": str(machine)}

    def do(self, job: Case) -> Found | None:
        """What was found, now or before; None: there is no time left."""
        name = job.name + self.note
        if name not in self.bench.results:
            if monotonic() > self.end:
                return None
            place = self.bench.prepare(job.shape)
            self.bench.measure(name, "streamed", "foretell", self.settings, place=place, **job.options)
        found = self.bench.results[name]
        moved = found.get("measured", {})
        if not moved.get("bytes_written"):
            return found
        alone = f"{name}: its bytes alone"
        amounts = {"read": int(moved["bytes_read"]), "written": int(moved["bytes_written"])}
        self.bench.measure(alone, "floors", "disk", self.settings, place=str(self.bench.folder), steps=3, **amounts)
        return found | {"drift": self.bench.results[alone]["seconds"] / self._probed(**amounts) - 1}

    def pair(self) -> list[tuple[Found, Found]]:
        """A short sequence with all kept, and the long one in its memory, if there was time for both."""
        short = self.do(SHORT)
        long = self.do(longer(short)) if short is not None and "measured" in short else None
        return [(short, long)] if short is not None and long is not None and "measured" in long else []

    def _probed(self, read: int, written: int) -> float:
        """Seconds of so many bytes, by the disk's rates in the machine's file."""
        from outsize.machine.file import read_machine

        machine = read_machine(Path(self.settings["OUTSIZE_MACHINE"]))
        alone, out = (machine.link(*way).bytes_per_second for way in (("disk", "host"), ("host", "disk")))
        both = machine.limit("disk")
        return max(read - written, 0) / alone + 2 * min(read, written) / both + max(written - read, 0) / out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=inf, help="after so long no further job begins")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/foresight"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--only", help="jobs whose name has this in it")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "foresight.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    pages = [arguments.page, arguments.page.with_name("benchmarks.md")]
    assert all(BEGIN in page.read_text() for page in pages), f"{pages} have to have places for what is found"
    folder, end = arguments.folder.resolve(), monotonic() + 60 * arguments.minutes
    jobs = [job for job in CASES if arguments.only is None or arguments.only in job.name]
    results: Results = {}
    pairs: list[tuple[Found, Found]] = []
    for number in range(1, arguments.rounds + 1):
        turn = Round(number, folder, end)
        pairs += turn.pair() if arguments.only is None else []
        for job in jobs:
            if (found := turn.do(job)) is not None:
                results.setdefault(job.name, []).append(found)
    reached, each = "\n".join([*verdicts(results), *stretched(pairs)]), "\n".join(rows(results))
    if arguments.only is not None:
        print(reached, each, sep="\n\n")
        return
    done = f"{len(results)} of {len(CASES)} jobs are done, {sum(map(len, results.values()))} times in all"
    print(done, file=sys.stderr)
    head = f"`python bench/foresight.py`, {date.today()}: {describe_machine(folder)}. {done}.\n\n"
    put(pages[0], f"{head}{reached}\n\n{each}")
    put(pages[1], f"{head}{reached}")


def put(page: Path, text: str) -> None:
    """Between this bench's marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
