"""`outsize checkpoint drop`: give up a kept step."""

from __future__ import annotations

from outsize.commands.checkpoint import Run, Step, find_step, open_state
from outsize.errors import RunError


def drop(run: Run, step: Step) -> None:
    """Let a kept step go. What only it needed is free for the steps to come or, when it was packed, on the disk.

    The committed step stays committed. No run may go on meanwhile."""
    from outsize.train.packed_step import remove_packed
    from outsize.train.state import kept_step

    with open_state(run).lock() as folder:
        names = tuple(name for name in folder.kept_names() if kept_step(name) == step)
        if not names and step not in folder.packed_steps() and find_step(folder, step) is None:
            raise RunError(f"Step {step} is the committed one and not kept besides: there is nothing to drop.")
        folder.forget(names)
        remove_packed(folder, step)
    print(f"Step {step} is no longer kept.")
