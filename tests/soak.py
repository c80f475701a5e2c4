"""A real training run, killed again and again at random instants, must end with the numbers of an undisturbed one.

python tests/soak.py --kills 300 --page docs/reliability.md

Imports take seconds, so a process that has made them once forks a child for each try; the child calls what the command
line calls, and is killed with SIGKILL. Between tries the run changes its placement, steps are kept and gone back to."""

from __future__ import annotations

import argparse
import json
import mmap
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from committed import flips, whole_state

STEPS = 120
PLACEMENTS = ("near", "disk", "mixed")
PHASES = ("starting", "in a step", "committing", "exporting", "keeping", "rolling back", "verifying")
HERE = Path(__file__)


# -- the process that forks --------------------------------------------------------------------------------------------


def serve() -> None:
    """Read tries as lines of JSON, run each in a child, answer with how it ended and where it was."""
    import matplotlib.pyplot
    import transformers.models.llama.modeling_llama

    import outsize.api
    import outsize.commands.checkpoint  # noqa: F401

    del matplotlib.pyplot, transformers
    for line in sys.stdin:
        told = json.loads(line)
        phase = mmap.mmap(-1, 2)
        child = os.fork()
        if child == 0:
            _work(told, phase)
        status = _wait(child, told.get("kill_after"))
        where = PHASES[2] if phase[1] else PHASES[phase[0]]
        print(json.dumps({"signal": os.WTERMSIG(status), "code": os.WEXITSTATUS(status), "where": where}), flush=True)


def _wait(child: int, kill_after: float | None) -> int:
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _work(told: dict[str, Any], phase: mmap.mmap) -> None:
    """In the child: never returns."""
    out = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 0
    try:
        {"train": _train, "keep": _keep, "rollback": _roll_back, "verify": _verify}[told["do"]](told, phase)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        if type(error).__name__ == "Exit":  # of typer
            code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
        else:
            traceback.print_exc()
            code = 1
    sys.stdout.flush()
    os._exit(code)


