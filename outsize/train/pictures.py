"""The pictures of a run: loss.png and memory.png, drawn from its metrics.jsonl and report.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from outsize.errors import StorageError
from outsize.sizes import format_size
from outsize.train.report import each_line, gather

if TYPE_CHECKING:
    from array import array

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import float64
    from numpy.typing import NDArray

# Okabe and Ito's palette, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = {
    "weight": "#0072B2",
    "master": "#56B4E9",
    "moment": "#009E73",
    "gradient": "#D55E00",
    "activation": "#E69F00",
    "kv": "#CC79A7",
    "expert": "#F0E442",
    "adapter": "#000000",
}
OTHER = "#999999"
SMOOTH_FROM = 50
"""Steps beyond which single losses are too many to follow by eye."""
SPREAD = 20
"""The largest loss over the smallest beyond which a linear axis would flatten most of the curve."""
NEAR_TO_FAR = ("device", "host", "disk")

Sizes = Mapping[str, Mapping[str, int]]
"""Bytes by kind, of every tier or direction."""


def draw(directory: Path) -> list[Path]:
    """Write loss.png and memory.png beside the metrics.jsonl in `directory`; none when it has no steps.

    Importing matplotlib and drawing cost up to 65 MiB. Without a report.json, memory.png shows only peaks.
    Raises RunError for damaged metrics and StorageError when a picture cannot be written."""
    columns = gather(each_line(directory / "metrics.jsonl"))
    if not columns["step"]:
        return []
    report_file = directory / "report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.exists() else {}
    return [
        save_figure(_loss(columns), directory / "loss.png"),
        save_figure(_memory(columns, report), directory / "memory.png"),
    ]


def new_figure(height: float) -> Figure:
    """An empty figure that draws itself; pyplot would keep global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(9, height), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    except OSError as problem:
        why = problem.strerror or problem
        raise StorageError(f"{path} cannot be written: {why}. Make room, or choose another --out.") from problem
    finally:
        partial.unlink(missing_ok=True)
    return path


