"""The process that tests/soak.py has killed: imports take seconds, so it makes them once and forks a child for each try,
which calls what the command line calls. Tries come as lines of JSON; how each ended, and where it was, goes back."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = (
    "starting",
    "in a step",
    "in a step, with a keeper",
    "committing",
    "writing the model",
    "keeping",
    "packing",
    "rolling back",
    "dropping",
    "exporting",
    "importing",
    "verifying",
)
CHANGES = {"open": 0, "os.rename": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1, "os.truncate": 0}
"""Audited calls that change names, and which of their arguments is one."""


def serve() -> None:
    """Run each try in a child, answer with how it ended and where it was."""
    import matplotlib.pyplot
    import transformers.models.llama.modeling_llama

    import outsize.commands.checkpoint
    import outsize.commands.checkpoint_drop
    import outsize.commands.checkpoint_export
    import outsize.commands.checkpoint_import
    import outsize.train.import_foreign
    import outsize.train.packed_step
    import outsize.training  # noqa: F401

    del matplotlib.pyplot, transformers
    for line in sys.stdin:
        told = json.loads(line)
        phase = mmap.mmap(-1, 2)
        child = os.fork()
        if child == 0:
            _work(told, phase)
        print(child, flush=True)
        status, seconds = _wait(child, told.get("kill_after"))
        where = "committing" if phase[1] else PHASES[phase[0]]
        said = {"signal": os.WTERMSIG(status), "code": os.WEXITSTATUS(status), "where": where, "seconds": seconds}
        print(json.dumps(said), flush=True)


def _wait(child: int, kill_after: float | None) -> tuple[int, float]:
    """How the child ended, and the processor time that it took: unlike that of a clock, it is the same on a busy machine. It
    is killed up to 20 ms after that much processor time, so that it may be waiting for the disk."""
    if kill_after is not None:
        while _processor_seconds(child) < kill_after:
            done, status, used = os.wait4(child, os.WNOHANG)
            if done:
                return status, used.ru_utime + used.ru_stime
            time.sleep(0.0005)
        time.sleep(0.02 * (1e4 * kill_after % 1))
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return status, used.ru_utime + used.ru_stime


def _processor_seconds(process: int) -> float:
    """Of all of its threads so far, by the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime(~process << 3 | 2)


def _work(told: dict[str, Any], phase: mmap.mmap) -> None:
    """In the child: never returns."""
    out = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    code = 0
    if "kill_at" in told:
        _die_at(told["kill_at"], str(Path(told["log"]).parent))
    try:
        _DO[told["do"]](told, phase)
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


def _die_at(number: int, inside: str) -> None:
    """SIGKILL where for the `number`-th time a name below `inside` is about to be written, made, changed or removed. Every
    such call is printed."""
    left = number

    def hear(call: str, given: tuple[Any, ...]) -> None:
        nonlocal left
        if call not in CHANGES or (call == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        name = str(given[CHANGES[call]])
        if inside in name or not os.path.isabs(name):
            os.write(1, f"{call} {name}\n".encode())
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)


def _say(phase: mmap.mmap, where: str) -> None:
    phase[0] = PHASES.index(where)


def _train(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize import training
    from outsize.machine.find import find_machine
    from outsize.memory.disk import DiskTier
    from outsize.train.run import Run
    from outsize.train.settings import TrainSettings
    from outsize.train.state import StateFolder

    _tell(Run, "_step", phase, "in a step, with a keeper" if told["placement"] == "kept" else "in a step")
    _tell(training, "export", phase, "writing the model")
    _tell_commits(DiskTier, StateFolder, phase)
    training.this_machine = lambda folder: find_machine("two-cores")  # to measure this one takes seconds
    training.recall = lambda *given: None  # it goes on as another try was placed
    plan = training.plan_training
    training.plan_training = lambda *given: _placed(_planned_once(plan, given, Path(told["log"])), told["placement"])
    settings = {key: Path(value) if key in ("data", "out") else value for key, value in told["settings"].items()}
    training.train(TrainSettings(**settings))


def _planned_once(plan: Callable[..., Any], given: Any, log: Path) -> Any:
    """Planning takes most of a start; it is the same every time."""
    known = log.with_name("plan.pickle")
    if not known.exists():
        known.write_bytes(pickle.dumps(plan(*given)))
    return pickle.loads(known.read_bytes())


def _placed(plan: Any, placement: str) -> Any:
    """The plan with weights and state elsewhere than the planner, who sees room for all and a keeper, has put them."""
    from dataclasses import replace

    if placement == "kept":
        return replace(plan, commit_every=1000)
    names, states = sorted(plan.near_weights), sorted(plan.near_states)
    few = {"near": (names, states), "disk": ([], []), "mixed": (names[::2], states[1::2])}[placement]
    return replace(
        plan,
        near_weights=frozenset(few[0]),
        near_states=frozenset(few[1]),
        arena_bytes=max(plan.arena_bytes, 16 << 20),
        shared_bytes=0,
    )


def _tell(owner: Any, name: str, phase: mmap.mmap, where: str) -> None:
    real = getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        _say(phase, where)
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

    _say(phase, "packing" if told["compress"] else "keeping")
    keep(Path(told["settings"]["out"]), told.get("step"), compress=told["compress"])


def _roll_back(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint import rollback

    _say(phase, "rolling back")
    rollback(Path(told["settings"]["out"]), told["step"])


def _drop(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint_drop import drop

    _say(phase, "dropping")
    drop(Path(told["settings"]["out"]), told["step"])


def _export(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint_export import export

    _say(phase, "exporting")
    export(Path(told["settings"]["out"]), Path(told["to"]), told["step"], optimizer=True, compress=told["compress"])


def _import(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint_import import import_checkpoint

    _say(phase, "importing")
    import_checkpoint(Path(told["source"]), Path(told["to"]), compress=told["compress"])


def _verify(told: dict[str, Any], phase: mmap.mmap) -> None:
    from outsize.commands.checkpoint import verify

    _say(phase, "verifying")
    verify(Path(told["settings"]["out"]))


_DO: dict[str, Callable[[dict[str, Any], mmap.mmap], None]] = {
    "train": _train,
    "keep": _keep,
    "rollback": _roll_back,
    "drop": _drop,
    "export": _export,
    "import": _import,
    "verify": _verify,
}


if __name__ == "__main__":
    serve()
