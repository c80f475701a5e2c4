"""A small store whose blocks are known at every step, committed in a state folder as a run does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from outsize.errors import OutsizeError
from outsize.memory.block import make_block
from outsize.memory.homes import Committed
from outsize.memory.store import Store
from outsize.memory.tier import PAGE
from outsize.plan import Plan
from outsize.train.retention import Retention
from outsize.train.state import StateFolder, kept_step, open_store
from outsize.train.verify import Verifier

PLAN = Plan("fp32", 12 * PAGE, device_bytes=100 * PAGE)
BLOCKS = {"frozen": 1, "near": 1, "a": 1, "b": 2, "c": 3, "d": 1, "more": 2}  # pages; the first changes in step 0 only
HOMES = {"near": "device", "more": "device", "b": "host", "d": "host"}
"""Others live on disk. These are written while the next step begins: from where they stay, or from the host's memory, where b
is leased."""


def value_at(name: str, step: int) -> int:
    """Which byte fills the block after `step`. Most blocks change in every step; d in every third only."""
    since = {"frozen": 0, "d": step - step % 3}.get(name, step)
    return (37 * list(BLOCKS).index(name) + 11 * since) % 251 + 1


class Tiny:
    """A state folder with a store over it. `told("begun" or "done", step, kept names)` hears of every commit."""

    def __init__(self, directory: Path, told: Callable[..., None] = lambda *note: None) -> None:
        self.folder, self.told = StateFolder(directory).lock(), told
        self.store: Store = open_store(PLAN, self.folder)
        self.step = -1
        manifest = self.folder.read()
        for name, pages in BLOCKS.items():
            half = PAGE // 2
            parts = [("first", "weight", torch.uint8, (half,)), ("rest", "moment", torch.uint8, (pages * PAGE - half,))]
            block = make_block(name, parts)
            self.store.create(block, HOMES.get(name, "disk"), stays=name == "b")
        self.store.create(make_block("scratch", [("data", "gradient", torch.uint8, (PAGE,))]), "disk", durable=False)
        if manifest is None:
            self.folder.write_layout(self.store)
        else:
            self.folder.check_layout(self.store)
            self.step = manifest.step

    def advance(self, retention: Retention = Retention(), asked: bool = False, wait: bool = False) -> None:  # noqa: B008
        """One step and its commit, which later writes may overtake on the way but not on disk."""
        self.step += 1
        step = self.step
        for name in [*BLOCKS, "scratch"]:
            if name == "scratch" or step == 0 or value_at(name, step) != value_at(name, step - 1):
                with self.store.lease(name, fresh=True) as lease:
                    lease.bytes.fill_(value_at(name, step) if name in BLOCKS else step)
        keep, drop = retention.choose(step, self.folder.kept_names(), asked)
        self.told("begun", step, keep, drop)

        def write(places: dict[str, Committed]) -> None:
            self.folder.write_manifest(step, places, {"optimizer": []}, keep, drop)
            self.told("done", step, keep, drop)

        self.store.commit(write, wait, keep, drop)

    def read(self) -> dict[str, torch.Tensor]:
        found = {}
        for name in BLOCKS:
            with self.store.lease(name) as lease:
                found[name] = lease.bytes.clone()
        return found

    def assert_right(self) -> None:
        """Every byte is that of the step, near and through the store's own reads."""
        for name, found in self.read().items():
            assert torch.all(found == value_at(name, self.step)), f"{name} is not of step {self.step}"

    def close(self) -> None:
        self.store.close()
        self.folder.close()


@contextmanager
def tiny(directory: Path, told: Callable[..., None] = lambda *note: None) -> Iterator[Tiny]:
    opened = Tiny(directory, told)
    try:
        yield opened
    finally:
        opened.close()


def assert_kept_right(directory: Path) -> list[int]:
    """Every kept step is whole and has the numbers of that step. Returns them."""
    folder = StateFolder(directory)
    content = folder.blocks.read_bytes()
    for name in folder.kept_names():
        assert Verifier(folder).kept(name).damage == (), name
        for block, place in folder.read_kept(name).places.items():
            assert place.extent is not None
            held = content[place.extent.start : place.extent.end]
            assert set(held) == {value_at(block, kept_step(name))}, (name, block)
    return [kept_step(name) for name in folder.kept_names()]


def whole_state(directory: Path) -> Path:
    with tiny(directory) as state:
        for step in range(5):
            state.advance(asked=step == 3, wait=True)
    return directory


def flip(path: Path, byte: int, mask: int) -> None:
    with open(path, "r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ mask
        file.seek(byte)
        file.write(bytes([value]))


def detected(directory: Path) -> bool:
    folder = StateFolder(directory)
    try:
        verifier = Verifier(folder)
        verdicts = [verifier.committed(), *(verifier.kept(name) for name in folder.kept_names())]
        return any(verdict is None or verdict.damage for verdict in verdicts)
    except OutsizeError:
        return True


def flips(directory: Path, count: int, seed: int) -> int:
    """Flip one bit after another, in manifests, layout and committed data; returns how many nobody noticed."""
    choice = Random(seed)
    folder = StateFolder(directory)
    manifests = [folder.read(), *(folder.read_kept(name) for name in folder.kept_names())]
    extents = [place.extent for manifest in manifests if manifest for place in manifest.places.values() if place.extent]
    small = [directory / "manifest", directory / "layout", *(folder.kept / name for name in folder.kept_names())]
    missed = 0
    for number in range(count):
        if number % 2:
            path = choice.choice(small)
            byte = choice.randrange(path.stat().st_size)
        else:
            extent = choice.choice(extents)
            path, byte = folder.blocks, choice.randrange(extent.start, extent.end)
        mask = 1 << choice.randrange(8)
        flip(path, byte, mask)
        missed += not detected(directory)
        flip(path, byte, mask)
    return missed
