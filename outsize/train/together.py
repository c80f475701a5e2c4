"""The state of a run of several workers: a folder for each, `worker-0-of-2`, whose manifests must be of one step.

No worker writes over the step before the last until all have committed the last one (docs/workers.md). So after any crash
there is a newest step that all have: each has its own newest, or the one before it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outsize.distributed.group import Group
from outsize.errors import RunError
from outsize.memory.block import Block
from outsize.memory.disk import DiskTier
from outsize.train.checkpoint import Checkpoint, Entry, Extents, nobody_writing, open_checkpoint
from outsize.train.import_state import bring_optimizer
from outsize.train.job import Job, Read
from outsize.train.manifest import Layout, Manifest
from outsize.train.optimizer_file import OptimizerState, ParameterState
from outsize.train.state import StateFolder

_NAME = re.compile(r"worker-(\d+)-of-(\d+)")
Steps = dict[int, dict[int, list[int]]]
"""Of runs by number of workers, for each worker: the steps to which its folder can go."""


def folders_of(state: Path, workers: int) -> list[Path]:
    """Where so many workers have their state."""
    if workers == 1:
        return [state]
    return [state / f"worker-{rank}-of-{workers}" for rank in range(workers)]


def seen_here(state: Path, several: bool) -> Steps:
    """What this machine's folder `state` holds; of a single worker alone, nothing that this must know."""
    found: Steps = {}
    if (state / "manifest").exists() and (several or any(state.glob("worker-*-of-*"))):
        found[1] = {0: _steps(state)}
    for folder in state.glob("worker-*-of-*"):
        name = _NAME.fullmatch(folder.name)
        if name is not None and (folder / "manifest").exists():
            found.setdefault(int(name[2]), {})[int(name[1])] = _steps(folder)
    return found


def _steps(folder: Path) -> list[int]:
    """Raises RunError when the folder is damaged."""
    return list(StateFolder(folder).recoverable())


@dataclass(frozen=True)
class Committed:
    """The newest step that all workers of some number have committed."""

    workers: int
    step: int


def newest(group: Group, state: Path) -> Committed | None:
    """What the run's workers, however many they were, have committed last. Raises RunError when there is no such step."""
    found: Steps = {}
    for seen in group.tell(seen_here(state, group.size > 1)):
        for workers, steps in seen.items():
            found[workers] = found.get(workers, {}) | steps
    whole = [_common(workers, steps) for workers, steps in found.items() if len(steps) == workers]
    last = max(whole, key=lambda committed: (committed.step, committed.workers == group.size), default=None)
    for workers, steps in found.items():
        _check_missing(workers, steps, 0 if last is None else last.step)
    return last


def _check_missing(workers: int, steps: dict[int, list[int]], known: int) -> None:
    """Folders of too few workers are what is left of an older number of them, or of a run killed before its first commit;
    with newer steps, one has been lost."""
    lacking = [rank for rank in range(workers) if rank not in steps]
    step = min((max(own) for own in steps.values()), default=0)
    if lacking and step > known:
        raise RunError(
            f"The state of worker {lacking[0]} of {workers} is missing, and the others are at step {step}. Bring its disk "
            f"or folder worker-{lacking[0]}-of-{workers} back, or choose another --out."
        )


def _common(workers: int, steps: dict[int, list[int]]) -> Committed:
    step = min(max(own) for own in steps.values())
    lacking = [rank for rank, own in steps.items() if step not in own]
    if lacking:
        raise RunError(
            f"Worker {lacking[0]} of {workers} has committed steps {steps[lacking[0]]}, and another one only step {step}: "
            "their folders are not of one run. Restore them together."
        )
    return Committed(workers, step)


def settle(group: Group, state: Path, own: StateFolder) -> Committed | None:
    """Make this worker's folder `own` that of the newest step that all have. When that was committed by another number of
    workers, it is returned, to be brought back. Raises RunError."""
    committed = newest(group, state)
    moved = committed if committed is not None and committed.workers != group.size else None
    if moved is not None or group.size > 1:
        _go_to(own, None if moved is not None or committed is None else committed.step)
    return moved


def _go_to(own: StateFolder, step: int | None) -> None:
    """Make this worker's folder that of the step that all have; of none, when there is no such step."""
    found = own.recoverable()
    if step is None:
        if own.kept_names() or own.packed_steps():
            raise RunError(
                f"{own.directory} has steps that were kept when as many workers went on. Export them, and remove the folder."
            )
        own.begin_again()
    elif found[step].name != "manifest":
        own.go_back(found[step].read_bytes())


# -- as many workers as there were, seen as one ------------------------------------------------------------------------