def _train(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize import api
    from outsize.memory.disk import DiskTier
    from outsize.train.run import Run
    from outsize.train.state import StateFolder

    _tell(Run, "_step", phase, 1)
    _tell(api, "export", phase, 3)
    _tell_commits(DiskTier, StateFolder, phase)
    plan = api.plan_training
    api.plan_training = lambda *given: _placed(_planned_once(plan, given, Path(told["log"])), told["placement"])
    settings = {key: Path(value) if key in ("data", "out") else value for key, value in told["settings"].items()}
    api.train(api.TrainSettings(**settings))


def _planned_once(plan: Callable[..., Any], given: Any, log: Path) -> Any:
    """Planning takes most of a start; it is the same every time."""
    known = log.with_name("plan.pickle")
    if not known.exists():
        known.write_bytes(pickle.dumps(plan(*given)))
    return pickle.loads(known.read_bytes())


def _placed(plan: Any, placement: str) -> Any:
    """The plan with weights and state elsewhere than the planner, who sees room for all, has put them."""
    from dataclasses import replace

    names, states = sorted(plan.near_weights), sorted(plan.near_states)
    few = {"near": (names, states), "disk": ([], []), "mixed": (names[::2], states[1::2])}[placement]
    return replace(
        plan, near_weights=frozenset(few[0]), near_states=frozenset(few[1]), arena_bytes=max(plan.arena_bytes, 16 << 20)
    )


def _tell(owner: Any, name: str, phase: mmap.mmap, number: int) -> None:
    real = getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        phase[0] = number
        return real(*given, **more)

    setattr(owner, name, call)


def _tell_commits(disk: Any, state: Any, phase: mmap.mmap) -> None:
    """From the sync of the data to the end of the manifest."""
    flush, write = disk.flush, state.write_manifest

    def begin(*given: Any) -> None:
        phase[1] = 1
        flush(*given)

    def end(*given: Any) -> None:
        write(*given)
        phase[1] = 0

    disk.flush, state.write_manifest = begin, end


def _keep(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint import keep

    phase[0] = 4
    keep(Path(told["settings"]["out"]))


def _roll_back(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint import rollback

    phase[0] = 5
    rollback(Path(told["settings"]["out"]), told["step"])


def _verify(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint import verify

    phase[0] = 6
    verify(Path(told["settings"]["out"]))


# -- the process that kills --------------------------------------------------------------------------------------------


class Nursery:
    """The forking process, seen from here."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE), "--serve"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent.parent
        )

    def run(self, do: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Returns signal, code and where it was at the end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        told = {"do": do, "settings": settings, "log": str(self.log), **more}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def must(self, do: str, settings: dict[str, Any], **more: Any) -> None:
        ended = self.run(do, settings, **more)
        assert ended["signal"] == ended["code"] == 0, f"{do} ended with {ended}; {self.log} says\n{tail(self.log)}"

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:]) if log.exists() else ""


@dataclass
class Soak:
    """`settings` are those of the disturbed runs. A run that ends is compared with the undisturbed one, and another
    begins. `kills` counts by where they hit, `runs` those compared, `late` the tries that ended before their kill."""

    nursery: Nursery
    settings: dict[str, Any]
    undisturbed: Path
    choice: random.Random
    within: float  # seconds after the start of a training process in which it is killed
    kills: Counter[str] = field(default_factory=Counter)
    late: int = 0
    runs: int = 0

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    def kill_once(self) -> None:
        """One try, which is killed; then everything that is committed or kept must be whole."""
        do, more, within = self._something()
        ended = self.nursery.run(do, self.settings, kill_after=self.choice.uniform(0, within), **more)
        if ended["signal"] == signal.SIGKILL:
            self.kills[ended["where"]] += 1
        else:
            assert ended["code"] == 0, f"{do} failed: {tail(self.nursery.log)}"
            self.late += 1
        if (self.out / "state" / "manifest").exists():
            self.nursery.must("verify", self.settings)
        if do == "train" and ended["signal"] == 0:
            self.compare()

    def _something(self) -> tuple[str, dict[str, Any], float]:
        kept = kept_steps(self.out)
        throw = self.choice.random()
        if throw < 0.1 and (self.out / "state" / "manifest").exists():
            return "keep", {}, 0.01
        if throw < 0.2 and kept:
            return "rollback", {"step": self.choice.choice(kept)}, 0.02
        return "train", {"placement": self.choice.choice(PLACEMENTS)}, self.within

    def compare(self) -> None:
        """The run has ended: its losses and weights are those of the undisturbed one, and the next may begin."""
        assert losses(self.undisturbed) == losses(self.out), "the losses differ"
        for name in ("model/model.safetensors", "model/config.json"):
            assert (self.undisturbed / name).read_bytes() == (self.out / name).read_bytes(), f"{name} differs"
        shutil.rmtree(self.out)
        self.runs += 1

    def finish(self) -> None:
        self.nursery.must("train", self.settings, placement="disk")
        self.compare()


def kept_steps(out: Path) -> list[int]:
    folder = out / "state" / "kept"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name.rpartition("-")[2]) for name in names if not name.endswith(".partial"))


def prepare(folder: Path) -> dict[str, Any]:
    """A tiny model, its tokenizer and a text. Returns the settings of a run on them."""
    from models import tiny_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *(f"w{number}" for number in range(200))]
    tiny_model("llama", tied=False).save_pretrained(folder / "model")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(" ".join(f"w{(7 * number * number) % 200}" for number in range(4000)))
    return {
        "model": str(folder / "model"), "data": str(folder / "text.txt"), "memory": 4 << 30,
        "sequence_length": 32, "learning_rate": 1e-3, "commit_every": 1, "keep_last": 2, "keep_every": 20, "json": True,
    }  # fmt: skip


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def soak(
    folder: Path, kills: int, seed: int, steps: int = STEPS, progress: Callable[[str], None] = lambda line: None
) -> Soak:
    """Kill `kills` times, let the last run end, compare. Raises AssertionError."""
    settings = prepare(folder) | {"steps": steps}
    nursery = Nursery(folder / "log.txt")
    try:
        undisturbed = folder / "undisturbed"
        started = time.monotonic()
        nursery.must("train", settings | {"out": str(undisturbed)}, placement="near")
        within = (time.monotonic() - started) * 24 / steps
        done = Soak(nursery, settings | {"out": str(folder / "run")}, undisturbed, random.Random(seed), within)
        while sum(done.kills.values()) < kills:
            done.kill_once()
            progress(f"{sum(done.kills.values())} kills: {dict(done.kills)}, {done.late} too late, {done.runs} runs")
        done.finish()
    finally:
        nursery.close()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    with tempfile.TemporaryDirectory() as folder:
        done = soak(Path(folder), arguments.kills, arguments.seed, progress=lambda line: print(line, flush=True))
        missed = flips(whole_state(Path(folder) / "flips"), arguments.flips, arguments.seed)
    page = describe(done, arguments.flips, missed, " ".join(["python", "tests/soak.py", *sys.argv[1:]]))
    print(page)
    if arguments.page:
        arguments.page.write_text(page)


def describe(done: Soak, flipped: int, missed: int, command: str) -> str:
    """docs/reliability.md."""
    rows = "".join(f"| {where} | {done.kills[where]} | continued with identical numbers |\n" for where in PHASES[:-1])
    return PAGE.format(
        command=command,
        rows=rows,
        kills=sum(done.kills.values()),
        runs=done.runs,
        late=done.late,
        flipped=flipped,
        missed=missed,
    )


PAGE = """# Reliability

What was done to runs, and what came of it. [commit.md](commit.md) says why.

## Kills

Runs of a small model, killed with SIGKILL at random instants, over and over: in training, and in `outsize checkpoint
keep` and `rollback`. Each time the run continued with weights and optimizer state placed elsewhere (all near, all on
disk, some of each), and `outsize checkpoint verify` compared every byte. When a run reached its end, its losses, step by
step, and its exported weights were compared with those of a run that nobody disturbed, and the next began.

    {command}

| killed while | kills | outcome |
|---|---|---|
{rows}| **together** | **{kills}** | losses and exported weights of all {runs} runs as undisturbed |

{late} more tries had ended before their kill came. "Committing" is from the sync of the data to the end of the manifest;
the next step computes meanwhile.

## Flipped bits

{flipped} single bits, one at a time, in the manifests, the layout and the committed data of a small state: {missed} went
unnoticed by `outsize checkpoint verify`.

## Crash states

`tests/test_commit.py` records every change that seven commits make to the disk, with steps kept and let go, and builds
from each prefix of that record what a file system may have made of it: some 3,000 disks. Recovery finds on each the last
committed step or the one being committed, whole. Without the sync of the data it finds mixtures, and the checksums name
them.
"""


if __name__ == "__main__":
    main()
