"""`outsize checkpoint export`: a committed or kept step as files that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outsize.commands.checkpoint import AnyStep, Run, open_state
from outsize.commands.common import Json, interruptible
from outsize.sizes import format_size


def export(
    run: Run,
    to: Annotated[Path, typer.Option(help="A new folder. It appears complete or not at all.")],
    step: AnyStep = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Also the optimizer's state, by parameter name. Implies --masters.")
    ] = False,
    masters: Annotated[
        bool, typer.Option("--masters", help="Weights in fp32 where the run keeps that, not as the model computes.")
    ] = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="Pack without loss. Outsize reads it; import makes safetensors of it.")
    ] = False,
    json_lines: Json = False,
) -> None:
    """Write a step as safetensors that transformers loads. Needs no GPU, no model and some 500 MiB.

    Example: outsize checkpoint export runs/first --to first-model --optimizer
    """
    from outsize.api import export_run

    folder = open_state(run, several=True)
    with interruptible(f"{to} was not written."):
        done = export_run(run, folder, step, to, optimizer=optimizer, masters=masters, compress=compress)
    if json_lines:
        said = {
            "to": str(to), "step": done.step, "dtype": done.dtype, "weight_bytes": done.weight_bytes,
            "optimizer_bytes": done.optimizer_bytes, "written_bytes": done.written_bytes,
        }  # fmt: skip
        print(json.dumps(said))
        return
    what = f"weights in {done.dtype}, {format_size(done.weight_bytes)}"
    what += f"; optimizer state, {format_size(done.optimizer_bytes)}" if optimizer else ""
    print(f"Step {done.step} is in {to}: {what}; {format_size(done.written_bytes)} on disk.")
