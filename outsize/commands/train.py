"""`outsize train`: the command line of `outsize.training.train`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outsize.commands import training_options as options
from outsize.commands.common import Json, Memory, interruptible, read_options, was_given
from outsize.errors import OptionError
from outsize.machine.garbage import lasting
from outsize.sizes import parse_size

if TYPE_CHECKING:
    from outsize.train.settings import TrainSettings


def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A Hugging Face folder, a .gguf file, or a hub id.")] = None,
    data: options.Data = None,
    out: options.Out = None,
    resume: options.Resume = None,
    memory: Memory = None,
    device_memory: options.DeviceMemory = None,
    steps: options.Steps = 100,
    sequence_length: options.SequenceLength = 512,
    batch_size: options.BatchSize = 1,
    accumulate: options.Accumulate = 1,
    precision: options.Precision = "mixed",
    moments: options.Moments = "fp32",
    optimizer: options.Optimizer = "adamw",
    optimizer_option: options.OptimizerOption = None,
    optimizer_state: options.OptimizerState = None,
    learning_rate: options.LearningRate = 2e-5,
    schedule: options.Schedule = "cosine",
    warmup_steps: options.AtLeastZero = 0,
    clip: options.Clip = None,
    loss: options.Loss = "auto",
    activations: options.Activations = "auto",
    commit_every: options.CommitEvery = None,
    keeper: options.Keeper = False,
    keep_last: options.KeepLast = 0,
    keep_every: options.KeepEvery = 0,
    eval_data: options.EvalData = None,
    eval_every: options.EvalEvery = 50,
    sample_prompt: options.SamplePrompt = None,
    sample_every: options.AtLeastZero = 50,
    seed: options.AtLeastZero = 0,
    block_class: options.BlockClass = None,
    plan: options.PlanFile = None,
    replan: options.Replan = False,
    workers: options.Workers = 1,
    close: options.Close = 1,
    pipeline: options.Pipeline = False,
    legs: options.Legs = None,
    legs_shape: options.LegsShape = None,
    zero_bubble: options.ZeroBubble = None,
    zero: options.Zero = 3,
    worker_timeout: options.WorkerTimeout = 30.0,
    json_lines: Json = False,
) -> None:
    """Fine-tune a model within a memory budget. State lives on disk where it does not fit.

    Example: outsize train --model my-model --data notes.txt --memory 4GiB --out runs/first

    Continue it: outsize train --resume runs/first --memory 2GiB
    """
    told = dict(locals())  # by the names of the parameters, of which all but two are settings
    settings = _settings(told.pop("context"), told.pop("resume"), told)
    with interruptible("The same command continues at the last committed step."):
        _start(settings)


def _start(settings: TrainSettings) -> None:
    """The run, or the workers of it; then where to look."""
    from outsize.distributed.launch import is_worker, launch

    if settings.workers > 1 and not is_worker():
        launch(settings.workers)
        return
    from outsize.errors import PlanAgain

    with lasting():
        from outsize.training import train as run

    try:
        report = run(settings)
    except PlanAgain:
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)  # the same command, which goes on where it stopped
    if report and settings.json:
        print(json.dumps({"report": report}))
    elif report:
        print(f"Done. {settings.out}/report.md says how it went; the model is in {settings.out}/model.")


SETTING = {"json_lines": "json", "optimizer_option": "optimizer_options"}
"""Parameters that are named for the command line, and what they set."""


def _settings(context: typer.Context, resume: Path | None, told: dict[str, Any]) -> TrainSettings:
    """What was told, by parameter; with `resume`, what that run was told before, and only what the command line itself says
    now.

    Raises OptionError when something is missing or cannot be read, RunError when `resume` is no run."""
    from outsize.train.settings import TrainSettings, continued, read_settings

    for name in ("memory", "device_memory"):
        told[name] = parse_size(told[name]) if told[name] else None
    told["optimizer_option"] = read_options(told["optimizer_option"] or [])
    if resume is not None:
        told = {name: value for name, value in told.items() if was_given(context, name)}
        if "out" in told:
            raise OptionError("--resume names the run's folder; --out would name another. Give one of them.")
    else:
        missing = [f"--{name}" for name in ("model", "data", "out") if told[name] is None]
        if missing:
            raise OptionError(f"{', '.join(missing)} is missing. To continue a run, --resume RUN is enough.")
    values = {SETTING.get(name, name): value for name, value in told.items()}
    return TrainSettings(**values) if resume is None else continued(read_settings(resume), values)
