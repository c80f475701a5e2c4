"""What a step's line counts: the step, and what is written of commits meanwhile; nothing of what evaluation moves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from checkpoints import Trained
from models import tiny_model

from outsize.asked import Request
from outsize.machine.find import find_machine
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.check import check_plan
from outsize.planner.task import Task
from outsize.planner.training import Place, plan_training
from outsize.train.counts import Ways
from outsize.train.data import PackedDataset, pack
from outsize.train.optimizers import uniform_rule
from outsize.train.progress import Progress
from outsize.train.report import measured, read_metrics
from outsize.train.run import Schedule
from outsize.train.tokens import Tokens

STEPS = 8
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})
PLACE = Place(find_machine("laptop"), baseline_bytes=400 << 20, disk_free_bytes=1 << 40)


def weights_near(clip: float | None, precision: str = "mixed") -> Plan:
    """Weights stay near and are written when they are committed, every second step; all states stream."""
    request = Request(2 << 30, sequence_length=16, clip=clip, commit_every=2, loss="module", precision=precision)
    model = tiny_model("llama", tied=True, layers=2, hidden=512)
    task = Task(model, find_units(model), RULE, request)
    near = replace(plan_training(task, PLACE), near_states=frozenset(), gradient_home="disk", arena_bytes=32 << 20)
    return check_plan(near, task, PLACE)


@dataclass
class Found:
    lines: list[dict]
    moved: Ways  # by steps, as the run says
    all: Ways  # by the store


def trained(plan: Plan, folder: Path, eval_every: int) -> Found:
    model = tiny_model("llama", tied=True, layers=2, hidden=512)
    tokens = [Tokens([number % 250 for number in range(160)], [True] * 160)]
    folder.mkdir()
    data: PackedDataset = pack(tokens, folder / "data.npy", 16, 0)
    job = Trained(model, RULE, plan, folder)
    job.run.progress = Progress(json=True)
    before = job.job.store.ledger.moved.copy()
    scheduler = torch.optim.lr_scheduler.ConstantLR(job.job.optimizer, 1.0)
    job.run.train(data, Schedule(STEPS, 1, 1, seed=0, eval_every=eval_every), scheduler, data)
    moved = job.job.store.ledger.moved - before
    job.close()
    return Found([line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line], job.run.moved, moved)


def read(moved: Ways) -> int:
    return sum(nbytes for (source, _, _), nbytes in moved.items() if source == "disk")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_lines_count_commits_as_the_plan_foretells_them(tmp_path: Path, clip: float | None) -> None:
    plan = weights_near(clip)
    lines = trained(plan, tmp_path / "run", eval_every=0).lines
    written = [line["bytes_written"] for line in lines[2:]]
    assert written[0] == written[2] == written[4] > written[1] == written[3] == written[5]
    snapshot = sum(
        2 * parameter.numel() for parameter in tiny_model("llama", tied=True, layers=2, hidden=512).parameters()
    )
    assert 0 <= written[0] - written[1] - snapshot < 4096 * 30, "all weights, in whole pages"
    assert plan.predicted is not None
    assert measured(lines)["bytes_written"] == plan.predicted.bytes_written


def test_what_evaluation_moves_is_in_no_line(tmp_path: Path) -> None:
    plan = weights_near(None)
    away = replace(plan, near_weights=frozenset(), arena_bytes=24 << 20)  # then evaluation reads all weights
    found = trained(away, tmp_path / "run", eval_every=2)
    assert read(found.all) > read(found.moved) == sum(line["bytes_read"] for line in found.lines)
    assert all(line["seconds"] > line["read_wait_seconds"] + line["write_wait_seconds"] for line in found.lines)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_an_update_that_evaluation_brings_about_is_a_steps(tmp_path: Path, precision: str) -> None:
    plan = weights_near(1.0, precision)
    plain, looked_at = (trained(plan, tmp_path / str(every), every).lines for every in (0, 1))
    assert [line["bytes_written"] for line in looked_at] == [line["bytes_written"] for line in plain]
    assert [line["loss"] for line in looked_at] == [line["loss"] for line in plain]