def _loss(columns: Mapping[str, array[float]]) -> Figure:
    figure = new_figure(height=5)
    axes = figure.add_subplot()
    steps, losses = columns["step"], columns["loss"]
    if len(losses) > SMOOTH_FROM:
        trend, width = smooth(losses)
        axes.plot(steps, losses, color="#A9CBE3", linewidth=0.8, label="each step")
        axes.plot(steps, trend, color=COLOURS["weight"], linewidth=2.2, label=f"mean of {width} steps")
    else:
        axes.plot(steps, losses, color=COLOURS["weight"], marker="o", markersize=4, label="each step")
    if columns["eval_step"]:
        style = {"color": COLOURS["gradient"], "marker": "D", "markersize": 7, "markeredgecolor": "white"}
        axes.plot(columns["eval_step"], columns["eval_loss"], linestyle="", label="evaluation data", **style)
    if 0 < SPREAD * min(losses) < max(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("cross-entropy loss (nats per token)")
    _over_steps(axes)
    set_title(axes, _fall(losses))
    axes.legend(frameon=False)
    return figure


def _fall(losses: array[float]) -> str:
    """Say in words what the curve shows; single steps are too noisy to name."""
    if len(losses) == 1:
        return f"Training loss of the only step: {losses[0]:.2f}"
    count = max(1, len(losses) // 10)
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    went = "fell" if last < first else "rose" if last > first else "stayed"
    means = f", means of the first and last {count:,}" if count > 1 else ""
    return f"Training loss {went} from {first:.2f} to {last:.2f} ({len(losses):,} steps{means})"


def smooth(values: array[float]) -> tuple[NDArray[float64], int]:
    """Return the running mean of `values`, of the same length, and its width: a twenty-fifth of them, odd.

    It is centred, so it does not lag; near the ends it takes in what there is."""
    import numpy

    width = max(5, len(values) // 25) | 1
    window = numpy.ones(width)
    sums = numpy.convolve(values, window, mode="same")
    return sums / numpy.convolve(numpy.ones(len(values)), window, mode="same"), width


def _memory(columns: Mapping[str, array[float]], report: Mapping[str, Any]) -> Figure:
    """Peak against budget; below it what is held where, and what moves in a step, where the report tells."""
    held, moved = report.get("held") or {}, report.get("moved") or {}
    held = {tier: held[tier] for tier in NEAR_TO_FAR if tier in held}
    bars = [(sizes, title) for sizes, title in ((held, _held), (moved, _moved)) if any(sizes.values())]
    heights = [3.4, *(0.9 + 0.5 * len(sizes) for sizes, _ in bars)]
    figure = new_figure(height=sum(heights) + 0.6)
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    _peaks(panels[0], columns, report.get("memory_bytes"))
    for axes, (sizes, title) in zip(panels[1:], bars, strict=True):
        _stack(axes, sizes)
        set_title(axes, title(sizes))
    _name_kinds(figure, [kind for sizes, _ in bars for by_kind in sizes.values() for kind in by_kind])
    return figure


def _peaks(axes: Axes, columns: Mapping[str, array[float]], budget: int | None) -> None:
    host, device = columns["host_peak_bytes"], columns["device_peak_bytes"]
    power, unit = _scale(max(*host, *device, budget or 0))
    lines = [("process", host, COLOURS["weight"])] + ([("device", device, COLOURS["gradient"])] if any(device) else [])
    for label, peaks, colour in lines:
        marker = "o" if len(peaks) == 1 else ""
        axes.plot(
            columns["step"],
            [peak / power for peak in peaks],
            color=colour,
            linewidth=2.2,
            marker=marker,
            label=label,
        )
    text = f"The process's memory peaked at {format_size(int(max(host)))}"
    if budget is not None:
        axes.axhline(budget / power, color="black", linewidth=1.4, linestyle=(0, (5, 3)), label="budget (--memory)")
        text += f", {max(host) / budget:.0%} of its budget"
    axes.set_ylim(0, 1.12 * max(*host, *device, budget or 0) / power)
    axes.set_ylabel(f"peak so far ({unit})")
    _over_steps(axes)
    set_title(axes, text)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False)


def _stack(axes: Axes, sizes: Sizes) -> None:
    """One bar for each tier or direction, made up of its kinds, with its sum at the end."""
    totals = [sum(by_kind.values()) for by_kind in sizes.values()]
    power, unit = _scale(max(totals))
    for row, (by_kind, total) in enumerate(zip(sizes.values(), totals, strict=True)):
        start = 0.0
        for kind in sorted(by_kind, key=_rank):
            length = by_kind[kind] / power
            axes.barh(row, length, left=start, height=0.62, color=COLOURS.get(kind, OTHER), edgecolor="white")
            start += length
        axes.text(start + 0.01 * max(totals) / power, row, format_size(total), va="center")
    axes.set_yticks(range(len(sizes)), list(sizes))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(totals) / power)
    axes.set_xlabel(unit)


def _held(sizes: Sizes) -> str:
    totals = [f"{format_size(sum(by_kind.values()))} in {tier}" for tier, by_kind in sizes.items()]
    return "Held at the end: " + ", ".join(totals)


def _moved(sizes: Sizes) -> str:
    read, written = (format_size(sum(sizes[direction].values())) for direction in ("read", "written"))
    return f"A step reads {read} from disk and writes {written}"


def _name_kinds(figure: Figure, kinds: list[str]) -> None:
    """One legend for all bars: a kind has the same colour in each."""
    from matplotlib.patches import Patch

    patches = [Patch(color=COLOURS.get(kind, OTHER), label=kind) for kind in sorted(set(kinds), key=_rank)]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def _rank(kind: str) -> tuple[int, str]:
    order = list(COLOURS)
    return (order.index(kind) if kind in order else len(order)), kind


def _scale(largest: float) -> tuple[int, str]:
    """The unit in which the axis of a picture counts."""
    return (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")


def _over_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    axes.grid(color="#DDDDDD", linewidth=0.7)


def set_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", pad=9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
