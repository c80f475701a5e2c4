"""A run's state on disk: the blocks' file, the layout that says what the blocks are, and manifests that say where those
of the last committed step, and of each kept one, lie. The state *is* the checkpoint; docs/commit.md is its
specification, docs/byte.md walks through it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from outsize.distributed.group import Group
from outsize.distributed.shard import ShardedStore
from outsize.errors import RunError, StorageError
from outsize.machine.devices import CPU
from outsize.memory import shared
from outsize.memory.device import DeviceTier
from outsize.memory.disk import DiskTier
from outsize.memory.homes import Committed
from outsize.memory.host import HostTier, allocate_slab
from outsize.memory.shared import Shared
from outsize.memory.store import Store
from outsize.memory.tier import Tier
from outsize.memory.transfer import Transfers
from outsize.model.new_folder import PARTIAL, make_durable, remove_abandoned, remove_noted, sync
from outsize.plan import Plan
from outsize.train.manifest import Layout, Manifest
from outsize.train.published import Published, find_published


class StateFolder:
    """`directory` with the files blocks, layout, manifest, lock and the folders kept, packed and exports.

    `lock()` makes this process the only one that writes; reading needs no lock. Of `several` workers, to whom a step
    counts when all have committed it, the folder also has the manifest of the step before."""

    def __init__(self, directory: Path, several: bool = False) -> None:
        self.directory = directory
        self.blocks, self.kept, self.packed = directory / "blocks", directory / "kept", directory / "packed"
        self.exports = directory / "exports"
        self.published: Published | None = None
        """What `open_store` has found in a keeper's memory, at least as new as the committed step."""
        self.several = several
        self._layout: Layout | None = None
        self._lock = -1

    # -- who may write ----------------------------------------------------------------------------------------------

    def lock(self) -> StateFolder:
        """Make the folder if missing and take its lock, which dies with the process.

        Raises RunError when another process has it, StorageError when the folder cannot be written."""
        while not self._locked():
            pass  # somebody has just abandoned the folder, with the file that was opened
        self.tidy()
        for partial in self.kept.glob(f"*{PARTIAL}"):
            partial.unlink(missing_ok=True)  # a step that was to be kept when the run was killed
        return self

    def _locked(self) -> bool:
        path = self.directory / "lock"
        try:
            make_durable(self.kept)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise StorageError(
                f"{self.directory} cannot be written: {problem.strerror}. Choose another directory."
            ) from problem
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            self.close()
            raise RunError(
                f"{self.directory} is in use by another process. Wait for it, or choose another --out."
            ) from problem
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(self._lock)):
                return True
        self.close()
        return False

    def abandon(self) -> None:
        """Where no step is committed or kept, leave nothing behind, not even the folder, and let go of the lock."""
        made = {"blocks", "layout", "lock", REMEMBERED}
        with suppress(OSError):  # a disk that fails leaves more
            if set(os.listdir(self.directory)) <= {*made, "kept"} and not os.listdir(self.kept):
                for name in made:
                    (self.directory / name).unlink(missing_ok=True)
                self.kept.rmdir()
                self.directory.rmdir()
                self.close()

    def tidy(self) -> None:
        """Remove what killed processes were writing: exports, wherever they are, and packed steps."""
        remove_noted(self.exports)
        remove_abandoned(self.packed)

    def __enter__(self) -> StateFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock, if it was taken."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> Manifest | None:
        """The last committed step, or None when nothing was ever committed here. Raises RunError."""
        path = self.directory / "manifest"
        if not path.exists():
            return None
        if not self.blocks.exists():
            raise RunError(f"{self.blocks} is missing: the state was moved without it. Restore it beside {path}.")
        layout = self.layout()  # without which no kept step could help
        try:
            return Manifest.read(path, layout)
        except RunError as problem:
            raise RunError(f"{problem} {self.remedy()}") from problem

    def recoverable(self) -> dict[int, Path]:
        """Manifests by their step: the committed one and, of several workers, the one before."""
        paths = [self.directory / "manifest", self.directory / "before"]
        return {Manifest.read(path, self.layout()).step: path for path in reversed(paths) if path.exists()}

    def find(self, step: int) -> Path | None:
        """The manifest of a step that is here, and not packed."""
        kept = {kept_step(name): self.kept / name for name in self.kept_names()}
        return {**kept, **self.recoverable()}.get(step)

    def remedy(self) -> str:
        """What can be done about a damaged committed step."""
        steps = ", ".join(map(str, sorted({*map(kept_step, self.kept_names()), *self.packed_steps()})))
        if not steps:
            return "No step was kept (outsize train --keep-every, outsize checkpoint keep)."
        return (
            f"Kept steps: {steps}. outsize checkpoint verify says which are whole, outsize checkpoint rollback goes back "
            "to one."
        )

    def layout(self) -> Layout:
        """Raises RunError when there is none, or it is damaged."""
        if self._layout is None:
            self._layout = Layout.read(self.directory / "layout")
        return self._layout

    def kept_names(self) -> list[str]:
        """Names of the kept steps' manifests, in the order of their steps."""
        if not self.kept.exists():
            return []
        names = [name for name in os.listdir(self.kept) if not name.endswith(PARTIAL)]
        return sorted(names, key=kept_step)

    def packed_steps(self) -> list[int]:
        """Steps that are kept in packed form (train/packed_step.py), in their order."""
        return sorted(kept_step(path.name) for path in self.packed.glob("step-*"))

    def read_kept(self, name: str) -> Manifest:
        try:
            return Manifest.read(self.kept / name, self.layout())
        except RunError as problem:
            raise RunError(f"{problem} Removing that file gives up the kept step, and nothing else.") from problem

    def bytes_on_disk(self) -> int:
        """Of the blocks' file, and of steps that are kept packed."""
        packed = (path.stat().st_size for path in self.packed.glob("step-*/*"))
        return self.blocks.stat().st_size + sum(packed)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_layout(self, store: Store) -> None:
        """What every durable block is; written once, before the first manifest."""
        self._layout = Layout(tuple(entry.block for entry in store.entries.values() if entry.durable))
        replace_file(self.directory / "layout", self._layout.encode())

    def check_layout(self, store: Store) -> None:
        """Raises RunError unless the store's durable blocks are those of the layout."""
        known = {block.name: block for block in self.layout().blocks}
        made = {name: entry.block for name, entry in store.entries.items() if entry.durable}
        for name in [*known, *made]:
            if known.get(name) != made.get(name):
                raise RunError(
                    f"{self.directory} holds the state of another model, optimizer or precision: block {name} is "
                    f"{_describe(known.get(name))} there and {_describe(made.get(name))} here. Use its own settings "
                    "or another directory."
                )

    def write_manifest(
        self,
        step: int,
        places: dict[str, Committed],
        facts: dict[str, Any],
        keep: str | None = None,
        drop: tuple[str, ...] = (),
    ) -> None:
        """Called when all data of the step is durable. Atomic: a reader sees this step or the one before. The kept copy
        comes first, so that a committed step that should be kept is; what is let go goes last."""
        content = Manifest(step, self.layout(), places, facts).encode()
        if keep is not None:
            replace_file(self.kept / keep, content)
        manifest, before = self.directory / "manifest", self.directory / "before"
        if self.several and manifest.exists():
            before.unlink(missing_ok=True)
            os.link(manifest, before)
        replace_file(manifest, content)
        if drop:
            self.forget(drop)

    def keep(self, name: str, kept: str | None = None) -> None:
        """Keep the committed step, or one that is kept under another name. Only for a folder that no run is writing."""
        source = self.directory / "manifest" if kept is None else self.kept / kept
        replace_file(self.kept / name, source.read_bytes())

    def keep_asked(self) -> bool:
        """Somebody has asked the running process to keep the next step that it commits."""
        return (self.directory / ASKED).exists()

    def ask_to_keep(self) -> None:
        (self.directory / ASKED).touch()

    def keep_answered(self) -> None:
        (self.directory / ASKED).unlink(missing_ok=True)

    def forget(self, names: tuple[str, ...]) -> None:
        """Let kept steps go. On return it is durable: their extents may be written."""
        with _clear(self.kept):
            for name in names:
                (self.kept / name).unlink(missing_ok=True)
            sync(self.kept)

    def roll_back(self, name: str) -> None:
        """The kept step becomes the committed one."""
        self.go_back((self.kept / name).read_bytes())

    def go_back(self, manifest: bytes) -> None:
        """That of an older step becomes the committed one. What a keeper holds is given up first: it is newer."""
        shared.dismiss(self.directory)
        replace_file(self.directory / "manifest", manifest)

    def begin_again(self) -> None:
        """No step is committed here any more."""
        shared.dismiss(self.directory)
        with _clear(self.directory):
            for name in ("manifest", "before"):
                (self.directory / name).unlink(missing_ok=True)


