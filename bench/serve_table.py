"""The part of docs/benchmarks.md about serving, from results by name."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from table import describe_machine

BEGIN, END = "<!-- begin: written by bench/serve.py -->", "<!-- end: bench/serve.py -->"
HEAD = """# Serving

Each line of the second table is a process of its own; *near* is the part of the weights that stay in memory, and the
disk's *roofline* what a step reads, read alone right after it. Lines in the cgroup were measured by turns, three times: rates
are medians, and so are the ratios of one turn. transformers answers in a process of its own, by turns with Outsize. *Without
attention*: Outsize where nobody attends, and keys and values are neither written nor read; the unchanged module's other
operations take that long whoever runs them.
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

ALONE = "cgroup", "b1"
IN_ONE_TURN = (  # what is said of it, at least, and the rates whose ratio it is
    (", batch 1: int8 / bf16, about twice", 1.9, ("cgroup, int8", "b1"), ALONE),
    (": batch 8 / batch 1", 7.5, ("cgroup", "b8"), ALONE),
    (": batch 32 / batch 1", 28, ("cgroup", "b32"), ALONE),
    (", batch 1: Outsize / llama.cpp", 1.6, ALONE, ("llama.cpp", "b1")),
    (", batch 1: Outsize / accelerate", 1.8, ALONE, ("accelerate", "b1")),
    (", batch 1: Outsize / airllm", 7, ALONE, ("airllm", "b1")),
)
TURN = ", turn "
Results = dict[str, dict[str, Any]]


def in_turn(name: str, turn: int) -> str:
    """What the result of a configuration that is measured several times is called."""
    return f"{name}{TURN}{turn + 1}"


def medians(results: Results) -> Results:
    """Each configuration once: of several turns the medians of what is numbers; of what has failed or was skipped, why."""
    turns: dict[str, list[dict[str, Any]]] = {}
    for name, row in results.items():
        turns.setdefault(name.partition(TURN)[0], []).append(row)
    return {name: rows[0] if len(rows) == 1 else _median(rows) for name, rows in turns.items()}


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if {"failed", "skipped"} & row.keys():
            return row
    return rows[0] | {
        key: statistics.median(row[key] for row in rows)
        for key, value in rows[0].items()
        if isinstance(value, int | float)
    }


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


def _lines(measured: Results, title: str) -> Iterator[str]:
    results = medians(measured)
    yield title
    yield "\n## SmolLM2-135M in bf16, all resident\n"
    yield "| tokens/s | Outsize | transformers | ratio | without attention |\n|---|---:|---:|---:|---:|"
    least = results.get("without attention", {})
    for run, how in (
        ("resident", ""),
        *((f"resident, {weights}", f"{weights} (approximate): ") for weights in FEWER_BITS),
    ):
        found = results.get(run, {})
        for key, (what, _) in RESIDENT.items():
            if key in found:
                ours, theirs = found[key]
                bound = f"{least[key]:.0f}" if key in least and not how else ""
                yield f"| {how}{what} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} | {bound} |"
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
    for what, target, found in _targets(results, measured):
        yield f"| {what} | {target:.3g} | {found:.3g} | {'reached' if found >= target else '**missed**'} |"
    for what, how in (("conversations", "32 in bf16"), ("in float32", "8 in float32")):
        said = [row["said"] for name, row in results.items() if name.startswith(what) and "said" in row]
        if said:
            same = "the same tokens" if len(set(said)) == 1 else "**other** tokens"
            yield f"\nConversations, moved, computed again or all near, {how}: {same}."


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


def _targets(results: Results, measured: Results) -> Iterator[tuple[str, float, float]]:
    """(what, at least, found) for everything that was measured: medians in `results`, each turn in `measured`."""
    for key, (what, target) in RESIDENT.items():
        if key in results.get("resident", {}):
            ours, theirs = results["resident"][key]
            yield f"{what}: Outsize / transformers", target, ours / theirs
    if "roofline" in results.get("cgroup", {}):
        yield "in the cgroup, batch 1: share of the disk's roofline", 0.9, results["cgroup"]["roofline"]
    for what, target, above, below in IN_ONE_TURN:
        found = list(_ratios(measured, above, below))
        if found:
            yield f"in the cgroup{what}", target, statistics.median(found)
    talks = _talks(results)
    moved, again = talks.get("conversations, moved"), talks.get("conversations, computed again")
    if moved is not None and again is not None:
        yield "conversations: moved / computed again", 2, again["seconds"] / moved["seconds"]


def _ratios(measured: Results, above: tuple[str, str], below: tuple[str, str]) -> Iterator[float]:
    """Of two rates, each (configuration, key), in each turn that has both."""
    for turn in range(len(measured)):
        rows = [measured.get(in_turn(name, turn), {}) for name, _ in (above, below)]
        if above[1] in rows[0] and below[1] in rows[1]:
            yield rows[0][above[1]] / rows[1][below[1]]
