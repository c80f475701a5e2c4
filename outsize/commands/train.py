"""`outsize train`: the command line of `outsize.training.train`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outsize.commands.common import Json, Memory, OptimizerOption, interruptible, read_options
from outsize.errors import OptionError
from outsize.sizes import parse_size

if TYPE_CHECKING:
    from outsize.train.settings import TrainSettings


def train(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="A Hugging Face folder, a .gguf file, or a hub id.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A .txt, .md, .jsonl or .parquet file, or a folder of such.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run. The same command on it continues where it stopped.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder with its own settings; others given here replace them."),
    ] = None,
    memory: Memory = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in all.")] = 100,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that pass through a layer together.")] = 1,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches a step. More of them cost no more disk traffic.")
    ] = 1,
    precision: Annotated[
        str, typer.Option(help="mixed (bf16 compute, fp32 master), fp32, or bf16 (approximate).")
    ] = "mixed",
    moments: Annotated[str, typer.Option(help="fp32, or bf16 (approximate, less traffic).")] = "fp32",
    optimizer: Annotated[
        str, typer.Option(help="adamw, sgd, adafactor, muon, any torch.optim class, or a dotted path.")
    ] = "adamw",
    optimizer_option: OptimizerOption = None,
    optimizer_state: Annotated[
        Path | None,
        typer.Option(help="Begin with the optimizer's state in this folder, as outsize checkpoint export writes it."),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 2e-5,
    schedule: Annotated[
        str, typer.Option(help="cosine, linear, constant, warmup-stable-decay, rex, power, or a torch class.")
    ] = "cosine",
    warmup_steps: Annotated[int, typer.Option(min=0)] = 0,
    clip: Annotated[
        float | None, typer.Option(min=0.0, help="Largest global gradient norm. The update becomes a second pass.")
    ] = None,
    loss: Annotated[
        str, typer.Option(help="auto, blocked (over blocks of the vocabulary) or module (its own).")
    ] = "auto",
    activations: Annotated[
        str, typer.Option(help="keep, recompute or move (to disk) what forward leaves for backward; or auto.")
    ] = "auto",
    commit_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between commits. State on disk is committed every step for free.")
    ] = None,
    keeper: Annotated[
        bool,
        typer.Option(
            help="Let a small process hold the last step in memory, where all state stays there and has room twice: a "
            "crash then loses none. It costs some percent of each step."
        ),
    ] = False,
    keep_last: Annotated[int, typer.Option(min=0, help="Keep the newest commits, to roll back to.")] = 0,
    keep_every: Annotated[
        int, typer.Option(min=0, help="Keep every k-th step. Each kept step costs as much disk as training rewrites.")
    ] = 0,
    eval_data: Annotated[Path | None, typer.Option(help="Text to evaluate on, read like --data.")] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; also after the last one.")] = 50,
    sample_prompt: Annotated[
        str | None, typer.Option(help="Let the model continue this text in the middle of training.")
    ] = None,
    sample_every: Annotated[int, typer.Option(min=0)] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    block_class: Annotated[str | None, typer.Option(help="Class of the repeated block, if it is not found.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Obey this plan, written by `outsize plan --save`; refused if it does not fit.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine that divide state and batch; --memory is for each.")
    ] = 1,
    zero: Annotated[
        int, typer.Option(min=1, max=3, help="Workers divide optimizer state (1), gradients too (2), weights too (3).")
    ] = 3,
    worker_timeout: Annotated[
        float, typer.Option(min=1.0, help="Seconds after which the others give up a worker that does not move.")
    ] = 30.0,
    json_lines: Json = False,
) -> None:
    """Fine-tune a model within a memory budget. State lives on disk where it does not fit.

    Example: outsize train --model my-model --data notes.txt --memory 4GiB --out runs/first

    Continue it: outsize train --resume runs/first --memory 2GiB
    """
    limit = parse_size(memory) if memory else None
    options = read_options(optimizer_option or [])
    told = {
        "model": model,
        "data": data,
        "out": out,
        "memory": limit,
        "steps": steps,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "precision": precision,
        "moments": moments,
        "optimizer": optimizer,
        "optimizer_options": options,
        "optimizer_state": optimizer_state,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "clip": clip,
        "loss": loss,
        "activations": activations,
        "commit_every": commit_every,
        "keeper": keeper,
        "keep_last": keep_last,
        "keep_every": keep_every,
        "eval_data": eval_data,
        "eval_every": eval_every,
        "sample_prompt": sample_prompt,
        "sample_every": sample_every,
        "seed": seed,
        "block_class": block_class,
        "plan": plan,
        "workers": workers,
        "zero": zero,
        "worker_timeout": worker_timeout,
        "json": json_lines,
    }
    from outsize.distributed.launch import is_worker, launch

    settings = _settings(context, told, resume)
    if settings.workers > 1 and not is_worker():
        with interruptible("The same command continues at the last committed step."):
            launch(settings.workers)
        return
    from outsize.training import train as run

    with interruptible("The same command continues at the last committed step."):
        report = run(settings)
    if not report:
        return
    if json_lines:
        print(json.dumps({"report": report}))
    else:
        print(f"Done. {settings.out}/report.md says how it went; the model is in {settings.out}/model.")


OTHER_NAMES = {"json": "json_lines", "optimizer_options": "optimizer_option"}


def _settings(context: typer.Context, told: dict[str, Any], resume: Path | None) -> TrainSettings:
    """What was told; with `resume`, what that run was told before, and only what the command line itself says now.

    Raises OptionError when something is missing, RunError when `resume` is no run."""
    from outsize.train.settings import TrainSettings, read_settings

    if resume is not None:
        given = {name for name in told if _was_given(context, OTHER_NAMES.get(name, name))}
        if "out" in given:
            raise OptionError("--resume names the run's folder; --out would name another. Give one of them.")
        return replace(read_settings(resume), **{name: told[name] for name in given})
    missing = [f"--{name}" for name in ("model", "data", "out") if told[name] is None]
    if missing:
        raise OptionError(f"{', '.join(missing)} is missing. To continue a run, --resume RUN is enough.")
    return TrainSettings(**told)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"  # typer has its own copy of click's enumeration
