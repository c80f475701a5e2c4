"""Serving side by side: past memory in a memory cgroup, all resident beside transformers, and conversations that do not
fit. Each configuration runs in its own process; what counts are ratios of one run.

python bench/serve.py                    everything; writes its part of docs/benchmarks.md
python bench/serve.py resident           some groups
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from shapes import LLAMA
from table import describe_machine
from train import HERE, STREAMED, Bench

BEGIN, END = "<!-- begin: written by bench/serve.py -->", "<!-- end: bench/serve.py -->"
CGROUP = 1_500_000_000  # bytes
BUDGET = 1_350_000_000  # of Outsize within it: what the page cache holds of libraries is charged to the cgroup too
CURVE = (3.6, 2.9, 2.3, 1.7, 1.2)  # GiB, from all weights near to a quarter of them
BATCHES = [1, 8, 32]


def resident(bench: Bench, model: str) -> None:
    bench.measure(
        "resident", "served", "resident", STREAMED, model=model, memory=3 << 30, batches=BATCHES, new=64, rounds=3
    )


def past(bench: Bench, model: str) -> None:
    place = bench.prepare(LLAMA)
    options = {"place": place, "limit": CGROUP}
    bench.measure("cgroup", "served", "streamed", STREAMED, memory=BUDGET, batches=BATCHES, new=8, **options)
    read = int(bench.results["cgroup"].get("bytes_read", 0))
    if read:
        bench.measure("disk alone", "served", "disk", STREAMED, place=str(bench.folder), nbytes=read, rounds=5)
    bench.measure("accelerate", "served", "accelerate", STREAMED, memory=600_000_000, new=4, **options)
    for budget in CURVE:
        bench.measure(
            f"{budget} GiB",
            "served",
            "streamed",
            STREAMED,
            place=place,
            memory=int(budget * 2**30),
            batches=[1, 8],
            new=8,
        )


def conversations(bench: Bench, model: str) -> None:
    for name, far in (("moved", True), ("computed again", False)):
        options = {"memory": 3 << 30, "count": 32, "room": 8, "turns": 3, "far": far}
        bench.measure(f"conversations, {name}", "served", "conversations", STREAMED, model=model, **options)


GROUPS: dict[str, Callable[[Bench, str], None]] = {"resident": resident, "past": past, "conversations": conversations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="what to measure; all by default")
    parser.add_argument("--model", default="build/smollm2.gguf", help="SmolLM2-135M")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/bench"), help="scratch space, on the disk to measure"
    )
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder.resolve(), 0, file="serving.json")
    for name in arguments.groups or GROUPS:
        GROUPS[name](bench, arguments.model)
    command = " ".join(["python", "bench/serve.py", *sys.argv[1:]])
    body = "\n".join(lines(bench.results, f"`{command}`, {date.today()}: {describe_machine(bench.folder)}."))
    print(body)
    write_part(arguments.page, body)


def write_part(page: Path, body: str) -> None:
    text = page.read_text()
    if BEGIN not in text:
        text += f"\n# Serving\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}")


def lines(results: dict[str, dict[str, Any]], title: str) -> Iterator[str]:
    yield title + "\n"
    yield "## SmolLM2-135M in bf16, all resident\n"
    yield "| tokens/s | Outsize | transformers | ratio | target |\n|---|---:|---:|---:|---:|"
    found = results.get("resident", {})
    for key, what, target in (
        ("b1", "decoding, 1 sequence", 1.9),
        ("b8", "decoding, 8", 2.3),
        ("b32", "decoding, 32", 3.1),
        ("reading", "reading a prompt of 512", 1.4),
        ("mixed", "32 mixed requests, in and out", 4.0),
    ):
        if key in found:
            ours, theirs = found[key]
            yield f"| {what} | {ours:.0f} | {theirs:.0f} | {_reached(ours / theirs, target)} | {target} |"
    yield "\n## Llama 1.3B in bf16 (2.7 GB), past memory\n"
    yield "| tokens/s | weights near | batch 1 | 8 | 32 | GB read a step | of the disk's roofline | peak GiB |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, row in results.items():
        if "near" in row or name == "accelerate":
            yield _past_row(name, row, results)
    yield "\n## 32 conversations of 3 turns, keys and values near for 8\n"
    yield "| | seconds | new tokens/s | preemptions |\n|---|---:|---:|---:|"
    talks = {name: row for name, row in results.items() if name.startswith("conversations") and "seconds" in row}
    for name, row in talks.items():
        rate = row["new_tokens"] / row["seconds"]
        yield f"| {name.partition(', ')[2]} | {row['seconds']:.1f} | {rate:.0f} | {row['preemptions']} |"
    if len(talks) == 2:
        moved, computed = talks.values()
        same = "the same tokens" if moved["said"] == computed["said"] else "**other tokens**"
        yield f"\n{_reached(computed['seconds'] / moved['seconds'], 2.0)} times the throughput (target 2), {same}."


def _past_row(name: str, row: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    names = {"cgroup": "Outsize, cgroup of 1,500 MB", "accelerate": "accelerate, the same cgroup"}
    what = names.get(name, f"Outsize, {name}")
    if "b1" not in row:
        return f"| {what} | {(row.get('skipped') or row.get('failed') or '').splitlines()[0][:120]} ||||||"
    rates = [f"{row[key]:.2f}" if key in row else "" for key in ("b1", "b8", "b32")]
    disk, share = results.get("disk alone", {}), ""
    if name == "cgroup" and "seconds" in disk:
        share = f"{row['b1'] * disk['seconds']:.0%}"
    near = f"{row['near']:.0%}" if "near" in row else ""
    read = f"{row['bytes_read'] / 1e9:.2f}" if "bytes_read" in row else ""
    return f"| {what} | {near} | {' | '.join(rates)} | {read} | {share} | {row['peak_bytes'] / 2**30:.2f} |"


def _reached(ratio: float, target: float) -> str:
    return f"{ratio:.2f}" if ratio >= target else f"**{ratio:.2f}**"


if __name__ == "__main__":
    main()
