"""docs/benchmarks.md and its chart, from results by name ("SHAPE: WHAT")."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from shapes import LLAMA, SHAPES, SMOLLM2

BEGIN, END = "<!-- begin: written by bench/train.py -->", "<!-- end -->"
HEAD = """# Benchmarks

Full fine-tuning, sequence 512, AdamW, fp32 master weights and bf16 compute, random weights, Python's own
documentation as text. Everything below was measured in one run, each line in a process of its own: seconds are the
median step, the peak is the process's highest resident memory, interpreter and libraries included. Compare ratios:
absolute times differ from machine to machine and from hour to hour.

*Compute alone* is the step's arithmetic (forward, recomputation, head and loss over blocks, backward, update) with
every byte at hand. *Disk alone* is the same bytes read and written with no arithmetic, right after the line it stands
for. *Floor* is the larger of the two, and *floor / step* the efficiency. *At once* both are done by threads that know
nothing of each other: what the two cost each other on this machine where nothing ever waits. A throttled disk passes
1.35 GB/s read and 1.4 GB/s written: what is left when the machine's host has nothing cached.

"""

Results = dict[str, dict[str, Any]]


def write_page(results: Results, page: Path, command: str, folder: Path) -> None:
    """Put tables and targets between the markers of `page`, which keeps what stands around them, and draw the chart."""
    text = page.read_text() if page.exists() else f"{HEAD}{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN)
    body = "\n".join(_body(results, command, folder, page))
    page.write_text(f"{before}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}")
    _draw(results, page.with_suffix(".png"))


def _body(results: Results, command: str, folder: Path, page: Path) -> Iterator[str]:
    yield f"`{command}`, {date.today()}: {describe_machine(folder)}.\n"
    yield f"![Seconds a step and peak memory]({page.with_suffix('.png').name})\n"
    for shape in dict.fromkeys(name.split(": ")[0] for name in results):
        rows = list(_rows(shape, results))
        if rows:
            yield f"## {shape}, {SHAPES[shape].parameters / 1e6:,.0f} M parameters\n"
            yield "| | s/step | tokens/s | peak GiB | GB read | GB written | bytes/parameter | floor / step |"
            yield "|---|---:|---:|---:|---:|---:|---:|---:|"
            yield from rows
            yield ""
    yield "## Targets\n"
    yield "| | target | measured | |"
    yield "|---|---:|---:|---|"
    for what, target, measured in _targets(results):
        yield f"| {what} | {target:.3g} | {measured:.3g} | {'reached' if measured <= target else '**missed**'} |"


def _rows(shape: str, results: Results) -> Iterator[str]:
    for name, found in _of(shape, results).items():
        reason = found.get("skipped") or found.get("failed")
        if reason is not None:
            yield f"| {name} | {'skipped' if 'skipped' in found else 'failed'}: {reason.splitlines()[0][:160]} |||||||"
            continue
        if "seconds" not in found:
            continue
        seconds, read, written = found["seconds"], found.get("bytes_read"), found.get("bytes_written")
        moved = "" if read is None else f"{(read + written) / SHAPES[shape].parameters:.1f}"
        streamed = name.startswith("Outsize")
        floor = floor_of(shape, name, results) if streamed else None
        cells = [
            name,
            f"{seconds:.2f}",
            f"{found['tokens'] / seconds:.0f}" if "tokens" in found else "",
            "" if "alone" in name else f"{found['peak_bytes'] / 2**30:.2f}",
            "" if read is None else f"{read / 1e9:.2f}",
            "" if written is None else f"{written / 1e9:.2f}",
            moved,
            "" if floor is None else f"{floor / seconds:.0%}",
        ]
        yield "| " + " | ".join(cells) + " |"


def _of(shape: str, results: Results) -> Results:
    return {name.split(": ", 1)[1]: found for name, found in results.items() if name.startswith(f"{shape}: ")}


def floor_of(shape: str, name: str, results: Results) -> float | None:
    """The larger of compute alone and disk alone for a streamed run; None when neither was measured."""
    there = _of(shape, results)
    lanes = ", 8 x 512" if "8 x 512" in name else ""
    kept = shape == SMOLLM2.name and name.endswith("all near")
    recompute = ", checkpointing" if shape == SMOLLM2.name and not kept else ""
    rows = f"compute alone{lanes}{recompute}", f"disk alone, after {name}"
    compute, disk = (there.get(row, {}).get("seconds") for row in rows)
    if disk is None and there[name].get("bytes_read") and not lanes:
        return None  # it may be the larger one
    floors = [compute, disk]
    return max((floor for floor in floors if floor is not None), default=None)


def _targets(results: Results) -> Iterator[tuple[str, float, float]]:
    """(what, at most, measured) for everything that has to be reached and was measured."""
    for name, found in results.items():
        shape, _, what = name.partition(": ")
        if "seconds" not in found or not what.startswith("Outsize"):
            continue
        if shape == LLAMA.name and "8 x 512" in what:
            floor = floor_of(shape, what, results)
            if floor is not None:
                yield f"{name}: step / compute alone", 1 / 0.85, found["seconds"] / floor
            base = results.get(f"{LLAMA.name}: Outsize 1.6 GiB", {})
            if "bytes_read" in base:
                yield f"{name}: traffic / that of 1 x 512", 1.05, _moved(found) / _moved(base)
        elif shape == LLAMA.name and " 4 GiB" not in what:
            yield f"{name}: peak GiB", 1.6, found["peak_bytes"] / 2**30
            yield f"{name}: bytes a parameter", 26, _moved(found) / LLAMA.parameters
            floor = floor_of(shape, what, results)
            if floor is not None:
                yield f"{name}: step / floor", 1.15, found["seconds"] / floor
        elif shape == SMOLLM2.name and "all near" in what:
            plain = results.get(f"{shape}: plain{what.partition('all near')[2]}", {})
            if "seconds" in plain:
                yield f"{name}: step / plain", 1.05, found["seconds"] / plain["seconds"]
        elif shape == SMOLLM2.name and " 0.8 GiB" in what:
            yield f"{name}: peak GiB", 0.8, found["peak_bytes"] / 2**30
    peaks = [f["peak_bytes"] for n, f in results.items() if n.startswith("hidden 1024") and "seconds" in f]
    if len(peaks) > 1:
        yield "12, 24 and 48 layers: highest peak / lowest", 1.05, max(peaks) / min(peaks)


def _moved(found: dict[str, Any]) -> float:
    return found["bytes_read"] + found["bytes_written"]


def describe_machine(folder: Path) -> str:
    import torch
    import transformers

    from outsize.machine.describe import describe

    machine = describe(folder)
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":"
    )
    return (
        f"{machine.cores} cores ({model.split(':')[1].strip() or platform.machine()}), "
        f"{machine.memory_bytes / 2**30:.0f} GiB of memory, {machine.file_system}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()[1]:.1f}"
    )


def _draw(results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = [shape for shape in (SMOLLM2.name, LLAMA.name) if any(_drawn(shape, results))]
    if not shapes:
        return
    figure, axes = pyplot.subplots(len(shapes), 2, figsize=(11, 3.6 * len(shapes)), squeeze=False, layout="constrained")
    for (left, right), shape in zip(axes, shapes, strict=True):
        rows = list(_drawn(shape, results))[::-1]
        names = [name for name, _ in rows]
        colours = ["tab:blue" if name.startswith("Outsize") else "tab:grey" for name in names]
        for axis, key, scale, label in (
            (left, "seconds", 1, "seconds a step"),
            (right, "peak_bytes", 2**30, "peak memory, GiB"),
        ):
            values = [found[key] / scale if key == "seconds" or "alone" not in name else 0 for name, found in rows]
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], padding=3, fontsize=8)
            axis.set_xlabel(label)
            axis.margins(x=0.12)
            axis.spines[["top", "right"]].set_visible(False)
        left.set_title(shape, loc="left")
        right.set_yticks([])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _drawn(shape: str, results: Results) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the chart shows: one micro-batch a step, and what came to a result."""
    for name, found in _of(shape, results).items():
        if "seconds" in found and "8 x 512" not in name:
            yield name, found
