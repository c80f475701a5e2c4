"""Options that several commands share, and how each of them ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="A Hugging Face folder, a .gguf file, or a hub id.")]
Memory = Annotated[
    str | None,
    typer.Option(help="Peak memory of the whole process, such as 4GiB or 800MiB. Without it: what is free now."),
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
