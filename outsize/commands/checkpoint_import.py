"""`outsize checkpoint import`: others' weights and optimizer state as a folder that `outsize train` begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outsize.commands.common import Json, interruptible


def import_checkpoint(
    source: Annotated[
        Path,
        typer.Argument(
            help="A model folder, a Trainer's checkpoint, an export, a .safetensors or torch.save file, or a folder of "
            "torch.distributed.checkpoint.",
            show_default=False,
        ),
    ],
    to: Annotated[Path, typer.Option(help="A new folder. It appears complete or not at all.")],
    model: Annotated[
        str | None, typer.Option(help="The model that it is of, for configuration and tokenizer, if SOURCE lacks them.")
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's state behind.")] = False,
    compress: Annotated[bool, typer.Option("--compress", help="Pack without loss; without it, unpack.")] = False,
    json_lines: Json = False,
) -> None:
    """Make a model folder of others' weights and optimizer state. Nothing in the source is ever run.

    Example: outsize checkpoint import theirs.pt --model Qwen/Qwen3-0.6B --to begin

    Then: outsize train --model begin --optimizer-state begin --data notes.txt --out runs/first
    """
    from outsize.train.import_foreign import import_foreign

    with interruptible(f"{to} was not written."):
        done = import_foreign(source, model, to, weights_only=weights_only, compress=compress)
    if json_lines:
        print(json.dumps({"to": str(to), "parameters": done.parameters, "optimizer_states": done.states}))
        return
    begin = f"outsize train --model {to}" + (f" --optimizer-state {to}" if done.states else "")
    state = f", the optimizer's state of {done.states}" if done.states else ", no optimizer's state"
    print(f"{to} has {done.parameters} parameters{state}. Begin with it: {begin} ...")
