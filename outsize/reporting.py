"""What is left of a run for people: its report beside the plan, and pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from outsize.machine.allocator import give_back
from outsize.model.units import Unit, describe_units
from outsize.train.report import each_line, held_by_tier, measured, moved_a_step, write_report
from outsize.train.run import Run
from outsize.train.settings import TrainSettings


def report_run(settings: TrainSettings, folder: Path, run: Run, units: list[Unit], steps_done: int) -> dict[str, Any]:
    """Close the job, and write all that into `folder`. Returns what the report holds."""
    from outsize.planner.pictures import draw_step, write_trace
    from outsize.train.pictures import draw

    job, plan = run.job, run.job.plan
    held = held_by_tier(job.store.ledger.held)
    moved = moved_a_step(run.moved, max(steps_done, 1))
    assert plan.predicted is not None
    planned = {
        name: value for name, value in asdict(plan.predicted).items() if value is None or isinstance(value, int | float)
    }
    planned["mean_seconds_per_step"] = plan.predicted.seconds_per_step
    steps = {"predicted": plan.predicted.timeline, "measured": run.timeline()}
    found = measured(each_line(folder / "metrics.jsonl")) | {"disk_bytes": job.store.tiers["disk"].used}
    job.close()
    give_back()  # what the steps' tensors took is room for the pictures
    facts = {
        "model": settings.model,
        "optimizer": settings.optimizer,
        "precision": settings.precision,
        "exactness": plan.exactness,
        "units": describe_units(units),
        **dict(reason.split(": ", 1) for reason in plan.reasons),
    }
    write_report(folder, planned, found, facts, memory_bytes=plan.memory_bytes, held=held, moved=moved)
    write_trace(steps, folder / "trace.json")
    if folder == settings.out:
        draw(folder)
        draw_step(steps, plan, folder / "timeline.png")
    return {"planned": planned, "measured": found}
