"""What commits, snapshots and the keeper cost a step, and how soon a killed run goes on.

python bench/commit.py streamed    1.3 B parameters within 1.6 GiB, a commit every second step; needs 40 GB of disk
python bench/commit.py near        SmolLM2-135M within 6 GiB: steps with nothing and with a snapshot, in turns
python bench/commit.py keeper      the same with a keeper in a third of the steps

Each run is killed with SIGKILL and continued. The folder is removed at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

from shapes import LLAMA, SMOLLM2
from streamed import prepare
from train import GIB, STREAMED

SKIPPED = 3  # steps: the first have no state to read, or record the trace
CASES = {
    "streamed": (LLAMA.name, 1.6, ("nothing", "commit")),
    "near": (SMOLLM2.name, 6.0, ("nothing", "commit")),
    "keeper": (SMOLLM2.name, 6.0, ("nothing", "keeper", "commit")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    arguments = parser.parse_args()
    shape, memory, modes = CASES[arguments.case]
    place = arguments.folder.resolve() / shape.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    prepare(str(place), shape)
    out = place / "commit"
    shutil.rmtree(out, ignore_errors=True)
    options = {"place": str(place), "out": str(out), "memory": int(memory * GIB), "keeper": "keeper" in modes}
    try:
        print(json.dumps(_child("steps", **options, modes=modes, rounds=arguments.rounds), indent=1), flush=True)
        keeper = out / "state" / "keeper"
        print("continued", json.dumps(_child("recovery", **options)), flush=True)
        if keeper.exists():
            os.kill(json.loads(keeper.read_text())["process"], signal.SIGKILL)
            print("from disk", json.dumps(_child("recovery", **options)), flush=True)
            os.kill(json.loads(keeper.read_text())["process"], signal.SIGKILL)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _child(function: str, **options: Any) -> dict[str, Any]:
    """In a process of its own, which kills itself when it has said what it found."""
    command = [sys.executable, __file__, "--child", function, json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **STREAMED})
    assert done.returncode == -signal.SIGKILL, done.stdout
    return json.loads(done.stdout.splitlines()[-1])


def _say(found: dict[str, Any]) -> None:
    from outsize.machine.describe import process_memory

    print(json.dumps(found | {"peak_gib": process_memory().peak_bytes / GIB}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _train(place: str, out: str, memory: int, keeper: bool) -> None:
    from outsize.train.settings import TrainSettings
    from outsize.training import train

    files = {"model": f"{place}/model", "data": Path(place) / "text.txt", "out": Path(out)}
    train(TrainSettings(**files, memory=memory, keeper=keeper, steps=1000, json=True))


def steps(place: str, out: str, memory: int, keeper: bool, modes: list[str], rounds: int) -> None:
    """Seconds of the steps that begin after a commit, and of others, in turns; the keeper works in its own alone."""
    from outsize.machine.allocator import limit_heaps

    limit_heaps()
    from outsize.memory.shared import Shared
    from outsize.train.run import Run

    took: dict[str, list[dict[str, float]]] = defaultdict(list)
    save, step, mode = Shared.save, Run._step, "nothing"

    def measured(self: Run, number: int, *given: Any, **more: Any) -> Any:
        line = step(self, number, *given, **more)
        started = perf_counter()
        coming = modes[number % len(modes)]
        if coming == "commit":
            self.commit(number)
        elif coming == "keeper":
            self._publish(number)
        between = perf_counter() - started
        if number > SKIPPED:
            seconds = {"seconds": line.seconds - switch["between"], "before": switch["between"]}
            waits = {"waited": line.write_wait_seconds, "read_wait": line.read_wait_seconds}
            took[switch["mode"]].append(seconds | waits)
        switch.update(mode=coming, between=between)
        if number == SKIPPED + len(modes) * rounds:
            self.commit(number, wait=True)
            self._publish(number)
            _say({"medians": {name: _medians(lines) for name, lines in took.items()}, "all": took})
        return line

    switch: dict[str, Any] = {"mode": mode, "between": 0.0}
    Run._step = measured
    Run._complete = lambda self, number: None
    Shared.save = lambda self, name: save(self, name) if switch["mode"] == "keeper" else None
    _train(place, out, memory, keeper)


def _medians(lines: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(line[name] for line in lines), 4) for name in lines[0]}


def recovery(place: str, out: str, memory: int, keeper: bool) -> None:
    """Seconds from the start to the first resumed step, when all that it takes has been imported."""
    import transformers.models.llama.modeling_llama

    from outsize.machine.allocator import limit_heaps
    from outsize.train.run import Run

    del transformers
    limit_heaps()
    started = perf_counter()

    def resumed(self: Run, number: int, *given: Any, **more: Any) -> None:
        before = perf_counter() - started
        moved = self.job.store.ledger.total_moved(source="disk")
        _say({"step": number, "seconds": round(before, 2), "gb_read": round(moved / 1e9, 2)})

    Run._step = resumed  # pyright: ignore[reportAttributeAccessIssue]
    _train(place, out, memory, keeper)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        {"steps": steps, "recovery": recovery}[sys.argv[2]](**json.loads(sys.argv[3]))
    else:
        main()
