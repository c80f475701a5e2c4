"""Several workers, of whom one is killed at a random instant, again and again: each run must end with the numbers of an
undisturbed one.

python tests/soak_workers.py --kills 50"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from test_workers_run import assert_same, make_settings, run
from workers import Crew, crew


def soak(gang: Crew, folder: Path, kills: int, seed: int, workers: int = 2) -> Counter[str]:
    """Kill that often. Returns kills by victim, runs that were compared, and tries that ended before their kill."""
    settings = make_settings(folder)
    (folder / "undisturbed").mkdir()
    started = time.monotonic()
    expected = run(gang, settings, workers, folder / "undisturbed")
    duration = time.monotonic() - started
    choice, found = random.Random(seed), Counter()
    tries = folder / "tries"
    tries.mkdir()
    while found["kills"] < kills:
        told: dict[str, Any] = {"settings": settings | {"out": str(tries / "run")}, "disk": choice.random() < 0.5}
        told["kill"] = {
            "rank": choice.randrange(workers),
            "after": choice.uniform(0, duration),
            "signal": "SIGKILL",
        }
        codes = gang.attempt("run", workers, tries, told)
        if any(codes):
            assert codes[told["kill"]["rank"]] == -signal.SIGKILL, codes
            found["kills"] += 1
            found[f"of worker {told['kill']['rank']}"] += 1
        else:
            found["late"] += 1
        if not any(codes):
            assert_same(tries / "run", expected)
            found["runs compared"] += 1
            shutil.rmtree(tries / "run")
    run(gang, settings, workers, tries)
    assert_same(tries / "run", expected)
    found["runs compared"] += 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with crew() as gang, tempfile.TemporaryDirectory() as folder:
        print(dict(soak(gang, Path(folder), given.kills, given.seed)))
