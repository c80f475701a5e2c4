"""The step that a keeper holds in memory: how a run publishes it there, and how the next process goes on from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outsize.memory import shared
from outsize.memory.shared import Shared
from outsize.memory.store import Store
from outsize.train.manifest import Layout, Manifest


@dataclass(frozen=True)
class Published:
    """A step whose blocks lie in `memory`, with the facts that a manifest would have."""

    memory: Shared
    step: int
    facts: dict[str, Any]

    def bring(self, layout: Layout, store: Store) -> None:
        """Write the step's bytes into the blocks of a store that has them elsewhere."""
        places = self.memory.find_all(layout.blocks)
        for name, place in places.items():
            with store.lease(name, fresh=True) as lease:
                self.memory.read(place, lease.bytes)

    def give_up(self) -> None:
        """It is durable, or nobody wants it."""
        self.memory.dismiss()
        self.memory.close()


def publish(memory: Shared, layout: Layout, step: int, facts: dict[str, Any]) -> None:
    """What the blocks of `memory` hold now is `step`: a process that is killed from now on has lost nothing of it."""
    memory.publish(json.dumps({"step": step, "layout": layout.digest, "facts": facts}).encode())


def find_published(directory: Path, manifest: Manifest | None) -> Published | None:
    """What a keeper holds for the run, unless the committed step is newer: then the keeper is told to end."""
    memory = shared.find(directory)
    if memory is None:
        return None
    said = json.loads(memory.said()) if memory.published else {}
    found = Published(memory, said.get("step", -1), said.get("facts", {}))
    if manifest is None or said.get("layout") != manifest.layout.digest or found.step < manifest.step:
        found.give_up()
        return None
    return found
