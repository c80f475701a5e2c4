"""`outsize train`: the command line of `outsize.api.train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from outsize.commands.common import Json, Memory, Model, interruptible
from outsize.errors import OptionError
from outsize.sizes import parse_size


def train(
    model: Model,
    data: Annotated[Path, typer.Option(help="A .txt, .md, .jsonl or .parquet file, or a folder of such.")],
    out: Annotated[Path, typer.Option(help="Folder of the run. The same command on it continues where it stopped.")],
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
    optimizer_option: Annotated[
        list[str] | None, typer.Option(help="name=value for the optimizer's class; may be given several times.")
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
    recompute: Annotated[str, typer.Option(help="auto, all or none: activations recomputed in backward.")] = "auto",
    commit_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between commits. State on disk is committed every step for free.")
    ] = None,
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
    json_lines: Json = False,
) -> None:
    """Fine-tune a model within a memory budget. State lives on disk where it does not fit.

    Example: outsize train --model my-model --data notes.txt --memory 4GiB --out runs/first
    """
    limit = parse_size(memory) if memory else None
    options = _options(optimizer_option or [])
    from outsize.api import TrainSettings
    from outsize.api import train as run

    settings = TrainSettings(
        model=model,
        data=data,
        out=out,
        memory=limit,
        steps=steps,
        sequence_length=sequence_length,
        batch_size=batch_size,
        accumulate=accumulate,
        precision=precision,
        moments=moments,
        optimizer=optimizer,
        optimizer_options=options,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        clip=clip,
        loss=loss,
        recompute=recompute,
        commit_every=commit_every,
        eval_data=eval_data,
        eval_every=eval_every,
        sample_prompt=sample_prompt,
        sample_every=sample_every,
        seed=seed,
        block_class=block_class,
        plan=plan,
        json=json_lines,
    )
    with interruptible("The same command continues at the last committed step."):
        report = run(settings)
    if json_lines:
        print(json.dumps({"report": report}))
    else:
        print(f"Done. {out}/report.md says how it went; the model is in {out}/model.")


def _options(pairs: list[str]) -> dict[str, Any]:
    """name=value pairs; values are read as JSON where they are JSON, so that 0.9, true and [0.9, 0.99] mean that."""
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise OptionError(f"--optimizer-option {pair!r} is not of the form name=value, such as weight_decay=0.1.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
