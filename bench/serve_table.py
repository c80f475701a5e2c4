"""The part of docs/benchmarks.md about serving, from results by name."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from table import describe_machine

BEGIN, END = "<!-- begin: written by bench/serve.py -->", "<!-- end: bench/serve.py -->"
HEAD = """# Serving

Each line of the second table is a process of its own; *near* is the part of the weights that stay in memory, and the
disk's *roofline* what a step reads, read alone right after it, by turns. transformers answers in a process of its own too,
by turns with Outsize.
"""
FEWER_BITS = ("int8", "int4")
RESIDENT = {
    "b1": ("decoding, 1 sequence", 1.9),
    "b8": ("decoding, 8", 2.3),
    "b32": ("decoding, 32", 3.1),
    "reading": ("reading a prompt of 512", 1.4),
    "mixed": ("32 mixed requests, in and out", 4.0),
}
IN_CGROUP = {
    "cgroup": "Outsize, in the cgroup",
    **{f"cgroup, {weights}": f"Outsize, {weights} (approximate), in the cgroup" for weights in FEWER_BITS},
    "llama.cpp": "llama.cpp, mapped file, in the cgroup",
    "accelerate": "accelerate, disk, in the cgroup",
    "airllm": "airllm, in the cgroup",
}

Results = dict[str, dict[str, Any]]


def write_part(results: Results, page: Path | None, command: str, folder: Path) -> None:
    """Print it, and put it between its markers in `page`."""
    body = "\n".join(_lines(results, f"`{command}`, {date.today()}: {describe_machine(folder)}."))
    print(body)
    if page is not None:
        text = page.read_text()
        if BEGIN not in text:
            text += f"\n{HEAD}\n{BEGIN}\n{END}\n"
        before, rest = text.split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}")


def _lines(results: Results, title: str) -> Iterator[str]:
    yield title
    yield "\n## SmolLM2-135M in bf16, all resident\n"
    yield "| tokens/s | Outsize | transformers | ratio |\n|---|---:|---:|---:|"
    for run, how in (
        ("resident", ""),
        *((f"resident, {weights}", f"{weights} (approximate): ") for weights in FEWER_BITS),
    ):
        found = results.get(run, {})
        for key, (what, _) in RESIDENT.items():
            if key in found:
                ours, theirs = found[key]
                yield f"| {how}{what} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |"
    if "stored" in (loss := results.get("losses", {})):
        tokens = loss["options"]["tokens"]
        others = "".join(f", as {weights} {loss[weights]:.4f}" for weights in FEWER_BITS if weights in loss)
        yield f"\nMean loss of {tokens:,} tokens of Python's documentation: {loss['stored']:.4f}{others}."
    yield "\n## Past memory\n"
    yield from _shape(results)
    yield "| tokens/s | near | batch 1 | 8 | 32 | GB read a step | peak GiB, planned | measured |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, row in results.items():
        if name in IN_CGROUP or "near" in row:
            yield _past_row(name, row)
    yield "\n## Conversations of 3 turns, keys and values near for a quarter of them\n"
    yield "| | seconds | new tokens/s | preemptions |\n|---|---:|---:|---:|"
    for name, row in _talks(results).items():
        rate = row["new_tokens"] / row["seconds"]
        yield f"| {name.partition(', ')[2]} | {row['seconds']:.1f} | {rate:.0f} | {row['preemptions']} |"
    yield "\n## Targets\n"
    yield "| | at least | measured | |\n|---|---:|---:|---|"
    for what, target, measured in _targets(results):
        yield f"| {what} | {target:.3g} | {measured:.3g} | {'reached' if measured >= target else '**missed**'} |"
    for what, how in (("conversations", "32 in bf16"), ("in float32", "8 in float32")):
        said = {row["said"] for name, row in results.items() if name.startswith(what) and "said" in row}
        if said:
            same = "the same tokens" if len(said) == 1 else "**other** tokens"
            yield f"\nConversations, moved or computed again, {how}: {same}."


def _shape(results: Results) -> Iterator[str]:
    options = results.get("cgroup", {}).get("options")
    if options is not None:
        model, limit = Path(options["place"]).name, options["limit"]
        yield f"{model} in bf16, random weights; the memory cgroup has {limit / 1e6:,.0f} MB.\n"


def _past_row(name: str, row: dict[str, Any]) -> str:
    what = IN_CGROUP.get(name, f"Outsize, {name}")
    reason = row.get("skipped", row.get("failed"))
    if reason is not None:
        return f"| {what} | {'skipped' if 'skipped' in row else 'failed'}: {reason.splitlines()[0][:120]} |||||||"
    cells = [
        what,
        f"{row['near']:.0%}" if "near" in row else "",
        *(f"{row[key]:.2f}" if key in row else "" for key in ("b1", "b8", "b32")),
        f"{row['bytes_read'] / 1e9:.2f}" if "bytes_read" in row else "",
        f"{row['planned_peak_bytes'] / 2**30:.2f}" if "planned_peak_bytes" in row else "",
        f"{row['peak_bytes'] / 2**30:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _talks(results: Results) -> Results:
    return {name: row for name, row in results.items() if name.startswith("conversations") and "seconds" in row}


def _targets(results: Results) -> Iterator[tuple[str, float, float]]:
    """(what, at least, measured) for everything that was measured."""
    for key, (what, target) in RESIDENT.items():
        if key in results.get("resident", {}):
            ours, theirs = results["resident"][key]
            yield f"{what}: Outsize / transformers", target, ours / theirs
    cgroup = results.get("cgroup", {})
    if "b1" in cgroup:
        if "roofline" in cgroup:
            yield "in the cgroup, batch 1: share of the disk's roofline", 0.9, cgroup["roofline"]
        if "b1" in results.get("cgroup, int8", {}):
            yield "in the cgroup, batch 1: int8 / bf16, about twice", 1.9, results["cgroup, int8"]["b1"] / cgroup["b1"]
        yield "in the cgroup: batch 8 / batch 1", 7.5, cgroup["b8"] / cgroup["b1"]
        yield "in the cgroup: batch 32 / batch 1", 28, cgroup["b32"] / cgroup["b1"]
        for name, target in (("llama.cpp", 1.6), ("accelerate", 1.8), ("airllm", 7)):
            if "b1" in results.get(name, {}):
                yield f"in the cgroup, batch 1: Outsize / {name}", target, cgroup["b1"] / results[name]["b1"]
    talks = list(_talks(results).values())
    if len(talks) == 2:
        yield "conversations: moved / computed again", 2, talks[1]["seconds"] / talks[0]["seconds"]
