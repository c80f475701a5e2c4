"""What `outsize train` was told, and the file run.json by which a run's folder remembers it."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from outsize.errors import RunError, StorageError
from outsize.model.new_folder import made_for
from outsize.train.state import REMEMBERED, replace_file

VERSION = 1  # of run.json
FREE = {
    "memory", "device_memory", "out", "activations", "commit_every", "keeper", "keep_last", "keep_every", "eval_data",
    "eval_every", "sample_prompt", "sample_every", "plan", "replan", "workers", "close", "pipeline", "legs", "legs_shape",
    "zero_bubble", "worker_timeout", "json",
}  # fmt: skip
"""What may differ when a run is continued; all else must stay as it was."""
PATHS = ("data", "eval_data", "optimizer_state", "out", "plan")
# What a run that never reached its first commit may leave, whole or killed while it was written.
BEGUN = {"train.npy", "eval.npy", "state", "companions", "run.json", REMEMBERED}

NO_PIPELINE = {"legs": None, "legs_shape": None, "zero_bubble": None}


@dataclass(frozen=True)
class TrainSettings:
    """Everything `outsize train` was told. Sizes in bytes, counts in steps, sequences and tokens."""

    model: str
    data: Path
    out: Path
    memory: int | None = None
    device_memory: int | None = None
    steps: int = 100
    sequence_length: int = 512
    batch_size: int = 1
    accumulate: int = 1
    precision: str = "mixed"
    moments: str = "fp32"
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    clip: float | None = None
    loss: str = "auto"
    activations: str = "auto"
    commit_every: int | None = None
    keeper: bool = False
    keep_last: int = 0
    keep_every: int = 0
    eval_data: Path | None = None
    eval_every: int = 50
    sample_prompt: str | None = None
    sample_every: int = 50
    seed: int = 0
    block_class: str | None = None
    plan: Path | None = None
    replan: bool = False
    optimizer_state: Path | None = None
    workers: int = 1
    close: int = 1
    pipeline: bool = False
    legs: int | None = None
    legs_shape: str | None = None
    zero_bubble: bool | None = None
    zero: int = 3
    worker_timeout: float = 30.0
    json: bool = False

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a run is continued."""
        return {key: value for key, value in self.plain().items() if key not in FREE}

    def shared(self) -> dict[str, Any]:
        """What all workers must have been told alike; files are told by what is in them."""
        own = {*PATHS, "model", "memory", "device_memory", "json", "workers"}
        return {key: value for key, value in self.plain().items() if key not in own}

    def plain(self) -> dict[str, Any]:
        """As JSON. Paths outside the run are absolute, so that it can be continued from any folder."""
        values = asdict(self)
        for name in PATHS:
            values[name] = None if values[name] is None else str(Path(values[name]).absolute())
        if Path(self.model).exists():
            values["model"] = str(Path(self.model).absolute())
        return json.loads(json.dumps(values))


def continues(settings: TrainSettings) -> bool:
    """True if this very run was begun in its folder and is to be continued. Raises RunError if another one was,
    StorageError if the folder cannot be used."""
    if (settings.out / "run.json").exists():
        known, now = read_settings(settings.out).identity(), settings.identity()
        if Path(known["model"]).is_absolute() and not Path(known["model"]).exists():
            known["model"] = now["model"]  # it has moved: whether it is the same, its fingerprint in the state tells
        changed = [f"{key} was {known[key]}, is {now[key]}" for key in now if known[key] != now[key]]
        if changed:
            raise RunError(
                f"{settings.out} holds another run: {'; '.join(changed)}. Give the same settings to continue it, "
                "or another --out."
            )
        return True
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        strange = {made_for(path.name) for path in settings.out.iterdir()} - BEGUN
    except OSError as problem:
        raise StorageError(f"{settings.out} cannot be used: {problem.strerror}. Choose another --out.") from problem
    if strange:
        raise RunError(
            f"{settings.out} holds {sorted(strange)[0]} and no run of Outsize. Choose another --out, or empty it."
        )
    if (settings.out / "state" / "manifest").exists():
        raise RunError(f"{settings.out} holds a run's state without its run.json. Restore it, or choose another --out.")
    return False


def continued(known: TrainSettings, told: dict[str, Any]) -> TrainSettings:
    """`known`, but for what is told now. Another number of workers has legs and neighbours of its own, and one worker has
    all layers."""
    workers = told.get("workers", known.workers)
    without: dict[str, Any] = {}
    if workers != known.workers or told.get("pipeline") is False:
        without = dict(NO_PIPELINE)
    if workers != known.workers:
        without["close"] = 1
    if workers == 1 and known.workers > 1:
        without["pipeline"] = False
    return replace(known, **(without | told))


def forget_beginning(out: Path) -> None:
    """Remove what a run that was refused has made, unless a state is there."""
    with suppress(OSError):
        (out / "state").rmdir()  # of several workers' empty one
    if (out / "state").exists():
        return
    for name in BEGUN - {"state"}:
        if (out / name).is_dir():
            shutil.rmtree(out / name, ignore_errors=True)
        else:
            (out / name).unlink(missing_ok=True)
    with suppress(OSError):
        out.rmdir()


def record(settings: TrainSettings) -> None:
    """Say whose folder this is, before the first commit: what is committed is never taken for another run's."""
    said = {"version": VERSION, "settings": settings.plain()}
    replace_file(settings.out / "run.json", json.dumps(said, indent=2).encode())


def read_settings(run: Path) -> TrainSettings:
    """What the run in the folder `run` was told; `out` is where it is now. Raises RunError."""
    path = run / "run.json"
    try:
        said = json.loads(path.read_text())
        version, settings = said["version"], said["settings"]
    except FileNotFoundError as problem:
        raise RunError(f"{run} holds no run of Outsize: there is no run.json in it.") from problem
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise RunError(f"{path} cannot be read as a run's settings: {problem}. Restore it.") from problem
    if version != VERSION:
        raise RunError(f"{path} has format version {version}; this Outsize reads version {VERSION}.")
    unknown = set(settings) - {known.name for known in fields(TrainSettings)}
    if unknown:
        raise RunError(f"{path} has settings that this Outsize does not know: {', '.join(sorted(unknown))}.")
    for name in PATHS:
        settings[name] = None if settings[name] is None else Path(settings[name])
    if not settings.get("pipeline"):
        settings |= NO_PIPELINE  # runs of before have its defaults written down
    return TrainSettings(**settings | {"out": run})
