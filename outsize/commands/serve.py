"""`outsize serve`: an HTTP server that speaks OpenAI's language."""

from __future__ import annotations

import errno
import signal
import socket
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outsize.commands import serving_options as options
from outsize.commands.common import Memory, Model, interruptible
from outsize.errors import OptionError
from outsize.sizes import parse_size

if TYPE_CHECKING:
    from outsize.serve.http import Server


def serve(
    model: Model,
    memory: Memory = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; by default only this computer can ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    step_tokens: options.StepTokens = 512,
    weights: options.Weights = "stored",
    policy: Annotated[str, typer.Option(help="Who goes first: fcfs, feedback, fair or priority.")] = "fcfs",
    name: Annotated[str | None, typer.Option(help="The model's name for clients; its file's name otherwise.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="OUTSIZE_API_KEY", help="Who asks must send one of these. Repeatable.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait before others get a 429.")] = 256,
    max_body: Annotated[str, typer.Option(help="Largest request, such as 4MiB.")] = "4MiB",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which a request must be finished.")] = 600.0,
    scratch: options.Scratch = None,
    kv_directory: Annotated[
        Path | None, typer.Option(help="Folder where keys and values of prompts outlive the server; none otherwise.")
    ] = None,
    workers: options.Workers = 1,
    worker_timeout: options.WorkerTimeout = 30.0,
) -> None:
    """Serve a model that may be bigger than memory over HTTP, as OpenAI does.

    Example: outsize serve --model runs/first/model --memory 1GiB --port 8000
    """
    try:
        from outsize.serve.http import Limits, Server
        from outsize.serve.polite import PoliteServer  # noqa: F401  which needs uvicorn
    except ImportError as problem:
        raise OptionError(
            f"Serving needs {problem.name}. Install the extra: pip install 'outsize[serve]'."
        ) from problem
    limits = Limits(parse_size(max_body), timeout, max_waiting, frozenset(api_key or ()))
    what_now = "No request is under way any more."
    if options.starts(workers, what_now):
        return
    from outsize.serving import Engine, follow

    asked: dict[str, Any] = {"memory": memory, "context": context, "concurrency": concurrency}
    asked |= {"step_tokens": step_tokens, "weights": weights, "scratch": scratch, "kv_directory": kv_directory}
    with interruptible(what_now), options.joined(worker_timeout, what_now) as group:
        if group.rank:
            follow(group, model, **asked)
            return
        listening = _listen(host, port)
        with Engine(model, **asked, policy=policy, group=group) as engine:
            for reason in engine.plan.reasons:
                typer.echo(reason, err=True)
            _run(Server(engine, name or Path(model).stem, limits, engine.plan), listening)


def _run(server: Server, listening: socket.socket) -> None:
    """Answer until a signal comes."""
    from outsize.serve.polite import PoliteServer

    typer.echo(f"running on {_address(listening)}, with a page for the browser; Ctrl-C stops it", err=True)
    if not server.limits.keys and not ip_address(listening.getsockname()[0]).is_loopback:
        typer.echo("whoever reaches this computer may ask; --api-key lets only those who have a key", err=True)
    signal.raise_signal(PoliteServer(server, listening).answer())


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded: who asks early waits, and a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as problem:
        what = str(problem.strerror).partition(" (while")[0]
        remedy = "Give another --port, or 0 for any that is free."
        if problem.errno not in (errno.EADDRINUSE, errno.EACCES):
            remedy = "Give an address of this computer as --host, or 0.0.0.0 for all it has."
        raise OptionError(f"Cannot listen at {host} port {port}: {what}. {remedy}") from problem


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
