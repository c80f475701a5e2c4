"""`outsize checkpoint`: the steps that a run's state holds. Other files of this folder add commands to `app`."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
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
                f"{run} is a run of several workers, whose steps can be listed, verified, exported and compared, but not "
                f"changed. Bring it together first: outsize train --resume {run} --workers 1."
            )
    elif not (directory / "layout").exists():
        raise RunError(f"{run} holds no run of Outsize: there is no {directory}/layout.")
    folder = StateFolder(directory)
    folder.tidy()
    return folder


def open_states(run: Path) -> list[StateFolder]:
    """As `open_state`, the folder of each worker that the run has; of one, its own."""
    from outsize.train.together import folders_of_run

    return folders_of_run(open_state(run, several=True).directory)


@app.command("list")
def list_steps(run: Run, json_lines: Json = False) -> None:
    """Say which step is committed and which are kept. Works while the run goes on."""
    folders = open_states(run)
    found = _kept_in(folders[0])
    for other in map(_kept_in, folders[1:]):
        found = {step: why for step, why in found.items() if step in other}
    committed = [manifest.step for folder in folders if (manifest := folder.read()) is not None]
    if committed:
        step = min(committed)  # a worker alone may have committed one more
        found[step] = ["committed", *found.get(step, [])]
    steps = [{"step": step, "why": "; ".join(why)} for step, why in sorted(found.items())]
    size = sum(folder.bytes_on_disk() for folder in folders)
    if json_lines:
        print(json.dumps({"steps": steps, "bytes": size}))
        return
    for line in steps:
        print(f"step {line['step']}: {line['why']}")
    print(f"{format_size(size)} on disk" + (f" of {len(folders)} workers" if len(folders) > 1 else ""))


def _kept_in(folder: StateFolder) -> dict[int, list[str]]:
    """How each kept step is there."""
    from outsize.train.packed_step import packed_bytes
    from outsize.train.retention import RECENT
    from outsize.train.state import kept_step

    steps: dict[int, list[str]] = defaultdict(list)
    for name in folder.kept_names():
        steps[kept_step(name)].append("kept as one of the newest" if name.startswith(RECENT) else "kept")
    for step in folder.packed_steps():
        steps[step].append(f"kept, packed in {format_size(packed_bytes(folder, step))}")
    return dict(steps)


@app.command()
def verify(run: Run, step: AnyStep = None, json_lines: Json = False) -> None:
    """Compare every byte with its checksum: of all steps, or of one. Works while the run goes on.

    Exit code 1 when anything is damaged."""
    folders = open_states(run)
    verdicts = []
    for rank, folder in enumerate(folders):
        for verdict in _verdicts(folder, step):
            verdicts.append(verdict)
            _say(verdict, json_lines, rank if len(folders) > 1 else None)
    if any(verdict.damage for verdict in verdicts):
        good = [verdict.step for verdict in verdicts if verdict.name and not verdict.damage]
        if good and len(folders) == 1:
            print(f"Step {good[-1]} is whole: outsize checkpoint rollback {run} {good[-1]}", file=sys.stderr)
        raise typer.Exit(1)


def _verdicts(folder: StateFolder, step: int | None) -> Iterator[Verdict]:
    """On all steps in a folder, or on one."""
    from outsize.train.verify import Verifier

    verifier = Verifier(folder)
    for held in [None, *folder.kept_names(), *folder.packed_steps()] if step is None else [find_step(folder, step)]:
        verdict = verifier.look_at(held)
        if verdict is not None:
            yield verdict


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
    if (run / "model").exists():
        print(
            f"{run / 'model'} is still the model that was written before, until the run ends again. To have this step's: "
            f"outsize checkpoint export {run} {step} --to NEW-FOLDER"
        )


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


def _say(verdict: Verdict, json_lines: bool, worker: int | None) -> None:
    if json_lines:
        said = {"step": verdict.step, "kept": verdict.name is not None, "damage": verdict.damage}
        print(json.dumps(said if worker is None else {"worker": worker, **said}))
        return
    what = "" if worker is None else f"worker {worker}, "
    what += f"step {verdict.step} ({'committed' if verdict.name is None else 'kept'})"
    print(f"{what}: whole" if not verdict.damage else f"{what}: damaged")
    for damage in verdict.damage:
        print(f"  {damage}")
