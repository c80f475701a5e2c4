"""Pictures of plans: a step on a time axis, and time against memory; and the step as a trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.errors import StorageError
from outsize.plan import Plan
from outsize.planner.needs import TENSORS
from outsize.sizes import format_size
from outsize.train.pictures import COLOURS, OTHER, new_figure, save_figure, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Timeline = Sequence[tuple[str, float, float]]
"""(lane, begin, end), in seconds of one step."""

LANES = {
    "compute": COLOURS["weight"],
    "update": COLOURS["moment"],
    "wire": COLOURS["kv"],
    "exchange": COLOURS["expert"],
    "waiting": COLOURS["gradient"],
    "read": COLOURS["master"],
    "write": COLOURS["activation"],
}
OF_SEVERAL = ("wire", "exchange")  # workers, so that a step of one has nothing there
CAUSES = (OTHER, COLOURS["weight"], COLOURS["master"], COLOURS["moment"], COLOURS["activation"])
GAP = 0.0005  # of the axis; spans nearer than that are drawn as one


def draw_step(steps: Mapping[str, Timeline], plan: Plan, path: Path) -> None:
    """What one step does when, of each of `steps` on one axis, and below it the memory that the plan foretells.

    Raises StorageError when the picture cannot be written."""
    length = max((end for timeline in steps.values() for _, _, end in timeline), default=1.0)
    taken = {lane for timeline in steps.values() for lane, _, _ in timeline}
    lanes = {lane: colour for lane, colour in LANES.items() if lane in taken or lane not in OF_SEVERAL}
    figure = new_figure(height=1.6 + 1.9 * len(steps) + 3.2)
    panels = figure.subplots(len(steps) + 1, squeeze=False, height_ratios=[*[1.9] * len(steps), 3.2])[:, 0]
    for axes, (name, timeline) in zip(panels, steps.items(), strict=False):
        _draw_lanes(axes, timeline, length, lanes)
        whole = max((end for _, _, end in timeline), default=0.0)
        set_title(axes, f"One step, {name}: {whole:.2f} s")
    _draw_memory(panels[-1], plan, length)
    panels[-1].set_xlabel("seconds")
    save_figure(figure, path)


def _draw_lanes(axes: Axes, timeline: Timeline, length: float, lanes: Mapping[str, str]) -> None:
    for row, (lane, colour) in enumerate(lanes.items()):
        spans = _joined([(start, end) for name, start, end in timeline if name == lane], GAP * length)
        busy = sum(end - start for name, start, end in timeline if name == lane)
        axes.broken_barh([(start, end - start) for start, end in spans], (row - 0.38, 0.76), color=colour)
        axes.text(1.01 * length, row, f"{busy:.2f} s", va="center")
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.09 * length)


def _joined(spans: list[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _draw_memory(axes: Axes, plan: Plan, length: float) -> None:
    """What is held all the time, stacked, and on top the tensors alive; above them what the C library may hold."""
    predicted = plan.predicted
    assert predicted is not None
    causes = dict(predicted.memory)
    steady = {cause: nbytes for cause, nbytes in causes.items() if cause != TENSORS}
    bottom = 0.0
    for (cause, nbytes), colour in zip(steady.items(), CAUSES, strict=False):
        height = nbytes / 2**20
        axes.fill_between([0, length], bottom, bottom + height, color=colour, label=cause, linewidth=0)
        bottom += height
    times = [time for time, _ in predicted.tensors]
    alive = [bottom + nbytes / 2**20 for _, nbytes in predicted.tensors]
    axes.fill_between(
        times, bottom, alive, color=COLOURS["activation"], label="tensors alive", linewidth=0, step="post"
    )
    axes.axhline(predicted.host_peak_bytes / 2**20, color="black", linewidth=1.2, label="predicted peak")
    if plan.memory_bytes is not None:
        axes.axhline(plan.memory_bytes / 2**20, color="black", linewidth=1.2, linestyle=(0, (5, 3)), label="budget")
    axes.set_ylabel("MiB")
    axes.set_xlim(0, 1.09 * length)
    axes.set_ylim(0, 1.12 * max(predicted.host_peak_bytes, plan.memory_bytes or 0) / 2**20)
    set_title(
        axes, f"Memory, as predicted (not measured): the process peaks at {format_size(predicted.host_peak_bytes)}"
    )
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def draw_comparison(plans: Sequence[Plan], path: Path) -> None:
    """Seconds a step against the memory allowed, by cause. Raises StorageError."""
    figure = new_figure(height=5)
    axes = figure.subplots()
    causes = {
        "compute": "compute_seconds",
        "update": "update_seconds",
        "waiting for reads": "read_wait_seconds",
        "waiting for writes": "write_wait_seconds",
    }
    colours = dict(zip(causes, (LANES["compute"], LANES["update"], LANES["waiting"], LANES["write"]), strict=True))
    bottoms = [0.0] * len(plans)
    for cause, key in causes.items():
        seconds = [getattr(plan.predicted, key) or 0.0 for plan in plans]
        axes.bar(range(len(plans)), seconds, bottom=bottoms, color=colours[cause], label=cause, width=0.6)
        bottoms = [bottom + value for bottom, value in zip(bottoms, seconds, strict=True)]
    for place, (plan, top) in enumerate(zip(plans, bottoms, strict=True)):
        assert plan.predicted is not None
        axes.text(place, top, f"{plan.predicted.seconds_per_step:.2f} s", ha="center", va="bottom")
    axes.set_xticks(range(len(plans)), [format_size(plan.memory_bytes or 0) for plan in plans])
    axes.set_xlabel("memory allowed")
    axes.set_ylabel("seconds a step")
    axes.set_ylim(0, 1.08 * max(bottoms))
    set_title(axes, "A step's time against memory, as planned")
    axes.legend(frameon=False, ncols=len(causes), loc="upper center", bbox_to_anchor=(0.5, -0.14))
    save_figure(figure, path)


def write_trace(steps: Mapping[str, Timeline], path: Path) -> None:
    """Write timelines in Chrome's trace format, which https://ui.perfetto.dev opens: a process for each, a thread for
    each lane, microseconds. Raises StorageError."""
    events: list[dict[str, object]] = []
    for process, (name, timeline) in enumerate(steps.items(), 1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        for thread, lane in enumerate(LANES, 1):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": lane}})
        threads = {lane: thread for thread, lane in enumerate(LANES, 1)}
        events += [
            {
                "ph": "X",
                "name": lane,
                "pid": process,
                "tid": threads[lane],
                "ts": 1e6 * start,
                "dur": 1e6 * (end - start),
            }
            for lane, start, end in timeline
        ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as problem:
        raise StorageError(f"{path} cannot be written: {problem.strerror}. Choose another place.") from problem
