"""Several workers, of whom one is killed at a random instant, again and again: each run must end with the numbers of an
undisturbed one.

python tests/soak_workers.py --kills 50                                              # all at once
python tests/soak_workers.py --kills 50 --minutes 5 --results build/soak-workers.json    # again and again, in portions"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from test_workers_run import assert_same, make_settings, run
from workers import Crew, crew


def soak(
    gang: Crew,
    folder: Path,
    kills: int,
    seed: int,
    workers: int = 2,
    enough: Callable[[], bool] = lambda: False,
) -> Counter[str]:
    """Kill that often, or until `enough`. Returns kills by victim, runs that were compared, and tries that ended before
    their kill."""
    settings = make_settings(folder)
    (folder / "undisturbed").mkdir()
    started = time.monotonic()
    expected = run(gang, settings, workers, folder / "undisturbed")
    duration = time.monotonic() - started
    choice, found = random.Random(seed), Counter()
    tries = folder / "tries"
    tries.mkdir()
    while found["kills"] < kills and not enough():
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
            found["too late"] += 1
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
    parser.add_argument("--minutes", type=float, default=1e9, help="of a portion; then the last run may end")
    parser.add_argument("--results", type=Path, help="add this portion to those in the file")
    given = parser.parse_args()
    known = given.results is not None and given.results.exists()
    before = Counter(json.loads(given.results.read_text()) if known else {"portions": 0})
    end = time.monotonic() + 60 * given.minutes
    with crew() as gang, tempfile.TemporaryDirectory() as folder:
        wanted, seed = given.kills - before["kills"], given.seed + before["portions"]
        found = soak(gang, Path(folder), wanted, seed, enough=lambda: time.monotonic() > end)
    found.update(before, portions=1)
    print(dict(found))
    if given.results is not None:
        given.results.write_text(json.dumps(found))
