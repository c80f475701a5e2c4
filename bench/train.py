"""Full fine-tuning side by side: plain PyTorch, DeepSpeed, Outsize, and what bounds them all, each in its own process.

python bench/train.py                      all groups but `soak`; writes docs/benchmarks.md and its chart
python bench/train.py smollm2 --steps 5    some groups
python bench/train.py soak                 1,000 steps of a tiny model: memory and open files must stay flat
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shapes import LLAMA, SMOLLM2, TINY, Shape, stack
from table import write_page

from outsize.machine.environment import settings

HERE = Path(__file__).parent
GIB = 1 << 30
STREAMED = {**settings(os.environ), "HF_HUB_OFFLINE": "1"}  # as the command `outsize` sets it

Results = dict[str, dict[str, Any]]


@dataclass
class Bench:
    """Runs configurations and keeps what they say, by name, in `file` too. `folder` is scratch space on the disk under
    test."""

    folder: Path
    steps: int
    results: Results = field(default_factory=dict)
    file: str = "results.json"
    without_deepspeed: bool = False

    def recall(self) -> None:
        """Know what an earlier run has measured; what came to no result is tried again."""
        known = self.folder / self.file
        found = json.loads(known.read_text()) if known.exists() else {}
        self.results = {name: result for name, result in found.items() if not {"failed", "skipped"} & result.keys()}

    def measure(
        self, name: str, module: str, function: str, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        """Run `module.function(**options)` in a new process; what it returns, or why it did not, becomes a result. What
        is known already stays."""
        if name in self.results:
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, str(HERE / "child.py"), module, function, json.dumps(options)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
        ) as run:
            try:
                lines = run.communicate()[0].splitlines()
            except KeyboardInterrupt:  # which the process has heard too: it tidies up
                run.wait()
                raise
        found = json.loads(lines[-1]) if lines and not run.returncode else {"failed": f"exit code {run.returncode}"}
        self.results[name] = {"options": options, **found}
        print(f"    {json.dumps(found)}", file=sys.stderr, flush=True)
        (self.folder / self.file).write_text(json.dumps(self.results, indent=1))

    def prepare(self, shape: Shape) -> str:
        place = self.folder / shape.name.replace(" ", "-").replace(",", "")
        place.mkdir(parents=True, exist_ok=True)
        self.measure(f"{shape.name}: prepare", "streamed", "prepare", place=str(place), shape=shape.name)
        return str(place)

    def streamed(self, shape: Shape, place: str, budget: float, note: str = "", **options: Any) -> str:
        """Outsize within `budget` GiB. Returns the result's name."""
        name = f"{shape.name}: Outsize {budget:g} GiB{note}"
        settings = {"steps": self.steps, **options}
        self.measure(name, "streamed", "train", STREAMED, place=place, memory=int(budget * GIB), **settings)
        return name

    def beside_disk(self, shape: Shape, place: str, budget: float, note: str = "", throttled: bool = False) -> str:
        """As `streamed`, and right after it the bytes that it has moved a step, alone: the disk of a virtual machine is
        another one ten minutes later."""
        name = self.streamed(shape, place, budget, note, throttled=throttled)
        moved = self.results[name]
        if "bytes_read" in moved:
            amounts = {"read": int(moved["bytes_read"]), "written": int(moved["bytes_written"])}
            options = {"place": str(self.folder), "steps": 3, "throttled": throttled, **amounts}
            alone = f"{shape.name}: disk alone, after {name.partition(': ')[2]}"
            self.measure(alone, "floors", "disk", STREAMED, **options)
        return name

    def deepspeed(self, shape: Shape, place: str, steps: int) -> None:
        name = f"{shape.name}: DeepSpeed ZeRO-3"
        if self.without_deepspeed:
            self.results.setdefault(name, {"skipped": "left out"})
        else:
            self.measure(name, "zero3", "train", place=place, shape=shape.name, steps=steps)

    def together(self, shape: Shape, streamed: str, note: str = "", **options: Any) -> None:
        """The bytes that a streamed run has moved a step beside the step's arithmetic."""
        moved = self.results[streamed]
        if "bytes_read" in moved:
            amounts = {"read": int(moved["bytes_read"]), "written": int(moved["bytes_written"])}
            settings = {"place": str(self.folder), "shape": shape.name, "steps": 4, **amounts, **options}
            self.measure(f"{shape.name}: compute and disk at once{note}", "floors", "together", STREAMED, **settings)