ASKED = "keep-next"
REMEMBERED = "planned.json"  # the plan of the last start, and what it was made for


Held = str | int | None
"""How a step is there: None, it is the committed one; kept under a name; packed under its number."""


def kept_step(name: str) -> int:
    """The step of a kept manifest's name, such as "step-12"."""
    return int(name.rpartition("-")[2])


def replace_file(path: Path, content: bytes) -> None:
    """Atomic and durable: afterwards `path` has `content` whatever happens, and never anything between.

    Raises StorageError, for one when the disk is full."""
    partial = path.with_name(path.name + PARTIAL)
    with _clear(path):
        _write_durably(partial, content)
        os.replace(partial, path)
        sync(path.parent)


@contextmanager
def _clear(path: Path) -> Iterator[None]:
    """What the operating system refuses, as a message for people."""
    try:
        yield
    except OSError as problem:
        raise StorageError(
            f"{path} could not be written: {problem.strerror}. Free space or mend the disk, and start again: a run "
            "continues at its last committed step."
        ) from problem


def _write_durably(path: Path, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        while content:
            content = content[os.write(file, content) :]
        os.fsync(file)
    finally:
        os.close(file)


def _describe(block: Any) -> str:
    return (
        "missing"
        if block is None
        else ", ".join(f"{part.name} {list(part.shape)} {part.dtype}" for part in block.parts)
    )


def open_store(
    plan: Plan,
    folder: StateFolder,
    wrap_disk: Callable[[Tier], Tier] = lambda tier: tier,
    group: Group | None = None,
    device: torch.device = CPU,
) -> Store:
    """The store of a training job: an arena near, host memory, the folder's blocks on disk; whatever was committed there is
    announced. What is near lies in the host's memory, or in that of the `device` that the plan computes on. Memory that a
    keeper holds for the run is used again, if the plan shares any. `wrap_disk` puts a layer before the disk, such as one
    that throttles it. Of several workers each has a folder and a store of its own."""
    manifest = folder.read()
    found = folder.published = find_published(folder.directory, manifest)
    memory = None
    if plan.shared_bytes:
        again = found is not None and found.memory.nbytes == plan.shared_bytes
        memory = found.memory if found and again else Shared(folder.directory, plan.shared_bytes)
    row = (group or Group()).row(plan.sharers)
    host = HostTier(plan.memory_bytes or 1 << 60, pinned=device.type == "cuda")
    tiers: dict[str, Tier] = {"host": host, "disk": wrap_disk(DiskTier(folder.blocks))}
    allocate = allocate_slab
    if plan.device_bytes:
        tiers["device"] = on_device = DeviceTier(plan.device_bytes, device)
        allocate = on_device.new
    near, transfers, ahead = plan.arena_bytes, Transfers(), plan.gather_ahead_bytes
    store = ShardedStore(*(row, tiers, near, allocate, transfers, plan.near), ahead=ahead, checked=True, shared=memory)
    if manifest is not None:
        kept = {name: folder.read_kept(name).places for name in folder.kept_names()}
        store.homes.recover(
            manifest.places,
            {name: {block: p.extent for block, p in places.items() if p.extent} for name, places in kept.items()},
        )
    return store
