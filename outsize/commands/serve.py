"""`outsize serve`: an HTTP server that speaks OpenAI's language."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from outsize.commands.common import Memory, Model
from outsize.errors import OptionError
from outsize.sizes import parse_size


def serve(
    model: Model,
    memory: Memory = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default only this computer can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens of prompt and answer together, at most.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences computed at once, at most.")] = 32,
    step_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed at once; prompts are cut so.")] = 512,
    policy: Annotated[str, typer.Option(help="Who goes first: fcfs, feedback, fair or priority.")] = "fcfs",
    name: Annotated[str | None, typer.Option(help="The model's name for clients; its file's name otherwise.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="OUTSIZE_API_KEY", help="Who asks must send one of these. Repeatable.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait before others get a 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Largest request, such as 4MiB.")] = "4MiB",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which a request must be finished.")] = 600.0,
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for weights that stream; the system's own otherwise.")
    ] = None,
    kv_directory: Annotated[
        Path | None, typer.Option(help="Folder where keys and values of prompts outlive the server; none otherwise.")
    ] = None,
) -> None:
    """Serve a model that may be bigger than memory over HTTP, as OpenAI does.

    Example: outsize serve --model runs/first/model --memory 1GiB --port 8000
    """
    try:
        import uvicorn

        from outsize.serve.http import Limits, Server
    except ImportError as problem:
        raise OptionError(
            f"Serving needs {problem.name}. Install the extra: pip install 'outsize[serve]'."
        ) from problem
    from outsize.serving import Engine

    limits = Limits(parse_size(max_body), timeout, max_waiting, frozenset(api_key or ()))
    with Engine(
        model,
        memory=memory,
        context=context,
        seats=concurrency,
        step_tokens=step_tokens,
        policy=policy,
        scratch=scratch,
        kv_directory=kv_directory,
    ) as engine:
        for reason in engine.plan.reasons:
            typer.echo(reason, err=True)
        app = Server(engine, name or Path(model).stem, limits).app
        uvicorn.run(app, host=host, port=port, log_level="info", access_log=False, timeout_graceful_shutdown=10)
