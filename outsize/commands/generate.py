"""`outsize generate`: one prompt on the screen, or a file of them into a file of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from outsize.commands import serving_options as options
from outsize.commands.common import Json, Memory, Model, interruptible
from outsize.errors import OptionError


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help='JSON lines, each with "prompt" or "messages" and perhaps options.')
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="Answers as JSON lines; run again, it goes on with what is missing.")
    ] = None,
    memory: Memory = None,
    context: options.Context = None,
    weights: options.Weights = "stored",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the model's chat template.")] = False,
    scratch: options.Scratch = None,
    workers: options.Workers = 1,
    worker_timeout: options.WorkerTimeout = 30.0,
    json_lines: Json = False,
) -> None:
    """Continue a text, or a file of them, with a model that may be bigger than memory.

    Example: outsize generate --model runs/first/model --memory 1GiB --prompt "The with statement"
    """
    if (prompt is None) == (input_file is None) or (input_file is None) != (output_file is None):
        raise OptionError("Give either --prompt, or --input and --output.")
    what_now = "What is in the output file stays; the same command goes on." if output_file else "Nothing was kept."
    if options.starts(workers, what_now):
        return
    from outsize.serve.batch import answer_file
    from outsize.serve.chat import chat_tokens
    from outsize.serving import Engine, Sampling, follow

    sampling = Sampling(max_new_tokens, temperature, top_p=top_p, seed=seed)
    concurrency = 1 if prompt is not None else None
    asked: dict[str, Any] = {"memory": memory, "context": context, "concurrency": concurrency}
    asked |= {"weights": weights, "scratch": scratch}
    with interruptible(what_now), options.joined(worker_timeout, what_now) as group:
        if group.rank:
            follow(group, model, **asked)
            return
        with Engine(model, **asked, group=group) as engine:
            if input_file is not None and output_file is not None:
                count = answer_file(engine, input_file, output_file, sampling)
                print(json.dumps({"answered": count}) if json_lines else f"{count} answers in {output_file}")
                return
            assert prompt is not None
            given = chat_tokens(engine.tokenizer, [{"role": "user", "content": prompt}]) if chat else prompt
            text = ""
            for event in engine.stream(given, sampling):
                text += event.text
                print("" if json_lines else event.text, end="", flush=True)
            print(json.dumps({"prompt": prompt, "text": text}) if json_lines else "")
