"""Options that several commands share, and how each of them ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from outsize.distributed.launch import says_for_all
from outsize.errors import OptionError

Model = Annotated[str, typer.Option(help="A Hugging Face folder, a .gguf file, or a hub id.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak memory of the whole process, such as 4GiB or 800MiB. Without it: what is free now."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable lines only.")]


class Terminated(KeyboardInterrupt):
    """Somebody asked the process to end, with SIGTERM; treated as Ctrl-C, so that scratch files do not stay behind."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


@contextmanager
def interruptible(what_now: str) -> Iterator[None]:
    """Ctrl-C, or SIGTERM, ends the process at once with one line and exit code 130, or 143."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        if says_for_all():
            print(f"\noutsize: stopped. {what_now}", file=sys.stderr, flush=True)
        # Transfers may be under way: nothing of a step that was not committed matters.
        os._exit(143 if isinstance(stop, Terminated) else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


def read_options(pairs: list[str]) -> dict[str, Any]:
    """name=value pairs; values are read as JSON where they are JSON, so that 0.9, true and [0.9, 0.99] mean that.

    Raises OptionError for what is no pair."""
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


def was_given(command: typer.Context, name: str) -> bool:
    """The command line says what the parameter `name` is to be."""
    source = command.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"  # typer has its own copy of click's enumeration
