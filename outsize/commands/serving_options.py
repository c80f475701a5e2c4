"""What the commands that serve have in common: options, and how several workers are started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from outsize.distributed.group import Group

Context = Annotated[
    int | None, typer.Option(min=2, help="When serving: tokens of prompt and answer together, at most.")
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="When serving: sequences computed at once, at most; memory goes to them before weights. [default: 32]",
    ),
]
StepTokens = Annotated[int, typer.Option(min=1, help="When serving: tokens computed at once; prompts are cut so.")]
Weights = Annotated[
    str,
    typer.Option(
        help="Of linear layers when serving: as stored, or int8 or int4 (approximate): half of bf16's bytes to hold and to "
        "stream, or 31%."
    ),
]
Scratch = Annotated[Path | None, typer.Option(help="Folder for weights that stream; the system's own otherwise.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes on this machine that divide the model's layers; --memory is for each.")
]
WorkerTimeout = Annotated[
    float, typer.Option(min=1.0, help="Seconds after which the others give up a worker that does not move.")
]
ENDING = 30  # seconds in which workers who are told to end finish what is under way


def starts(workers: int, afterwards: str) -> bool:
    """This process only starts so many workers; by now they are done. What is to be done when one is killed is said
    `afterwards`."""
    from outsize.distributed.launch import is_worker, launch

    if workers == 1 or is_worker():
        return False
    # They take turns: each computes with all cores, as one worker would.
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    launch(workers, restarts=0, afterwards=afterwards, ending=ENDING)
    return True


@contextmanager
def joined(patience: float, afterwards: str) -> Iterator[Group]:
    """The group that this process is in. What ends this worker ends all."""
    import signal
    from datetime import timedelta

    from outsize.distributed.workers import find_group
    from outsize.errors import OutsizeError

    group = find_group(patience, afterwards, timedelta(days=3650))  # nobody may ask anything for long
    if group.rank:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # the first worker says when it is over
    try:
        yield group
    except OutsizeError as problem:
        group.fail(problem)
        raise
    group.leave()  # a thread that still asks the meeting point when Python ends would abort the process
