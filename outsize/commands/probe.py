"""`outsize probe`: what this machine can do, measured once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outsize.commands.common import Json, interruptible

if TYPE_CHECKING:
    from rich.table import Table

    from outsize.machine.machine import Machine


def probe(
    directory: Annotated[Path, typer.Option(help="Measure the disk of this directory, where runs will live.")] = Path(),
    out: Annotated[
        Path | None, typer.Option(help="Keep the figures in this file; plans read $OUTSIZE_MACHINE or the user's own.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds: rough figures, to see that all works.")
    ] = False,
    json_only: Json = False,
) -> None:
    """Measure this machine once, in about a minute: processors, memory, disk, and GPUs where there are any.

    Example: outsize probe --directory runs
    """
    from outsize.machine.file import as_table, write_machine
    from outsize.machine.find import machine_file

    path = out or machine_file()
    with interruptible("Nothing was kept."):
        machine = _measure(directory, quick, silent=json_only)
        write_machine(machine, path)
    if json_only:
        print(json.dumps({**as_table(machine), "file": str(path)}))
        return
    _show(machine, path)


def _measure(directory: Path, quick: bool, silent: bool) -> Machine:
    from rich.console import Console

    from outsize.machine.probe import probe as measure

    console = Console(stderr=True, quiet=silent)
    with console.status("importing torch") as status:
        return measure(directory, quick, lambda what: status.update(what))


def _show(machine: Machine, path: Path) -> None:
    from rich.console import Console

    from outsize.sizes import format_size

    console = Console()
    console.print(f"[bold]{machine.name}[/bold], {machine.origin}")
    held = ", ".join(f"{capacity.tier} {format_size(capacity.nbytes)}" for capacity in machine.capacities)
    console.print(f"There is: {held}.")
    console.print(_table(machine))
    for note in machine.notes:
        console.print(note, highlight=False)
    console.print(f"Kept in {path}.", highlight=False, soft_wrap=True)


def _table(machine: Machine) -> Table:
    from rich.table import Table

    from outsize.machine.quantities import MEASURES

    table = Table("figure")
    for heading in ("median", "lowest", "highest", "times"):
        table.add_column(heading, justify="right")
    for seen in machine.spreads:
        write: Any = MEASURES[seen.unit].write
        figures = [write(float(f"{value:.3g}")) for value in (seen.median, seen.lowest, seen.highest)]
        table.add_row(seen.figure, *figures, str(seen.times))
    return table
