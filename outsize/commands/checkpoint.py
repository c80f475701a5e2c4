"""`outsize checkpoint`: the steps that a run's state holds. Other files of this folder add commands to `app`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.commands.common import Json
from outsize.errors import DamageError, RunError
from outsize.sizes import format_size

if TYPE_CHECKING:
    from outsize.train.state import StateFolder
    from outsize.train.verify import Verdict

app = typer.Typer(name="checkpoint", no_args_is_help=True, help="List, check, keep and go back to steps of a run.")

Run = Annotated[Path, typer.Argument(help="The run's folder, as given to outsize train --out.", show_default=False)]
Step = Annotated[int, typer.Argument(help="A kept step.", show_default=False)]
AnyStep = Annotated[int | None, typer.Argument(help="A kept step, or the committed one.", show_default=False)]


def open_state(run: Path) -> StateFolder:
    """The state of a run's folder, or of one that `outsize.attach` was given. Raises RunError when there is none."""
    from outsize.train.state import StateFolder

    directory = run / "state" if (run / "state").is_dir() else run
    if not (directory / "layout").exists():
        raise RunError(f"{run} holds no run of Outsize: there is no {directory}/layout.")
    return StateFolder(directory)


@app.command("list")
def list_steps(run: Run, json_lines: Json = False) -> None:
    """Say which step is committed and which are kept. Works while the run goes on."""
    from outsize.train.state import kept_step

    folder = open_state(run)
    manifest = folder.read()
    steps = [] if manifest is None else [{"step": manifest.step, "why": "committed"}]
    for name in folder.kept_names():
        steps.append({"step": kept_step(name), "why": "kept, newest commits" if name.startswith("last") else "kept"})
    size = folder.blocks.stat().st_size
    if json_lines:
        print(json.dumps({"steps": steps, "bytes": size}))
        return
    for line in steps:
        print(f"step {line['step']}: {line['why']}")
    print(f"{format_size(size)} on disk")


@app.command()
def verify(run: Run, step: AnyStep = None, json_lines: Json = False) -> None:
    """Compare every byte with its checksum: of all steps, or of one. Works while the run goes on.

    Exit code 1 when anything is damaged."""
    from outsize.train.verify import Verifier

    folder = open_state(run)
    verifier = Verifier(folder)
    verdicts = []
    for name in [None, *folder.kept_names()] if step is None else [_name_of(folder, step)]:
        verdict = verifier.committed() if name is None else verifier.kept(name)
        if verdict is not None:
            verdicts.append(verdict)
            _say(verdict, json_lines)
    if any(verdict.damage for verdict in verdicts):
        good = [verdict.step for verdict in verdicts if verdict.name and not verdict.damage]
        if good:
            print(f"Step {good[-1]} is whole: outsize checkpoint rollback {run} {good[-1]}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def keep(run: Run, step: AnyStep = None) -> None:
    """Keep the committed step until its file under state/kept is removed.

    While the run goes on, the next step that it commits is kept. A step that --keep-last holds can be kept for good when
    no run goes on."""
    from outsize.train.retention import PINNED

    folder = open_state(run)
    try:
        folder.lock()
    except RunError:
        if step is not None:
            raise
        folder.ask_to_keep()
        print("The run is going on: the next step that it commits will be kept.")
        return
    with folder:
        manifest = folder.read()
        if manifest is None:
            raise RunError(f"{run} has no committed step yet.")
        name = None if step in (None, manifest.step) else _name_of(folder, step)
        kept = manifest.step if name is None else step
        folder.keep(f"{PINNED}-{kept}", name)
    print(f"Step {kept} is kept.")


@app.command()
def rollback(run: Run, step: Step) -> None:
    """Go back to a kept step: the run continues from there with the numbers it had. Its bytes are compared first.

    Steps after it that were not kept are gone. The kept step stays kept."""
    from outsize.train.verify import Verifier

    with open_state(run).lock() as folder:
        name = _name_of(folder, step, committed=False)
        assert name is not None
        damage = Verifier(folder).kept(name).damage
        if damage:
            raise DamageError(f"{damage[0]} Step {step} was not restored; the committed step is as it was.")
        folder.roll_back(name)
    print(f"{run} continues after step {step}.")


def _name_of(folder: StateFolder, step: int | None, committed: bool = True) -> str | None:
    """The name under which a step is kept; None if it is the committed one. Raises RunError when it is neither."""
    from outsize.train.state import kept_step

    kept = {kept_step(name): name for name in folder.kept_names()}
    manifest = folder.read() if committed else None
    if manifest is not None and manifest.step == step:
        return None
    if step not in kept:
        known = ", ".join(map(str, kept)) or "none"
        raise RunError(f"Step {step} is not kept in {folder.directory}. Kept steps: {known}.")
    return kept[step]


def _say(verdict: Verdict, json_lines: bool) -> None:
    if json_lines:
        print(json.dumps({"step": verdict.step, "kept": verdict.name is not None, "damage": verdict.damage}))
        return
    what = f"step {verdict.step} ({'committed' if verdict.name is None else 'kept'})"
    print(f"{what}: whole" if not verdict.damage else f"{what}: damaged")
    for damage in verdict.damage:
        print(f"  {damage}")
