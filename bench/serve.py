"""Serving side by side: past memory in a memory cgroup, all resident beside transformers, and conversations that do not
fit. Each configuration runs in its own process; what counts are ratios of one run.

python bench/serve.py                      everything; writes its part of docs/benchmarks.md
python bench/serve.py resident             some groups
python bench/serve.py past --continue      what an earlier run has measured stays; for a run in portions
python bench/serve.py --small              the same with small models, in two minutes: that it works, not how fast

Beside Outsize stand accelerate and llama.cpp (`pip install .[bench]`), and airllm if it is in a folder of its own, as it
brings along what transformers would import: `pip install --no-deps --target build/bench/airllm airllm scipy sentencepiece`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve_table import FEWER_BITS, in_turn, write_part
from shapes import LLAMA, TINY, Shape, stack
from train import HERE, STREAMED, Bench

BATCHES = [1, 8, 32]


@dataclass(frozen=True)
class Trial:
    """How large everything is: `limit` bytes of the memory cgroup, `budget` of Outsize within it (what the page cache
    holds of libraries is charged to the cgroup too), `curve` budgets in GiB from all weights near to a quarter of them,
    `offloaded` bytes of weights that accelerate may keep."""

    shape: Shape
    limit: int
    budget: int
    curve: tuple[float, ...]
    offloaded: int
    rounds: int = 3  # by turns
    new: int = 64  # tokens of the resident model
    talks: int = 32


FULL = Trial(LLAMA, 1_500_000_000, 1_400_000_000, (3.6, 2.9, 2.3, 1.7, 1.2), 600_000_000)
SMALL = Trial(stack(12), 1_000_000_000, 850_000_000, (1.5, 0.8), 150_000_000, rounds=1, new=24, talks=8)


def resident(bench: Bench, trial: Trial, model: str) -> None:
    options = {"memory": 3 << 30, "batches": BATCHES, "new": trial.new, "rounds": trial.rounds}
    bench.measure("resident", "served", "resident", STREAMED, model=model, **options)
    bench.measure("without attention", "served", "without_attention", STREAMED, model=model, **options)
    for weights in FEWER_BITS:
        bench.measure(f"resident, {weights}", "served", "resident", STREAMED, model=model, weights=weights, **options)
    bench.measure("losses", "served", "losses", model=model, tokens=32 * 512)


def past(bench: Bench, trial: Trial, model: str) -> None:
    """Everybody in the cgroup by turns, as the disk of a virtual machine is another one ten minutes later."""
    place = bench.prepare(trial.shape)
    bench.measure("gguf", "to_gguf", "write", place=place)
    apart = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{bench.folder / 'airllm'}"}
    ours = {"memory": trial.budget, "batches": BATCHES, "new": 12}
    for turn in range(trial.rounds):
        within = {"place": place, "limit": trial.limit}
        bench.measure(in_turn("cgroup", turn), "served", "streamed", STREAMED, **ours, **within)
        bench.measure(in_turn("llama.cpp", turn), "rivals", "llama_cpp", batches=[1, 8], new=5, **within)
        offloaded = {"memory": trial.offloaded, "batches": [1, 8], "new": 4, **within}
        bench.measure(in_turn("accelerate", turn), "rivals", "accelerate", **offloaded)
        bench.measure(in_turn("airllm", turn), "rivals", "airllm", apart, batches=[1], new=3, **within)
        for weights in FEWER_BITS:
            name = in_turn(f"cgroup, {weights}", turn)
            bench.measure(name, "served", "streamed", STREAMED, weights=weights, **ours, **within)
    for budget in trial.curve:
        memory = int(budget * 2**30)
        options = {"place": place, "memory": memory, "batches": [1, 8], "new": 12}
        bench.measure(f"{budget} GiB", "served", "streamed", STREAMED, **options)


def conversations(bench: Bench, trial: Trial, model: str) -> None:
    exact = str(bench.folder / "float32")
    bench.measure("float32", "served", "write_float32", model=model, folder=exact)
    for what, of, count in (("conversations", model, trial.talks), ("in float32", exact, 8)):
        options = {"memory": 3 << 30, "count": count, "room": count // 4, "turns": 3}
        for name, how in (
            ("moved", {}),
            ("computed again", {"far": False}),
            ("all near, no more at once", {"near": True}),
        ):
            bench.measure(f"{what}, {name}", "served", "conversations", STREAMED, model=of, **options, **how)


GROUPS: dict[str, Callable[[Bench, Trial, str], None]] = {
    "resident": resident,
    "past": past,
    "conversations": conversations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure; all by default")
    parser.add_argument("--model", default="build/smollm2.gguf", help="SmolLM2-135M")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--continue", dest="go_on", action="store_true", help="keep what an earlier run has measured")
    parser.add_argument("--small", action="store_true", help="small models and few tokens; writes no page")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder.resolve(), 0, file="serving-small.json" if arguments.small else "serving.json")
    if arguments.go_on:
        bench.recall()
    model = f"{bench.prepare(TINY)}/model" if arguments.small else arguments.model
    for name in arguments.groups or GROUPS:
        GROUPS[name](bench, SMALL if arguments.small else FULL, model)
    command = " ".join(["python", "bench/serve.py", *sys.argv[1:]])
    write_part(bench.results, None if arguments.small else arguments.page, command, bench.folder)


if __name__ == "__main__":
    main()
