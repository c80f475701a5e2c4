"""A real training run, killed again and again at random instants, must end with the numbers of an undisturbed one.

python tests/soak.py --kills 300 --flips 10000 --page docs/reliability.md    # tests/soak_report.py has the options

Each try is a child of tests/soak_child.py that calls what the command line calls, and is killed with SIGKILL. Between tries
the run changes its placement; steps are kept, packed, exported and gone back to, and an export is imported."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outsize.train.state import StateFolder

STEPS = 120
PLACEMENTS = ("near", "disk", "mixed", "kept")
CHILD = Path(__file__).with_name("soak_child.py")


class Nursery:
    """The forking process, seen from here."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=CHILD.parent.parent,
        )

    def run(self, do: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Returns signal, code, where it was at the end, and seconds of processor time."""
        self.begin(do, settings, **more)
        return self.end()

    def begin(self, do: str, settings: dict[str, Any], **more: Any) -> int:
        """Returns the process; `end` must follow."""
        assert self._process.stdin is not None and self._process.stdout is not None
        told = {"do": do, "settings": settings, "log": str(self.log), **more}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> dict[str, Any]:
        """As `run` returns."""
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def must(self, do: str, settings: dict[str, Any], **more: Any) -> float:
        """Returns seconds of processor time. Raises AssertionError when it fails."""
        ended = self.run(do, settings, **more)
        assert ended["signal"] == ended["code"] == 0, f"{do} ended with {ended}; {self.log} says\n{tail(self.log)}"
        return ended["seconds"]

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
    seconds: dict[tuple[str, bool], float]  # that each try takes when nobody disturbs it, packing or not
    kills: Counter[str] = field(default_factory=Counter)
    late: int = 0
    runs: int = 0
    made: dict[str, str] = field(default_factory=dict)  # what exports and imports must always be

    @property
    def out(self) -> Path:
        return Path(self.settings["out"])

    @property
    def target(self) -> Path:
        return self.out.with_name("made")

    def kill_once(self) -> None:
        """One try, which is killed; then everything that is committed or kept must be whole."""
        do, more = self._something()
        within = self.seconds[do, more.get("compress", False)]
        ended = self.nursery.run(do, self.settings, kill_after=self.choice.uniform(0, within), **more)
        if ended["signal"] == signal.SIGKILL:
            self.kills[ended["where"]] += 1
        else:
            assert ended["code"] == 0, f"{do} failed: {tail(self.nursery.log)}"
            self.late += 1
        if do in ("export", "import"):
            self._compare_made(f"{do} {more.get('step')} {more['compress']}", must=ended["signal"] == 0)
        elif (self.out / "state" / "manifest").exists():
            self.nursery.must("verify", self.settings)
        if do == "train" and ended["signal"] == 0:
            self.compare()

    def _something(self) -> tuple[str, dict[str, Any]]:
        kept, compress = kept_steps(self.out), self.choice.random() < 0.5
        throw = self.choice.random()
        if throw < 0.1 and (self.out / "state" / "manifest").exists():
            return "keep", {"compress": compress}
        past = [step for step in kept if step <= committed_step(self.out)]  # ahead, metrics.jsonl would lack lines
        if throw < 0.2 and past:
            return "rollback", {"step": self.choice.choice(past)}
        if throw < 0.25 and kept:
            return "drop", {"step": self.choice.choice(kept)}
        if throw < 0.33 and kept:
            return "export", {"step": self.choice.choice(kept), "compress": compress, "to": str(self.target)}
        if throw < 0.38:
            return "import", {"source": str(self.undisturbed / "whole"), "compress": compress, "to": str(self.target)}
        return "train", {"placement": self.choice.choice(PLACEMENTS)}

    def _compare_made(self, what: str, must: bool) -> None:
        """A folder is there as a whole, always with the same bytes, or not at all."""
        if not self.target.exists():
            assert not must, f"{what} ended without its folder"
            return
        found = digest(self.target)
        assert self.made.setdefault(what, found) == found, f"{what} gave other bytes than before"
        shutil.rmtree(self.target)

    def compare(self) -> None:
        """The run has ended: its losses and weights are those of the undisturbed one, and the next may begin."""
        difference = differing(losses(self.undisturbed), losses(self.out))
        assert not difference, f"the losses differ: {difference}"
        for name in ("model/model.safetensors", "model/config.json"):
            assert (self.undisturbed / name).read_bytes() == (self.out / name).read_bytes(), f"{name} differs"
        shutil.rmtree(self.out)
        self.runs += 1

    def finish(self) -> None:
        self.nursery.must("train", self.settings, placement="disk")
        self.compare()
        more = {"source": str(self.undisturbed / "whole"), "to": str(self.target)}
        self.nursery.must("import", self.settings, compress=False, **more)
        assert not list(self.target.parent.glob(".*.partial-*")), "what killed exports left is still there"


def differing(right: list[tuple[int, float]], found: list[tuple[int, float]]) -> str:
    """In which steps; empty: in none."""
    if right == found:
        return ""
    steps = [step for step, _ in found]
    missing = [step for step, _ in right if step not in steps]
    twice = sorted({step for step in steps if steps.count(step) > 1})
    other = [step for step, loss in found if (step, loss) not in right]
    return f"steps {missing} are missing, {twice} are there twice, {other} have another value"


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()


def committed_step(out: Path) -> int:
    manifest = StateFolder(out / "state").read()
    return -1 if manifest is None else manifest.step


def kept_steps(out: Path) -> list[int]:
    """Those in extents and those packed."""
    names = {path.name for place in ("kept", "packed") for path in (out / "state" / place).glob("[!.]*-*")}
    return sorted({int(name.rpartition("-")[2]) for name in names if not name.endswith(".partial")})


def undisturbed_seconds(nursery: Nursery, settings: dict[str, Any]) -> dict[tuple[str, bool], float]:
    """Let each try happen once, on the run in `settings`; its export stays for imports. Of a training process: the time
    of 24 steps."""
    out, seconds = Path(settings["out"]), {}

    def timed(do: str, **more: Any) -> None:
        seconds[do, more.get("compress", False)] = 1.5 * nursery.must(do, settings, **more)

    timed("train", placement="near")
    seconds["train", False] *= 24 / settings["steps"]
    for compress in (False, True):
        timed("keep", compress=compress)
        timed("rollback", step=settings["steps"])  # at last to a packed one, which takes longer
        exported = str(out / ("packed" if compress else "whole"))
        timed("export", step=settings["steps"], compress=compress, to=exported)
        timed("import", source=exported, compress=compress, to=str(out / f"imported-{compress}"))
    timed("drop", step=settings["steps"])
    return seconds


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
        "sequence_length": 32, "learning_rate": 1e-3, "commit_every": 1, "keep_last": 2, "keep_every": 20, "keeper": True,
        "json": True,
    }  # fmt: skip


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def soak(
    folder: Path,
    kills: int,
    seed: int,
    steps: int = STEPS,
    progress: Callable[[str], None] = lambda line: None,
    enough: Callable[[], bool] = lambda: False,
) -> Soak:
    """Kill `kills` times, or until `enough`, let the last run end, compare. Raises AssertionError."""
    settings = prepare(folder) | {"steps": steps}
    nursery = Nursery(folder / "log.txt")
    try:
        undisturbed = folder / "undisturbed"
        seconds = undisturbed_seconds(nursery, settings | {"out": str(undisturbed)})
        done = Soak(nursery, settings | {"out": str(folder / "run")}, undisturbed, random.Random(seed), seconds)
        while sum(done.kills.values()) < kills and not enough():
            done.kill_once()
            progress(f"{sum(done.kills.values())} kills: {dict(done.kills)}, {done.late} too late, {done.runs} runs")
        done.finish()
    finally:
        nursery.close()
    return done


if __name__ == "__main__":
    from soak_report import main

    main()
