"""`outsize generate`: the command line of `outsize.api.generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from outsize.commands.common import Json, Memory, Model, interruptible
from outsize.sizes import parse_size


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    memory: Memory = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for weights that stream; the system's own otherwise.")
    ] = None,
    json_lines: Json = False,
) -> None:
    """Continue a text with a model that may be bigger than memory.

    Example: outsize generate --model runs/first/model --memory 1GiB --prompt "The with statement"
    """
    limit = parse_size(memory) if memory else None
    from outsize.api import generate as run

    def show(text: str) -> None:
        print(text, end="", flush=True)

    with interruptible("Nothing was kept."):
        text = run(
            model,
            prompt,
            memory=limit,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            scratch=scratch,
            chat=chat,
            stream=None if json_lines else show,
        )
    print(json.dumps({"prompt": prompt, "text": text}) if json_lines else "")
