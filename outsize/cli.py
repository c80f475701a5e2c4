"""The command line. Nothing heavy is imported before the arguments have been understood."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from outsize.commands import checkpoint
from outsize.commands.checkpoint_diff import diff
from outsize.commands.checkpoint_drop import drop
from outsize.commands.checkpoint_export import export
from outsize.commands.checkpoint_import import import_checkpoint
from outsize.commands.generate import generate
from outsize.commands.plan import plan
from outsize.commands.probe import probe
from outsize.commands.serve import serve
from outsize.commands.train import train
from outsize.distributed.launch import is_worker
from outsize.errors import OutsizeError
from outsize.machine.allocator import limit_heaps

app = typer.Typer(
    name="outsize",
    help="Fine-tune and run language models that are bigger than the memory at hand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", hidden=False)]


@app.callback()
def common(debug: Debug = False) -> None:
    """Fine-tune and run language models that are bigger than the memory at hand."""


app.command()(train)
app.command()(generate)
app.command()(plan)
app.command()(serve)
app.command()(probe)
checkpoint.app.command()(export)
checkpoint.app.command("import")(import_checkpoint)
checkpoint.app.command()(diff)
checkpoint.app.command()(drop)
app.add_typer(checkpoint.app)


def main() -> None:
    """Run the command line: errors a user can mend are one message and exit code 1."""
    limit_heaps()
    try:
        app(standalone_mode=True)
    except OutsizeError as error:
        if "--debug" in sys.argv:
            raise
        print(f"outsize: {error}", file=sys.stderr, flush=True)
        if is_worker():
            sys.stdout.flush()
            os._exit(1)  # a worker whose connections are broken is aborted by Gloo when Python takes it down
        sys.exit(1)
    finally:
        gc.freeze()  # the process ends: Python would look through all that there is several times, for a second
