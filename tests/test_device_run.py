"""`outsize train` on a device, for which host memory stands: the numbers are those of a run on the host."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model, write_model

from outsize.machine.file import write_machine
from outsize.machine.find import find_machine

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("device") / "model")
    tiny_model("llama", tied=True, layers=4, hidden=256).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    (folder / "text.txt").write_text(" ".join(f"w{number % 200}" for number in range(600)))
    write_machine(find_machine("two-cores"), folder / "machine.toml")
    return folder


def command(folder: Path, out: str, *more: str) -> list[str]:
    told = {"model": folder, "data": folder / "text.txt", "out": folder.parent / out, "memory": "3GiB", "steps": STEPS}
    told |= {"sequence-length": 32, "accumulate": 2}
    options = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(Path(__file__).with_name("device_child.py")), "train", *options, "--json", *more]


def ran(folder: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, out, *more), text=True, capture_output=True, timeout=240, env=around(folder))


def around(folder: Path) -> dict[str, str]:
    return {**os.environ, "OUTSIZE_MACHINE": str(folder / "machine.toml"), "OMP_NUM_THREADS": "1"}


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in found if "loss" in line]


def weights(folder: Path, out: str) -> bytes:
    return (folder.parent / out / "model" / "model.safetensors").read_bytes()


def spread_out(plan: dict[str, Any]) -> dict[str, Any]:
    """Weights and states on the device, in its host's memory and on disk, in turn, and half of what is there updated there;
    the arena is for what streams."""
    names = plan["near_weights"]
    homes = {"near_weights": 0, "host_weights": 1, "near_states": 2, "host_states": 1}
    spread = {key: names[first::3] for key, first in homes.items()}
    return plan | spread | {"host_updates": names[1::6], "arena_bytes": 16 << 20}


def interrupted(folder: Path, out: str, *more: str) -> list[dict[str, Any]]:
    """A run that is told to stop when its second step is done."""
    begin = partial(subprocess.Popen, text=True, stdout=subprocess.PIPE, env=around(folder))
    found, process = [], begin(command(folder, out, *more))
    assert process.stdout is not None
    for line in process.stdout:
        found.append(json.loads(line))
        if found[-1].get("step") == 2:
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 130
    return found


def test_a_run_on_a_device_has_the_numbers_of_the_host(folder: Path) -> None:
    """With all on the device; and with state on it, in its host's memory, where some of it is updated, and on disk,
    interrupted and gone on with."""
    host = lines(ran(folder, "host", "--device-memory", "0"))
    there = lines(ran(folder, "there", "--device-memory", "2GiB"))
    plan = json.loads((folder.parent / "there" / "planned.json").read_text())["plan"]
    assert plan["device_bytes"] == 2 << 30 and not plan["host_weights"]
    (folder / "plan.json").write_text(json.dumps(spread_out(plan)))
    spread = ("--device-memory", "2GiB", "--plan", str(folder / "plan.json"))
    first, rest = interrupted(folder, "spread", *spread), lines(ran(folder, "spread", *spread))
    assert losses(there) == losses(host) and len(losses(host)) == STEPS
    assert losses(first) + losses(rest) == losses(host) and losses(rest)
    assert weights(folder, "spread") == weights(folder, "there") == weights(folder, "host")
    report = json.loads((folder.parent / "spread" / "report.json").read_text())
    assert {"read", "written", "to the device", "from the device"} <= report["moved"].keys()
    assert report["held"].keys() == {"device", "host", "disk"}


def test_a_device_that_is_not_there_is_refused_before_anything_begins(folder: Path) -> None:
    command = [sys.executable, "-m", "outsize", "train", "--model", str(folder), "--data", str(folder / "text.txt")]
    command += ["--memory", "3GiB", "--device-memory", "4GiB", "--out", str(folder.parent / "none")]
    done = subprocess.run(command, text=True, capture_output=True, timeout=240)
    said = re.sub(r"\s+", " ", done.stderr)
    assert done.returncode != 0 and "4.00 GiB of device memory are asked for, and torch finds 0 CUDA GPUs" in said
    assert "--device-memory 0" in said and not (folder.parent / "none").exists()
