"""The command line of tests/soak.py: all kills at once or in portions, and the page that says what came of them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from committed import flips, whole_state
from soak import STEPS, soak
from soak_child import PHASES


@dataclass
class Results:
    """Of all portions: kills by where they hit, runs that were compared, tries that ended before their kill."""

    portions: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    late: int = 0

    @classmethod
    def read(cls, path: Path | None) -> Results:
        if path is None or not path.exists():
            return cls()
        said = json.loads(path.read_text())
        return cls(**said | {"kills": Counter(said["kills"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300, help="of all portions together")
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the first portion; the next has the next")
    parser.add_argument("--minutes", type=float, default=1e9, help="of a portion; then the last run may end")
    parser.add_argument("--results", type=Path, help="add this portion to those in the file")
    parser.add_argument("--page", type=Path, help="where to write the table when all kills are done")
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    _portion(arguments, results)
    if arguments.results:
        arguments.results.write_text(json.dumps(vars(results)))
    if results.kills.total() >= arguments.kills:
        with tempfile.TemporaryDirectory() as folder:
            missed = flips(whole_state(Path(folder) / "flips"), arguments.flips, arguments.seed)
        page = describe(results, arguments.flips, missed, " ".join(["python", "tests/soak.py", *sys.argv[1:]]))
        print(page)
        if arguments.page:
            arguments.page.write_text(page)


def _portion(arguments: argparse.Namespace, results: Results) -> None:
    """Kill until there are enough or the time is over. When something differs, the folder stays to be looked at."""
    folder, end = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic() + 60 * arguments.minutes
    wanted = arguments.kills - results.kills.total()
    try:
        done = soak(
            folder,
            wanted,
            arguments.seed + results.portions,
            arguments.steps,
            lambda line: print(line, flush=True),
            lambda: time.monotonic() > end,
        )
    except BaseException:
        print(f"what there is to look at is in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    results.portions += 1
    results.kills += done.kills
    results.runs += done.runs
    results.late += done.late


def describe(results: Results, flipped: int, missed: int, command: str) -> str:
    """docs/reliability.md."""
    outcome = dict.fromkeys(PHASES[:-1], "continued with identical numbers")
    outcome |= dict.fromkeys(("exporting", "importing"), "all of the folder, the same bytes, or none")
    rows = "".join(f"| {where} | {results.kills[where]} | {said} |\n" for where, said in outcome.items())
    return PAGE.format(
        command=command,
        portions=f"    # {results.portions} times" if results.portions > 1 else "",
        rows=rows,
        kills=results.kills.total(),
        runs=results.runs,
        late=results.late,
        flipped=flipped,
        missed=missed,
    )


PAGE = """# Reliability

What was done to runs, and what came of it. [commit.md](commit.md) says why.

## Kills

Runs of a small model, killed with SIGKILL at random instants, over and over: in training, and in `outsize checkpoint
keep` (packing or not), `rollback`, `drop`, `export` and `import`. Each time the run continued with weights and optimizer
state placed elsewhere: all near, all on disk, some of each, or all near with a keeper and hardly a commit to disk.
`outsize checkpoint verify` compared every byte. What was exported or imported was there as a whole, with the bytes it always
had, or not at all. When a run reached its end, its losses, step by step, and its weights were compared with those of a run
that nobody disturbed, and the next began.

    {command}{portions}

| killed while | kills | outcome |
|---|---|---|
{rows}| **together** | **{kills}** | losses and weights of all {runs} runs as undisturbed |

{late} more tries had ended before their kill came. "Committing" is from the sync of the data to the end of the manifest;
the next step computes meanwhile.

## Every change

`tests/test_instants.py` kills each of these commands before the first change that it makes to a name on disk, before the
second, and so on (some of them in `make test`, all in `make soak`), a training run from the moment when there is no run
yet. The same command then goes on, with the same numbers, and nothing is left of what the killed one was writing.

## Disks and people

| | shown by |
|---|---|
| Ctrl-C, once and twice, with clipping and without | `tests/test_interrupt.py` |
| a disk that is full, and has room again, in training | `test_a_run_on_a_full_disk_says_so_and_goes_on_once_there_is_space` |
| a disk that fails at any call, for once or for good | `test_a_disk_that_fails_at_any_call_loses_no_committed_step` |
| a run that cannot be written, read by all commands that only read | `test_a_run_that_cannot_be_written_can_be_read` |
| two processes on one run | `test_a_second_process_is_refused_and_ctrl_c_commits_the_first` |
| files missing, cut short, moved, of another model, tokenizer or format | `test_checkpoint.py`, `test_commit.py` |
| an import that would run code | `test_what_would_run_code_is_refused_and_not_run` |

## Flipped bits

{flipped} single bits, one at a time, in the manifests, the layout and the committed data of a small state: {missed} went
unnoticed by `outsize checkpoint verify`.

## Crash states

`tests/test_commit.py` records every change that seven commits make to the disk, with steps kept and let go, and builds
from each prefix of that record what a file system may have made of it: some 3,000 disks. Recovery finds on each the last
committed step or the one being committed, whole. Without the sync of the data it finds mixtures, and the checksums name
them.
"""
