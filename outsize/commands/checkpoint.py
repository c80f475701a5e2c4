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
    from outsize.train.state import Held, StateFolder
    from outsize.train.verify import Verdict

app = typer.Typer(name="checkpoint", no_args_is_help=True, help="List, check, keep and go back to steps of a run.")

Run = Annotated[Path, typer.Argument(help="The run's folder, as given to outsize train --out.", show_default=False)]
Step = Annotated[int, typer.Argument(help="A kept step.", show_default=False)]
AnyStep = Annotated[int | None, typer.Argument(help="A kept step, or the committed one.", show_default=False)]


def open_state(run: Path, several: bool = False) -> StateFolder:
    """The state of a run's folder, or of one that `outsize.attach` was given; `several`: also of a run of several workers.
    Raises RunError when there is none."""
    from outsize.train.state import StateFolder

    directory = run / "state" if (run / "state").is_dir() else run
    if not directory.is_dir():
        raise RunError(f"{run}: there is no such folder. Give the folder of a run, as told to outsize train --out.")
    if any(directory.glob("worker-*-of-*/layout")):
        if not several:
            raise RunError(
                f"{run} is a run of several workers, of which only `outsize checkpoint export` can be asked. Bring it "
                "together first: outsize train --resume RUN --workers 1."
            )
    elif not (directory / "layout").exists():
        raise RunError(f"{run} holds no run of Outsize: there is no {directory}/layout.")
    folder = StateFolder(directory)
    folder.tidy()
    return folder


@app.command("list")
def list_steps(run: Run, json_lines: Json = False) -> None:
    """Say which step is committed and which are kept. Works while the run goes on."""
    from outsize.train.packed_step import packed_bytes
    from outsize.train.state import kept_step

    folder = open_state(run)
    manifest = folder.read()
    steps = [] if manifest is None else [{"step": manifest.step, "why": "committed"}]
    for name in folder.kept_names():
        steps.append({"step": kept_step(name), "why": "kept, newest commits" if name.startswith("last") else "kept"})
    packed = {step: packed_bytes(folder, step) for step in folder.packed_steps()}
    steps += [{"step": step, "why": f"kept, packed in {format_size(nbytes)}"} for step, nbytes in packed.items()]
    size = folder.blocks.stat().st_size + sum(packed.values())
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
    for held in [None, *folder.kept_names(), *folder.packed_steps()] if step is None else [find_step(folder, step)]:
        verdict = verifier.look_at(held)
        if verdict is not None:
            verdicts.append(verdict)
            _say(verdict, json_lines)
    if any(verdict.damage for verdict in verdicts):
        good = [verdict.step for verdict in verdicts if verdict.name and not verdict.damage]
        if good:
            print(f"Step {good[-1]} is whole: outsize checkpoint rollback {run} {good[-1]}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def keep(
    run: Run,
    step: AnyStep = None,
    compress: Annotated[
        bool, typer.Option("--compress", help="Pack the step without loss into files of its own. No run may go on.")
    ] = False,
) -> None:
    """Keep the committed step until its file under state/kept, or its folder under state/packed, is removed.

    While the run goes on, the next step that it commits is kept. A step that --keep-last holds can be kept for good when
    no run goes on."""
    folder = open_state(run)
    try:
        folder.lock()
    except RunError:
        if step is not None or compress:
            raise
        folder.ask_to_keep()
        print("The run is going on: the next step that it commits will be kept.")
        return
    with folder:
        if folder.read() is None:
            raise RunError(f"{run} has no committed step yet.")
        held = None if step is None else find_step(folder, step)
        print(_pack(folder, held) if compress else _keep(folder, held))


def _keep(folder: StateFolder, held: Held) -> str:
    from outsize.train.retention import PINNED
    from outsize.train.state import kept_step

    if isinstance(held, int):
        return f"Step {held} is kept, packed."
    manifest = folder.read()
    assert manifest is not None
    step = manifest.step if held is None else kept_step(held)
    folder.keep(f"{PINNED}-{step}", held)
    return f"Step {step} is kept."


def _pack(folder: StateFolder, held: Held) -> str:
    """Pack a step; where it was kept in extents, these are free afterwards."""
    from outsize.train.packed_step import pack_step, packed_bytes
    from outsize.train.state import kept_step

    manifest = folder.read() if held is None else folder.read_kept(held) if isinstance(held, str) else None
    if manifest is None:
        return f"Step {held} is kept, packed."
    if manifest.step not in folder.packed_steps():
        pack_step(folder, manifest)
    folder.forget(tuple(name for name in folder.kept_names() if kept_step(name) == manifest.step))
    before = sum(block.nbytes for block in manifest.layout.blocks if manifest.places[block.name].extent)
    after = packed_bytes(folder, manifest.step)
    return f"Step {manifest.step} is kept, packed: {format_size(before)} in {format_size(after)}."


@app.command()
def rollback(run: Run, step: Step) -> None:
    """Go back to a kept step: the run continues from there with the numbers it had. Its bytes are compared first.

    Steps after it that were not kept are gone. The kept step stays kept."""
    with open_state(run).lock() as folder:
        held = find_step(folder, step, committed=False)
        try:
            _roll_back(folder, held)
        except DamageError as problem:
            raise DamageError(f"{problem} Step {step} was not restored; the committed step is as it was.") from problem
    print(f"{run} continues after step {step}.")


def _roll_back(folder: StateFolder, held: Held) -> None:
    from outsize.train.packed_step import PackedStep
    from outsize.train.verify import Verifier

    if isinstance(held, int):
        PackedStep(folder, held).restore()
        return
    assert held is not None
    damage = Verifier(folder).kept(held).damage
    if damage:
        raise DamageError(damage[0])
    folder.roll_back(held)


def find_step(folder: StateFolder, step: int, committed: bool = True) -> Held:
    """How a step is there. Raises RunError when it is not."""
    from outsize.train.state import kept_step

    kept = {kept_step(name): name for name in folder.kept_names()}
    packed = folder.packed_steps()
    manifest = folder.read() if committed else None
    if manifest is not None and manifest.step == step:
        return None
    if step not in kept and step not in packed:
        known = ", ".join(map(str, sorted({*kept, *packed}))) or "none"
        raise RunError(f"Step {step} is not kept in {folder.directory}. Kept steps: {known}.")
    return kept.get(step, step)


def _say(verdict: Verdict, json_lines: bool) -> None:
    if json_lines:
        print(json.dumps({"step": verdict.step, "kept": verdict.name is not None, "damage": verdict.damage}))
        return
    what = f"step {verdict.step} ({'committed' if verdict.name is None else 'kept'})"
    print(f"{what}: whole" if not verdict.damage else f"{what}: damaged")
    for damage in verdict.damage:
        print(f"  {damage}")
