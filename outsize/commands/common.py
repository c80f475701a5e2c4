"""Options that several commands share, and how each of them ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from outsize.errors import OptionError

Model = Annotated[str, typer.Option(help="A Hugging Face folder, a .gguf file, or a hub id.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak memory of the whole process, such as 4GiB or 800MiB. Without it: what is free now."),
]
OptimizerOption = Annotated[
    list[str] | None, typer.Option(help="name=value for the optimizer's class; may be given several times.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable lines only.")]


@contextmanager
def interruptible(what_now: str) -> Iterator[None]:
    """Ctrl-C ends the process at once with exit code 130 and one line."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\noutsize: stopped. {what_now}", file=sys.stderr, flush=True)
        os._exit(130)  # transfers may be under way: nothing of a step that was not committed matters


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
