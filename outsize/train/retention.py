"""Which steps a run keeps: the last few, every so many, and those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outsize.train.state import kept_step

PINNED, RECENT = "step", "last"
"""A kept step is named `step-12` when it stays until its file is removed, `last-12` when newer ones replace it."""


@dataclass(frozen=True)
class Retention:
    """`last`: how many of the newest commits are kept; `every`: multiples of it are kept for good. 0 means none."""

    last: int = 0
    every: int = 0

    def is_kept(self, step: int) -> bool:
        """Whether the step is committed, and kept, whatever else happens."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def choose(self, step: int, kept: Sequence[str], asked: bool) -> tuple[str | None, tuple[str, ...]]:
        """What the commit of `step` keeps, and which of the `kept` names it lets go."""
        keep = None
        if asked or self.is_kept(step):
            keep = f"{PINNED}-{step}"
        elif self.last and step:
            keep = f"{RECENT}-{step}"
        recent = [name for name in kept if name.startswith(RECENT) and name != keep]
        past = [name for name in recent if kept_step(name) < step]  # the others are from before a rollback
        stay = past[len(past) - (self.last - 1) :] if self.last > 1 else []
        return keep, tuple(name for name in recent if name not in stay)