def smollm2(bench: Bench, plain_large: bool) -> None:
    """All in memory against the plain loop, and everything on disk."""
    place = bench.prepare(SMOLLM2)
    for recompute in (False, True):
        note = ", checkpointing" if recompute else ""
        options = {"shape": SMOLLM2.name, "steps": bench.steps, "recompute": recompute}
        bench.measure(f"{SMOLLM2.name}: plain{note}", "plain", "train", **options)
        bench.measure(f"{SMOLLM2.name}: compute alone{note}", "floors", "compute", STREAMED, **options)
    bench.streamed(SMOLLM2, place, 4, ", all near", activations="keep")
    bench.streamed(SMOLLM2, place, 4, ", all near, checkpointing", activations="recompute")
    bench.beside_disk(SMOLLM2, place, 1)
    bench.beside_disk(SMOLLM2, place, 0.8)
    bench.beside_disk(SMOLLM2, place, 0.8, ", throttled", throttled=True)
    bench.deepspeed(SMOLLM2, place, bench.steps)


def llama(bench: Bench, plain_large: bool) -> None:
    """A model whose training state is twenty times the smallest budget."""
    place = bench.prepare(LLAMA)
    options = {"shape": LLAMA.name, "recompute": True}
    bench.measure(f"{LLAMA.name}: compute alone", "floors", "compute", STREAMED, steps=bench.steps - 1, **options)
    bench.beside_disk(LLAMA, place, 1.2)
    streamed = bench.beside_disk(LLAMA, place, 1.6)
    bench.together(LLAMA, streamed)
    bench.beside_disk(LLAMA, place, 1.6, ", throttled", throttled=True)
    bench.together(LLAMA, streamed, ", throttled", throttled=True)
    bench.deepspeed(LLAMA, place, 4)
    if plain_large:
        bench.measure(f"{LLAMA.name}: plain, checkpointing", "plain", "train", steps=4, **options)


def accumulate(bench: Bench, plain_large: bool) -> None:
    """Eight micro-batches a step: as much traffic as one. What they leave behind takes 0.4 GiB of the budget."""
    place = bench.prepare(LLAMA)
    options = {"shape": LLAMA.name, "recompute": True, "accumulate": 8}
    bench.measure(f"{LLAMA.name}: compute alone, 8 x 512", "floors", "compute", STREAMED, steps=3, **options)
    streamed = bench.streamed(LLAMA, place, 2.5, ", 8 x 512", accumulate=8, steps=4)
    bench.together(LLAMA, streamed, ", 8 x 512", accumulate=8, steps=3)
    bench.streamed(LLAMA, place, 4, ", 8 x 512", accumulate=8, steps=4)


def layers(bench: Bench, plain_large: bool) -> None:
    """The same width, more and more layers, one budget."""
    for count in (12, 24, 48):
        shape = stack(count)
        bench.streamed(shape, bench.prepare(shape), 0.9, steps=5)


def soak(bench: Bench, plain_large: bool) -> None:
    """Many steps of a model whose state does not fit the budget: nothing may grow."""
    bench.streamed(TINY, bench.prepare(TINY), 0.62, steps=1000, sequence_length=64)


GROUPS: dict[str, Callable[[Bench, bool], None]] = {
    "smollm2": smollm2,
    "llama": llama,
    "accumulate": accumulate,
    "layers": layers,
    "soak": soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure; all but soak")
    parser.add_argument("--steps", type=int, default=8, help="of each configuration; the first two are not counted")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep what an earlier run has measured")
    parser.add_argument("--plain-large", action="store_true", help="also the plain 1.3 B loop, which takes 22 GiB")
    parser.add_argument("--without-deepspeed", action="store_true", help="leave it out; its lines take the longest")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder.resolve(), arguments.steps, without_deepspeed=arguments.without_deepspeed)
    if arguments.go_on:
        bench.recall()
    chosen = arguments.groups or [name for name in GROUPS if name != "soak"]
    for name in chosen:
        GROUPS[name](bench, arguments.plain_large)
    command = " ".join(["python", "bench/train.py", *sys.argv[1:]])
    if chosen == ["soak"]:
        print(json.dumps(bench.results, indent=1))
    else:
        write_page(bench.results, arguments.page, command, bench.folder)


if __name__ == "__main__":
    main()
