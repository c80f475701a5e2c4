"""`outsize checkpoint diff`: what two steps do not have in common."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outsize.commands.checkpoint import open_state
from outsize.commands.common import Json
from outsize.errors import OptionError

if TYPE_CHECKING:
    from outsize.train.difference import Difference

Side = Annotated[str, typer.Argument(help="A run's folder, or FOLDER@STEP for a kept step.", show_default=False)]


def diff(
    first: Side,
    second: Side,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="Compare the optimizer's tensors too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    json_lines: Json = False,
) -> None:
    """Say what differs between two steps: settings, and parameters by the norm of their difference, largest first.

    Example: outsize checkpoint diff runs/first@100 runs/first
    """
    from outsize.train.difference import differences, differing_settings
    from outsize.train.together import open_step

    sides = [_parse(side) for side in (first, second)]
    settings = differing_settings(*(_settings(run) for run, _ in sides))
    with ExitStack() as stack:
        one, other = (stack.enter_context(open_step(open_state(run, several=True), step)) for run, step in sides)
        found = sorted(
            differences(one, other, optimizer),
            key=lambda each: each.distance if each.distance == each.distance else inf,
            reverse=True,
        )
        compared = sorted({*one.weights, *other.weights})
        steps = one.step, other.step
    if json_lines:
        _print_json(steps, settings, found, len(compared))
    else:
        _print_table(steps, settings, found, len(compared), limit)


def _parse(side: str) -> tuple[Path, int | None]:
    run, at, step = side.rpartition("@")
    if not at or Path(side).exists():
        return Path(side), None
    if not step.isdigit():
        raise OptionError(f"{side}: behind @ there must be a step's number, such as runs/first@100.")
    return Path(run), int(step)


def _settings(run: Path) -> dict[str, Any]:
    """Those that its run.json has; none for the state of `outsize.attach`."""
    from outsize.train.settings import read_settings

    return read_settings(run).plain() | {"out": None} if (run / "run.json").exists() else {}


def _print_json(
    steps: tuple[int, int], settings: dict[str, tuple[Any, Any]], found: list[Difference], compared: int
) -> None:
    lines = [{key: _plain(value) for key, value in asdict(each).items()} for each in found]
    same = not found and not settings
    said = {"steps": steps, "settings": settings, "parameters": compared, "differences": lines, "same": same}
    print(json.dumps(said))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value


def _print_table(
    steps: tuple[int, int], settings: dict[str, tuple[Any, Any]], found: list[Difference], compared: int, limit: int
) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    for name, (one, other) in settings.items():
        console.print(f"{name}: {one} and {other}", markup=False, highlight=False)
    differing = len({each.name for each in found})
    console.print(f"step {steps[0]} and step {steps[1]}: {differing} of {compared} parameters differ", highlight=False)
    if not found:
        return
    table = Table(Column("tensor", overflow="fold"), "", "difference", "of its norm", "largest element", box=None)
    for each in found[:limit]:
        what = each.note or f"{each.distance:.4g}"
        numbers = ("", "") if each.note else (f"{each.relative:.3g}", f"{each.largest:.3g}")
        table.add_row(each.name, "" if each.what == "weight" else each.what, what, *numbers)
    console.print(table)
    if len(found) > limit:
        console.print(f"and {len(found) - limit} more (--limit)", highlight=False)