class _Several:
    """Blocks of several folders."""

    def __init__(self) -> None:
        self._by_block: dict[str, Extents] = {}

    def add(self, manifest: Manifest, disk: DiskTier) -> None:
        extents = Extents(manifest, disk)
        for block in manifest.layout.blocks:
            self._by_block.setdefault(block.name, extents)

    def holds(self, block: Block) -> bool:
        return self._by_block[block.name].holds(block)

    def read(self, block: Block, offset: int, out: torch.Tensor) -> None:
        self._by_block[block.name].read(block, offset, out)


@contextmanager
def open_together(state: Path, committed: Committed) -> Iterator[Checkpoint]:
    """The committed step of so many workers as logical entries. Raises RunError when a worker's folder is not here, or a
    run goes on in it."""
    bytes_of, blocks, optimizer, shapes, facts = _Several(), {}, [], {}, {}
    with ExitStack() as stack:
        for folder in map(StateFolder, folders_of(state, committed.workers)):
            if not stack.enter_context(nobody_writing(folder)):
                raise RunError(f"{folder.directory} is in use by another process. Wait for it.")
            path = folder.find(committed.step)
            if path is None:
                raise RunError(
                    f"{folder.directory} is not on this machine, or has no step {committed.step}. Whoever reads what several "
                    "workers have written needs the folders of all: copy them here, or give as many workers as before."
                )
            manifest = Manifest.read(path, folder.layout())
            disk = stack.enter_context(DiskTier(folder.blocks, 1 << 62, writable=False))
            bytes_of.add(manifest, disk)
            blocks |= {block.name: block for block in manifest.layout.blocks}
            optimizer += manifest.facts["optimizer"]
            shapes |= manifest.facts.get("shapes", {})  # of one leg they are not those of another
            facts = facts or manifest.facts
        layout = Layout(tuple(blocks.values()))
        yield Checkpoint(
            Manifest(committed.step, layout, {}, {**facts, "optimizer": optimizer, "shapes": shapes}), bytes_of
        )


@contextmanager
def open_step(folder: StateFolder, step: int | None = None) -> Iterator[Checkpoint]:
    """The committed step, or a kept one, of one worker or several. Raises RunError when there is no such step."""
    committed = newest(Group(), folder.directory)
    if committed is None or committed.workers == 1:
        with open_checkpoint(folder, step) as checkpoint:
            yield checkpoint
        return
    with open_together(folder.directory, replace(committed, step=committed.step if step is None else step)) as found:
        yield found


def folders_of_run(state: Path) -> list[StateFolder]:
    """Of each worker that has committed the newest step, in their order. Raises RunError when one of them is missing."""
    committed = newest(Group(), state)
    if committed is None and any(state.glob("worker-*-of-*")):
        raise RunError(f"{state} has no step yet that all workers have committed.")
    return [StateFolder(folder) for folder in folders_of(state, 1 if committed is None else committed.workers)]


def bring_back(state: Path, committed: Committed, bind: Callable[[Read], Job]) -> Job:
    """A job of this worker as the others, of another number, have left it; `bind` makes it with weights that are read."""
    with open_together(state, committed) as before:
        job = bind(before.read_master)
        bring_optimizer(job.updater, job.weights, optimizer_of(before))
        job.step_number = before.step
    return job


def retire(state: Path, keep: int) -> None:
    """The run goes on with `keep` workers: forget the committed state of other numbers; steps that were kept stay."""
    for workers in seen_here(state, several=True):
        if workers != keep:
            for folder in folders_of(state, workers):
                _retire(StateFolder(folder))


def _retire(folder: StateFolder) -> None:
    kept = folder.kept_names() or folder.packed_steps()
    folder.begin_again()
    if kept:
        return
    for path in (folder.blocks, folder.directory / "layout"):
        path.unlink(missing_ok=True)
    if _NAME.fullmatch(folder.directory.name):
        shutil.rmtree(folder.directory, ignore_errors=True)


# -- the optimizer's state as if out of files --------------------------------------------------------------------------


@dataclass(frozen=True)
class EntryTensor:
    """A tensor of a checkpoint's optimizer."""

    checkpoint: Checkpoint
    entry: Entry
    path: Path = Path("state")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = self.entry.shape[0] if self.entry.shape else 1
        return self.checkpoint.read(self.entry, start, rows if stop is None else stop)


@dataclass(frozen=True)
class ScalarTensor:
    """A counter of a checkpoint's optimizer."""

    value: torch.Tensor
    path: Path = Path("state")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self.value


def optimizer_of(checkpoint: Checkpoint) -> OptimizerState:
    """What `import_state.bring_optimizer` brings."""
    states = {
        name: ParameterState(
            {key: EntryTensor(checkpoint, entry) for key, entry in found.tensors.items()}
            | {key: ScalarTensor(value) for key, value in found.scalars.items()},
            found.numbers,
            found.group,
        )
        for name, found in checkpoint.optimizer.items()
    }
    return OptimizerState(checkpoint.step, (), states)
