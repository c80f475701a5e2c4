"""`outsize plan`: what a job would do, before anything is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outsize.commands import serving_options as serving
from outsize.commands import training_options as options
from outsize.commands.common import Json, Model, interruptible, read_options, was_given
from outsize.errors import BudgetError, OptionError, StorageError
from outsize.machine.garbage import lasting
from outsize.sizes import format_size, parse_size

if TYPE_CHECKING:
    from outsize.plan import Plan

Memory = Annotated[
    str | None,
    typer.Option(
        help="Peak memory of the whole process, such as 3GiB or 800MiB. Of a described machine with devices it may be "
        "left out: a worker's part of the host's."
    ),
]
Machine = Annotated[
    str | None, typer.Option(help="A described machine by name, or the TOML file of one; otherwise this machine.")
]
WorkersThere = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Who do a step together. Otherwise one for each node of a cluster, or for each device; one when serving.",
    ),
]
ASKED = {
    "train": {
        *("sequence_length", "batch_size", "accumulate", "precision", "moments", "optimizer", "optimizer_option"),
        *("clip", "loss", "activations", "commit_every", "keeper", "block_class"),
        *("workers", "pipeline", "legs", "legs_shape", "zero_bubble", "zero"),
    },
    "serve": {"context", "concurrency", "step_tokens", "weights", "workers"},
}
"""Parameters that say what is to be done, by task; others say where, or how it is shown."""
TRAINED = ["peak", "s/step", "tokens/s", "waiting", "read", "written", "numbers"]
SERVED = ["peak", "requests", "tokens/s", "together", "first token", "read"]


def plan(
    command: typer.Context,
    model: Model,
    memory: Memory = None,
    task: Annotated[str, typer.Option(help="What is planned: train or serve.")] = "train",
    machine: Machine = None,
    device_memory: options.DeviceMemory = None,
    directory: Annotated[Path, typer.Option(help="Where the run would live: its disk counts.")] = Path(),
    sequence_length: options.SequenceLength = 512,
    batch_size: options.BatchSize = 1,
    accumulate: options.Accumulate = 1,
    precision: options.Precision = "mixed",
    moments: options.Moments = "fp32",
    optimizer: options.Optimizer = "adamw",
    optimizer_option: options.OptimizerOption = None,
    clip: options.Clip = None,
    loss: options.Loss = "auto",
    activations: options.Activations = "auto",
    commit_every: options.CommitEvery = None,
    keeper: options.Keeper = False,
    workers: WorkersThere = None,
    pipeline: options.Pipeline = False,
    legs: options.Legs = None,
    legs_shape: options.LegsShape = None,
    zero_bubble: options.ZeroBubble = None,
    zero: options.Zero = 3,
    block_class: options.BlockClass = None,
    context: serving.Context = None,
    concurrency: serving.Concurrency = None,
    step_tokens: serving.StepTokens = 512,
    weights: serving.Weights = "stored",
    compare: Annotated[str | None, typer.Option(help="Other memory sizes, as 2GiB,4GiB,8GiB, in one table.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the step, or time against memory with --compare.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the step as a trace that Perfetto opens.")] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the plan, for `outsize train --plan`.")] = None,
    json_lines: Json = False,
) -> None:
    """Say whether a job fits, where its bytes will live and how long a step takes, before anything is done.

    Example: outsize plan --model my-model --memory 3GiB --save plan.json

    Example: outsize plan --task serve --model my-model --memory 2GiB --concurrency 16 --context 4096
    """
    asked = {name: value for name, value in locals().items() if name in ASKED.get(task, ())}
    sizes = _sizes(compare, memory, device_memory)
    _check_task(task, command)
    _check_shown(task, sizes, pipeline, save, picture, trace)
    if task == "train":
        asked["optimizer_options"] = read_options(asked.pop("optimizer_option") or [])
    with interruptible("Nothing was kept."), lasting():
        from outsize.api import planning

        planned = planning(model, task=task, machine=machine, directory=directory, device_memory=device_memory, **asked)
        if sizes:
            _compare(planned, dict.fromkeys([*([memory] if memory else []), *sizes]), picture, json_lines)
            return
        found = planned(memory)
        _keep(found, save, picture, trace)
    print(found.to_json() if json_lines else str(found))


def _sizes(compare: str | None, *others: str | None) -> list[str]:
    """Those to compare. Raises OptionError for one of them, or of the `others`, that cannot be read."""
    found = [size.strip() for size in compare.split(",")] if compare else []
    for size in (*others, *found):
        parse_size(size or 0)
    return found


def _check_task(task: str, command: typer.Context) -> None:
    """Raises OptionError for an option of another task."""
    for other in ASKED.keys() - {task} if task in ASKED else ():
        for name in sorted(ASKED[other] - ASKED[task]):
            if was_given(command, name):
                raise OptionError(
                    f"--{name.replace('_', '-')} is for --task {other}, and this is {task}. Leave it out, or plan that."
                )


def _check_shown(
    task: str, sizes: list[str], pipeline: bool, save: Path | None, picture: Path | None, trace: Path | None
) -> None:
    if task == "serve" and (picture or trace):
        raise OptionError("--picture and --trace show a step of training; leave them out for --task serve.")
    if sizes and (save or trace):
        raise OptionError("--save and --trace are of one plan; leave them out with --compare, or --compare out.")
    if pipeline and save:
        raise OptionError(
            "--save keeps a plan for `outsize train --plan`, which no --pipeline obeys. Leave out one of them."
        )


def _keep(plan: Plan, save: Path | None, picture: Path | None, trace: Path | None) -> None:
    from outsize.planner.pictures import draw_step, write_trace

    assert plan.predicted is not None
    steps = {"predicted": plan.predicted.timeline}
    if save is not None:
        _write(save, plan.to_json())
    if picture is not None:
        draw_step(steps, plan, picture)
    if trace is not None:
        write_trace(steps, trace)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise StorageError(f"{path} cannot be written: {problem.strerror}. Choose another place.") from problem


def _compare(
    planned: Callable[[str | None], Plan], sizes: dict[str, None], picture: Path | None, json_lines: bool
) -> None:
    """One line for each size; one that is too small says which would do."""
    found: dict[str, Plan | BudgetError] = {}
    for size in sorted(sizes, key=parse_size):
        try:
            found[size] = planned(size)
        except BudgetError as problem:
            found[size] = problem
    plans = [plan for plan in found.values() if not isinstance(plan, BudgetError)]
    if picture is not None:
        from outsize.planner.pictures import draw_comparison

        if not plans:
            raise OptionError("No size of --compare is enough, so there is nothing to draw.")
        draw_comparison(plans, picture)
    if json_lines:
        told = {s: str(p) if isinstance(p, BudgetError) else json.loads(p.to_json()) for s, p in found.items()}
        print(json.dumps(told))
        return
    head = SERVED if any(plan.served is not None for plan in plans) else TRAINED
    print(_table(head, {size: _short(p) if isinstance(p, BudgetError) else _columns(p) for size, p in found.items()}))


def _short(problem: BudgetError) -> str:
    if problem.least is None:
        return f"does not fit: {problem}"
    return f"does not fit; {-(-problem.least >> 20)}MiB is the smallest that does"


def _table(head: list[str], rows: dict[str, list[str] | str]) -> str:
    """A line for each size, as narrow as its cells; what is no list of cells is a remark."""
    columns = zip(head, *(cells for cells in rows.values() if isinstance(cells, list)), strict=True)
    widths = [max(map(len, column)) for column in columns]
    first = max(map(len, ("memory", *rows)))

    def line(size: str, cells: list[str] | str) -> str:
        if isinstance(cells, list):
            cells = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"{size:<{first}}  {cells}"

    return "\n".join([line("memory", head), *(line(size, cells) for size, cells in rows.items())])


def _columns(plan: Plan) -> list[str]:
    predicted, served = plan.predicted, plan.served
    assert predicted is not None
    if served is not None:
        return [
            format_size(predicted.host_peak_bytes),
            str(served.requests),
            f"{served.alone:,.1f}",
            f"{served.together:,.1f} ({served.sequences})",
            f"{served.first_token_seconds:.2f} s ({served.prompt})",
            format_size(predicted.bytes_read),
        ]
    waits = (predicted.read_wait_seconds, predicted.write_wait_seconds, predicted.wire_wait_seconds)
    waiting = sum(seconds or 0.0 for seconds in waits)
    return [
        format_size(predicted.host_peak_bytes),
        f"{predicted.seconds_per_step:.2f}",
        f"{predicted.tokens_per_second:,.0f}",
        f"{waiting:.2f}",
        format_size(predicted.bytes_read),
        format_size(predicted.bytes_written),
        plan.exactness,
    ]
