"""A run says when steps take much longer than planned, and plans again when asked, without another number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import tiny_model, write_model

from outsize.errors import OptionError
from outsize.machine.file import write_machine
from outsize.machine.find import find_machine
from outsize.train.pace import Pace, Watch, covered
from outsize.train.settings import REMEMBERED, TrainSettings
from outsize.training import train

STEPS = 8  # five until it is known how fast they go


def test_the_disk_is_busy_while_it_reads_or_writes() -> None:
    assert covered([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.4)]) == 3.0
    spans = [("compute", 0.0, 2.0), ("waiting", 2.0, 3.0), ("update", 3.0, 4.0)]
    assert Pace.of([*spans, ("read", 0.0, 1.5), ("write", 1.0, 3.0)]) == Pace(step=4.0, work=3.0, disk=3.0)


def test_steps_are_looked_at_until_they_are_known() -> None:
    def looked_at(*seconds: float) -> Watch:
        watch = Watch(Pace(2.0, 1.5, 1.0))
        for each in seconds:
            watch.look([("compute", 0.0, 1.5), ("waiting", 1.5, each), ("read", 0.0, each)])
        return watch

    assert looked_at(9, 9, 2.2, 9).behind is None  # two to warm up, and not enough after that
    assert looked_at(9, 9, 2.2, 2.4, 9).behind is None  # the median counts
    behind = looked_at(9, 9, 2.2, 4, 5, 2).behind
    assert behind is not None and behind.disk == 4.0
    assert str(behind) == (
        "steps take 4.00 s, planned 2.00: compute, update and exchange 1.50 s, planned 1.50; the disk is busy for 4.00 s, "
        "planned 1.00"
    )


def test_a_slower_tier_slows_its_links_and_what_they_share() -> None:
    machine = find_machine("rtx-4090")
    slow = machine.slowed("disk", 2.0)
    assert slow.link("disk", "host").bytes_per_second == machine.link("disk", "host").bytes_per_second / 2
    assert slow.limit("disk") == machine.limit("disk") / 2
    assert slow.link("host", "device") == machine.link("host", "device")


def test_replan_is_refused_beside_a_plan(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a few words")
    settings = TrainSettings(str(folder), tmp_path / "text.txt", tmp_path / "run", replan=True, plan=tmp_path / "plan")
    with pytest.raises(OptionError, match="--replan may leave the plan"):
        train(settings)


def ran(folder: Path, out: str, memory: str, *more: str) -> subprocess.CompletedProcess[str]:
    """`outsize train`, on a slow disk."""
    told = {"model": folder, "data": folder / "text.txt", "out": folder.parent / out, "memory": memory}
    told |= {"steps": STEPS, "sequence-length": 32}
    options = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(Path(__file__).with_name("replan_child.py")), "train", *options, "--json", *more]
    environment = {**os.environ, "OUTSIZE_MACHINE": str(folder / "machine.toml"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, text=True, capture_output=True, timeout=240, env=environment)


def lines(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines if key in line]


def test_a_run_is_planned_again_without_another_number(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tiny_model("llama", tied=True, layers=4, hidden=384).save_pretrained(folder)
    (folder / "text.txt").write_text(" ".join(f"w{number % 200}" for number in range(600)))
    write_machine(replace(find_machine("two-cores"), origin="probed in a good hour"), folder / "machine.toml")
    least = re.search(r"Give --memory (\d+)MiB", ran(folder, "refused", "64MiB").stderr.replace("\n", " "))
    assert least is not None
    memory = int(least[1]) + 48
    kept, again = (
        lines(ran(folder, *more)) for more in (("kept", f"{memory}MiB"), ("again", f"{memory}MiB", "--replan"))
    )
    assert sum("steps take" in said for said in of(kept, "message")) == 1
    assert f"step 5 of {STEPS} is committed" in of(again, "message")
    assert of(again, "loss") == of(kept, "loss") and len(of(kept, "loss")) == STEPS
    models = [(tmp_path / out / "model" / "model.safetensors").read_bytes() for out in ("kept", "again")]
    assert models[0] == models[1]
    first, second = (json.loads((tmp_path / out / REMEMBERED).read_text())["plan"] for out in ("kept", "again"))
    assert json.loads((tmp_path / "again" / REMEMBERED).read_text())["disk_slowness"] > 2
    where = ("near_weights", "near_states", "arena_bytes")
    assert [first[key] for key in where] != [second[key] for key in where]
    assert again[-1]["report"]["measured"]["host_peak_bytes"] <= memory << 20
