"""The keeper: what a run has published outlives its process, whatever it was doing when it was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_model

from outsize.asked import Request
from outsize.errors import BudgetError, StorageError
from outsize.machine.find import find_machine
from outsize.memory import keeper, shared
from outsize.memory.block import Block, make_block
from outsize.memory.shared import Shared
from outsize.memory.tier import PAGE
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.needs import KEPT, TENSORS
from outsize.planner.task import Task
from outsize.planner.training import Place, plan_training
from outsize.train.optimizers import uniform_rule

pytestmark = pytest.mark.skipif(not shared.AVAILABLE, reason="Linux only")
BLOCKS = tuple(make_block(str(number), [("data", "weight", torch.uint8, (PAGE * 64,))]) for number in range(6))
TOTAL = sum(block.nbytes for block in BLOCKS)


def value(block: Block, step: int) -> int:
    return (31 * int(block.name) + 7 * step) % 251


def train(folder: Path) -> None:
    """Change every block in every step and publish, for ever. A line is printed of each published step."""
    memory = shared.find(folder) or Shared(folder, TOTAL)
    places = {block: memory.place(block) for block in BLOCKS}
    step = int(memory.said()) if memory.published else 0
    if not step:
        for block, place in places.items():
            place.fill_(value(block, 0))
        memory.publish(b"0")
    while True:
        print(step, flush=True)
        step += 1
        for block, place in places.items():
            memory.save(block.name)
            place.fill_(value(block, step))
        memory.publish(str(step).encode())


@pytest.fixture
def folder(tmp_path: Path):  # noqa: ANN201
    yield tmp_path
    shared.dismiss(tmp_path)


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)


def keeper_of(folder: Path) -> dict[str, int]:
    return json.loads((folder / shared.KEEPER).read_text())


def wait_until_dead(process: int) -> None:
    while keeper.started(process):
        time.sleep(0.01)


def test_a_killed_process_leaves_its_last_step_whole(folder: Path) -> None:
    choice, reached = random.Random(0), 0
    for _ in range(5):
        process = start(folder)
        assert process.stdout is not None
        first = int(process.stdout.readline())
        assert first >= reached, "nothing is lost from one process to the next"
        time.sleep(choice.uniform(0, 0.05))
        process.kill()
        printed = [first, *(int(line) for line in process.stdout.read().splitlines())]
        process.wait()
        memory = shared.find(folder)
        assert memory is not None
        reached = int(memory.said())
        assert reached - printed[-1] in (0, 1)
        far = torch.empty(BLOCKS[0].nbytes, dtype=torch.uint8)
        for block, place in zip(BLOCKS, memory.find_all(BLOCKS).values(), strict=True):
            memory.read(place, far)
            assert torch.all(far == value(block, reached)), f"{block.name} is not of step {reached}"
        for block in BLOCKS:
            assert torch.all(memory.place(block) == value(block, reached))
        memory.close()


def test_the_memory_goes_with_its_keeper(folder: Path) -> None:
    process = start(folder)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    said = keeper_of(folder)
    path = Path(f"/proc/{said['process']}")
    assert int((path / "statm").read_text().split()[1]) * PAGE < 16 << 20, "the keeper does not map what it holds"
    assert os.getsid(said["process"]) == said["process"], "Ctrl-C in a terminal does not reach it"
    shared.dismiss(folder)
    wait_until_dead(said["process"])
    assert shared.find(folder) is None and not (folder / shared.KEEPER).exists()


def test_a_keeper_that_was_killed_and_a_file_of_another_process_are_ignored(folder: Path) -> None:
    memory = Shared(folder, TOTAL)
    memory.publish(b"1")
    said = keeper_of(folder)
    shutil.copytree(folder, folder / "copy")
    assert shared.find(folder / "copy") is None, "a copy of the folder is another run"
    shared.dismiss(folder / "copy")
    assert keeper.started(said["process"]), "and does not end this one's"
    os.kill(said["process"], signal.SIGKILL)
    wait_until_dead(said["process"])
    assert shared.find(folder) is None
    for content in (
        "",
        "{}",
        "[1]",
        json.dumps(said | {"process": os.getpid()}),
        json.dumps(said | {"process": 1 << 30}),
    ):
        (folder / shared.KEEPER).write_text(content)
        assert shared.find(folder) is None
    memory.dismiss()
    memory.close()


def test_a_keeper_without_a_trainer_ends_by_itself(folder: Path) -> None:
    memory = os.memfd_create("nobody's")
    os.ftruncate(memory, PAGE)
    os.pwrite(
        memory, os.getpid().to_bytes(8, "little") + keeper.started(os.getpid()).to_bytes(8, "little"), keeper.OWNER
    )
    lines = "import sys; sys.argv = ['', '%d']; import outsize.memory.keeper as k; k.LOOK_EVERY = k.PATIENCE = 0.01; k.main()"
    process = subprocess.Popen([sys.executable, "-c", lines % memory], pass_fds=[memory], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b".")
    process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    os.pwrite(memory, (1).to_bytes(8, "little"), keeper.OWNER + 8)  # that process is dead, and another has its number
    assert process.wait() == 0
    os.close(memory)


def test_a_keeper_that_nobody_would_find_ends(folder: Path, tmp_path: Path) -> None:
    """The trainer dies, or its disk is full, before the file says where the keeper is."""
    (folder / f"{shared.KEEPER}.partial").mkdir()
    memory = Shared(folder, TOTAL)
    with pytest.raises(StorageError, match="keeper.partial could not be written"):
        memory.publish(b"1")
    script = Path(keeper.__file__)
    process = subprocess.Popen([sys.executable, "-I", "-S", str(script), "0"], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait() == 0
    memory.close()


def test_a_plan_has_the_keeper_that_was_asked_for_or_is_refused() -> None:
    model = tiny_model("llama", tied=False)
    request = Request(1 << 30, sequence_length=32, precision="fp32", loss="module", keeper=True)

    def plan(request: Request) -> Plan:
        rule = uniform_rule(torch.optim.AdamW, {})
        task = Task(model, find_units(model), rule, request, source_dtype=torch.float32)
        return plan_training(task, Place(find_machine("laptop"), 100 << 20, 1 << 40))

    large = plan(replace(request, keeper=False)).predicted
    assert large is not None
    least = sum(nbytes for cause, nbytes in large.memory if cause not in (TENSORS, KEPT))
    with pytest.raises(BudgetError, match=r"Give --memory \d+MiB, or leave --keeper out") as refused:
        plan(replace(request, memory_bytes=least))
    enough = int(str(refused.value).rpartition("--memory ")[2].partition("MiB")[0]) << 20
    found = plan(replace(request, memory_bytes=enough))
    assert found.shared_bytes > 0 and found.predicted is not None and found.predicted.host_peak_bytes <= enough


if __name__ == "__main__":
    train(Path(sys.argv[1]))
