"""A run's own plan, obeyed again when the run continues as it was: to measure the machine and to rehearse takes seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from outsize.asked import PipelineRequest, Request
from outsize.errors import OptionError
from outsize.machine.describe import describe
from outsize.machine.find import machine_file
from outsize.plan import Plan
from outsize.train.state import replace_file

CHOSEN = ("weight_copies", "gather_ahead_bytes", "shares", "legs", "legs_shape", "zero_bubble")
"""Of a request, by a plan itself; what continues is told."""


def circumstances(request: Request, line: PipelineRequest, directory: Path) -> dict[str, Any]:
    """All that a run's plan depends on and that may be otherwise when it continues, in plain JSON; but for what the process
    holds when it plans, and what the disk of `directory` has free."""
    here, probed = describe(directory), machine_file()
    asked = asdict(request)
    for chosen in CHOSEN:
        del asked[chosen]
    said = {
        "versions": [version("outsize"), torch.__version__],
        "request": asked | asdict(line),
        "machine": [here.memory_bytes, here.cores, torch.get_num_threads(), here.device and asdict(here.device)],
        "probed": sha256(probed.read_bytes()).hexdigest() if probed.exists() else None,
    }
    return json.loads(json.dumps(said))


def remember(path: Path, plan: Plan, made_in: dict[str, Any], baseline_bytes: int, slowness: float | None) -> None:
    """Write the plan that was made for a process that held `baseline_bytes`, and for a disk of that `recall_slowness`.
    Raises StorageError."""
    said = {"circumstances": made_in, "baseline_bytes": baseline_bytes, "plan": json.loads(plan.to_json())}
    replace_file(path, json.dumps(said | {"disk_slowness": slowness}).encode())


def remember_slowness(path: Path, slowness: float) -> None:
    """Forget the plan, and write what the next one is made for. Raises StorageError."""
    replace_file(path, json.dumps({"disk_slowness": slowness}).encode())


def recall_slowness(path: Path) -> float | None:
    """How many times as slow as the machine's file says the run's disk was when steps took much longer than planned; None:
    they did not, or nobody wanted it planned again."""
    try:
        return json.loads(path.read_bytes()).get("disk_slowness")
    except (OSError, ValueError):
        return None


def recall(path: Path, now: dict[str, Any], baseline_bytes: int) -> Plan | None:
    """The plan in `path`, if it would be made again and holds for a process that has `baseline_bytes`; else None."""
    try:
        said = json.loads(path.read_bytes())
        plan = Plan.from_json(json.dumps(said["plan"]), str(path))
        grown = max(0, baseline_bytes - said["baseline_bytes"])
    except (OSError, ValueError, KeyError, TypeError, OptionError):
        return None  # there is none, or another version wrote it
    if plan.predicted is None or plan.memory_bytes is None or said["circumstances"] != now:
        return None
    return plan if plan.predicted.host_peak_bytes + plan.headroom_bytes + grown <= plan.memory_bytes else None
