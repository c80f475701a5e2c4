"""What `outsize train` was told, as a request to the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outsize.asked import Request
from outsize.distributed.group import Group
from outsize.distributed.launch import is_worker
from outsize.errors import OptionError, RunError
from outsize.train.settings import TrainSettings


def request_of(
    settings: TrainSettings,
    memory: int,
    device: int,
    group: Group,
    copies: int | None,
    shares: tuple[int, ...] | None,
) -> Request:
    """Of all workers together, each with so much `memory`, and of a `device` (0: the host computes). `copies`: how many of
    split weights there are already; `shares`: in which proportion state is divided, if that is settled. Raises OptionError
    for what several workers, or a device, cannot do."""
    _check_pipeline(settings, group)
    for option, given in (("--keeper", settings.keeper), ("--replan", settings.replan)):
        if given and group.size > 1:
            raise OptionError(f"{option} is for one worker, and there are {group.size}. Leave it out, or --workers.")
    if settings.replan and device:
        raise OptionError("--replan is for a disk beside the host's memory, and a device computes. Leave it out.")
    if settings.pipeline and device and (settings.legs or group.size) > group.size:
        raise OptionError(
            f"On devices each of {group.size} workers of a pipeline has one leg: what passes between more could wait for "
            "itself. Leave --legs out, or give --device-memory 0."
        )
    return Request(
        memory,
        settings.sequence_length,
        settings.batch_size,
        settings.accumulate,
        settings.precision,
        settings.moments,
        settings.clip,
        loss=settings.loss,
        activations=settings.activations,
        commit_every=settings.commit_every,
        keeper=settings.keeper,
        close=group.arrangement.close,
        zero=settings.zero,
        weight_copies=copies,
        shares=shares,
        device_bytes=device,
    )


def _check_pipeline(settings: TrainSettings, group: Group) -> None:
    """Raises OptionError for what a pipeline cannot do, and what nothing else can."""
    for name in ("legs", "legs_shape", "zero_bubble"):
        if getattr(settings, name) and not settings.pipeline:
            option = f"--{name.replace('_', '-')}"
            raise OptionError(f"{option} says how --pipeline divides the model. Give both, or leave it out.")
    if settings.pipeline and group.size == 1 and not is_worker():  # whom torchrun leaves alone has all layers
        raise OptionError(
            "--pipeline divides layers among several workers, and there is one. Give --workers 2 or more, or "
            "--no-pipeline."
        )
    for option, given in (("--plan", settings.plan), ("--sample-prompt", settings.sample_prompt)):
        if settings.pipeline and given is not None:
            raise OptionError(
                f"{option} is for a whole model on each worker, and --pipeline divides it. Leave one of them out."
            )


def check_arranged(out: Path, begun: dict[str, Any], group: Group) -> None:
    """What is divided lies where it does by which workers are near each other; `begun` is what the last committed step says.
    Raises RunError when these are others now."""
    for name, those in (("nodes", "on {} nodes"), ("close", "groups of {} that are close")):
        was, now = begun.get(name, 1), getattr(group.arrangement, name)
        if was != now:
            raise RunError(
                f"The {group.size} workers of {out} were {those.format(was)}, and now they are {those.format(now)}. Start "
                "them as before (--close), or another number of workers."
            )
