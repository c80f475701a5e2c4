"""What a user calls: `attach` for a loop of their own, `plan` to know before; and what the command line exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.asked import PipelineRequest, Request
from outsize.distributed.measure import Crowd
from outsize.distributed.shares import in_proportion
from outsize.errors import BudgetError, OptionError, OutsizeError
from outsize.machine.allocator import recycle_up_to
from outsize.machine.describe import describe, process_memory
from outsize.machine.devices import CPU
from outsize.machine.find import find_machine, this_machine
from outsize.machine.machine import Close, Machine
from outsize.model.companions import COMPANIONS
from outsize.model.load import ModelSource, open_model
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.beside import HOST_SHARE
from outsize.planner.cluster import close_of, places, wire_of
from outsize.planner.pipeline import fullest, lines_of, plan_line
from outsize.planner.task import Task
from outsize.planner.training import Place, Planning, plan_training
from outsize.planner.workers import Worker, plan_workers
from outsize.sizes import format_size, parse_size
from outsize.train.export import Exported, export_checkpoint
from outsize.train.job import Job, bind
from outsize.train.optimizers import OptimizerRule, uniform_rule
from outsize.train.precision import find_precision
from outsize.train.recipe import groups_at, rule_of
from outsize.train.settings import read_settings
from outsize.train.state import StateFolder, open_store
from outsize.train.together import open_step


def attach(
    model: nn.Module,
    optimizer: type[torch.optim.Optimizer] | OptimizerRule,
    options: dict[str, Any] | None = None,
    *,
    memory: str | int,
    directory: str | Path,
    precision: str = "fp32",
    clip: float | None = None,
    sequence_length: int = 512,
    batch_size: int = 1,
    activations: str = "auto",
    block_class: str | None = None,
) -> Job:
    """Bind `model`, as it is, to a store of at most `memory` with its state under `directory`. `job.model` is `model`: run
    it, call backward as often as you like, then `job.step()`. `job.detach()` gives an ordinary module. The host computes.

    `optimizer` is a class with `options`, or a rule (name, parameter) -> (class, options). `precision` "fp32" trains the
    numbers a plain loop would; "mixed" computes in bf16 with an fp32 master. `sequence_length` and `batch_size` are the
    largest a call will see; they size what activations need. `activations` are kept, recomputed, recomputed but for the
    results of attention, or moved to disk ("keep", "recompute", "attention", "move"), or as the planner finds best.

    Raises BudgetError when it does not fit, OptionError for bad options, ModelError when no repeated block is found: then
    name its class in `block_class`."""
    rule = uniform_rule(optimizer, options or {}) if isinstance(optimizer, type) else optimizer
    find_precision(precision)
    directory = Path(directory)
    sources = {name: parameter.detach() for name, parameter in model.named_parameters()}
    units = find_units(model, block_class)
    in_memory = sum(tensor.numel() * tensor.element_size() for tensor in sources.values() if not tensor.is_meta)
    request = Request(
        parse_size(memory),
        sequence_length,
        batch_size,
        precision=precision,
        clip=clip,
        hold=True,
        loss="module",
        activations=activations,
    )
    folder = StateFolder(directory).lock()
    baseline = max(process_memory().resident_bytes - in_memory, 0)
    task = Task(model, units, rule, request, block_class=block_class)
    try:
        here, disk = this_machine(directory).hosted, describe(directory).disk_free_bytes
        plan = plan_training(task, Place(here, baseline, disk, room_bytes=request.memory_bytes - baseline - in_memory))
    except OutsizeError:
        folder.abandon()
        folder.close()  # with another budget it may be tried again
        raise
    recycle_up_to(0)  # of weights that come in, none leaves a hole for others to spread over
    store = open_store(plan, folder)

    def forget(name: str) -> None:
        del sources[name]  # so that the module's own copy goes as soon as the store has it

    job = bind(model, units, plan, rule, store, partial(_rows_of, sources), CPU, progress=forget)
    recycle_up_to(plan.recycle_bytes)
    return job


def _rows_of(sources: dict[str, torch.Tensor], name: str, start: int, stop: int) -> torch.Tensor:
    tensor = sources[name]
    return tensor[start:stop] if tensor.dim() else tensor


def plan(model: str, *, memory: str | int | None = None, **asked: Any) -> Plan:
    """What a job with `model` would do within `memory`, without doing it; `asked` is as `planning` has it. The plan prints
    itself as a table. Raises OptionError, ModelError, or BudgetError with the smallest memory that works."""
    return planning(model, **asked)(memory)


def planning(
    model: str,
    *,
    task: str = "train",
    machine: str | Path | Machine | None = None,
    directory: str | Path = ".",
    optimizer: str = "adamw",
    optimizer_options: dict[str, Any] | None = None,
    block_class: str | None = None,
    workers: int | None = None,
    pipeline: bool = False,
    legs: int | None = None,
    legs_shape: str | None = None,
    zero_bubble: bool | None = None,
    device_memory: str | int | None = None,
    **request: Any,
) -> Callable[[str | int | None], Plan]:
    """Plans of one job within one memory after another; all else is measured once, so that memory alone makes them differ.
    Of a described machine with devices None is this worker's part of a node's memory (`HOST_SHARE`).

    For the `task` train, `request` takes the fields of `outsize.asked.Request` (sequence_length, batch_size, accumulate,
    precision, moments, clip, loss, activations, commit_every, keeper, zero), and its batch is what all `workers` do together
    (None: one for each device of a cluster, or for each of its nodes); as a `pipeline` each has a run of layers, and the plan
    is that of who needs most; of fewer `legs` than workers, several divide each, and of more each has several. What nobody
    names of `legs`, `legs_shape` and `zero_bubble` is as a step is shortest. For `serve`, it takes context, concurrency,
    step_tokens and weights, and `workers` divide the model's layers (None: one has all).
    `machine` is the name or file of one described, None this one, whose disk is that of `directory`. Where it has devices
    they train, each within `device_memory` (None: all that it has; 0: the host computes). `model` may be a folder that holds
    nothing but config.json. Raises OptionError or ModelError; the plans raise BudgetError."""
    line = PipelineRequest(legs, legs_shape, zero_bubble)
    _check_asked(task, request, pipeline, line)
    there = _machine(machine, Path(directory))
    if task == "serve":
        return _planning_service(model, replace(there.hosted, close=Close()), workers or 1, device_memory, request)
    device_bytes = device_bytes_of(there, device_memory)
    there = there if device_bytes else there.hosted
    nodes = there.nodes.count
    workers = workers or (nodes * places(there) if nodes > 1 else 1)
    each = workers // nodes
    asked = Request(0, device_bytes=device_bytes, close=close_of(there, each), **request)
    if pipeline and workers == 1:
        raise OptionError("A pipeline is of several workers. Give --workers 2 or more, or leave out --pipeline.")
    if not pipeline:
        asked = asked.divided(in_proportion(asked.batch_size * asked.accumulate, [1] * workers), nodes)
    source = open_model(model)
    tokenizer = source.tokenizer()  # a run will hold it
    module = _trained(source, find_precision(asked.precision).compute)
    rule = rule_of(optimizer, optimizer_options or {})
    units = find_units(module, block_class)
    crowd = Crowd(workers=each).times(max(1.0, each / places(there)))
    disk = there.capacity("disk") // each
    here = Place(there, process_memory().resident_bytes, disk, wire_of(there, each), crowd)
    job = Task(module, units, rule, asked, [], source.stored_dtype, block_class)
    if not pipeline and not there.unlike:
        return partial(_needing, partial(_within, Planning(job, here), tokenizer), there, each)
    machines = [there.node(rank // each) for rank in range(workers)]
    apart = [here.beside(machine, machine.capacity("disk") // each) for machine in machines]
    jobs = lines_of(job, workers, nodes, line) if pipeline else [job]
    return partial(_needing, partial(_each_within, jobs, apart, each, tokenizer), there, each)


def _planning_service(
    model: str, host: Machine, workers: int, device_memory: str | int | None, request: dict[str, Any]
) -> Callable[[str | int | None], Plan]:
    from outsize.serving import plan_service

    if device_memory is not None:
        raise OptionError("--device-memory is for training; serving computes on the host. Leave it out.")
    return partial(_needing, plan_service(model, machine=host, workers=workers, **request), None, 1)


def _trained(source: ModelSource, dtype: torch.dtype) -> nn.Module:
    """The module whose weights are all trained, without their bytes; there may be none."""
    module = (source.build if source.files.has_weights else source.outline)(dtype).train()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def device_bytes_of(machine: Machine, asked: str | int | None) -> int:
    """What each device of a machine may use: so much as was `asked`, all of it if nobody did; 0 where none is to compute.

    Raises OptionError when it has less, or when there is no device."""
    nbytes = None if asked is None else parse_size(asked)
    if "device" not in machine.tiers:
        if nbytes:
            raise OptionError(
                f"--device-memory is for a machine with a device, and {machine.name} has none. Leave it out."
            )
        return 0
    most = machine.capacity("device")
    if nbytes is not None and nbytes > most:
        raise OptionError(
            f"A device of {machine.name} has {format_size(most)}, less than --device-memory {format_size(nbytes)}. Give that "
            "much, or less."
        )
    return most if nbytes is None else nbytes


def _needing(
    planned: Callable[[str | int], Plan], machine: Machine | None, each: int, memory: str | int | None = None
) -> Plan:
    """The plan of one of `each` workers of a node. Raises BudgetError where a host of devices has too little for all."""
    there = None if machine is None or machine.compute.tier == "host" else machine
    if memory is None and (there is None or there.origin != "described"):
        raise OptionError("A plan needs to know how much memory the process may use. Give --memory, such as 3GiB.")
    if there is None:
        return planned(memory or 0)
    most = there.capacity("host") // each
    budget = int(HOST_SHARE * most) if memory is None else parse_size(memory)
    if budget > most:
        raise BudgetError(
            f"{each} x {format_size(budget)} are more than the {format_size(there.capacity('host'))} of memory that a node "
            f"of {there.name} has for {each} workers. Give --memory {most >> 20}MiB, or less.",
        )
    return planned(budget)


def _check_asked(task: str, request: dict[str, Any], pipeline: bool, line: PipelineRequest) -> None:
    known = {
        "train": {field.name for field in fields(Request)}
        - {
            "memory_bytes",
            "hold",
            "workers",
            "nodes",
            "close",
            "weight_copies",
            "gather_ahead_bytes",
            "parts",
            "sequences",
            "shares",
        }
        - {"device_bytes", "rank", "legs", "legs_shape", "zero_bubble"},
        "serve": {"context", "concurrency", "step_tokens", "weights"},
    }.get(task)
    if known is None:
        raise OptionError(f"task {task!r} cannot be planned; there are train and serve.")
    if unknown := sorted(request.keys() - known):
        raise OptionError(f"plan of {task} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if (line.legs or line.shape or line.zero_bubble) and not pipeline:
        raise OptionError("legs, legs_shape and zero_bubble are of a pipeline: set that, too, or leave them out.")
    if pipeline and task == "serve":
        raise OptionError("A pipeline is planned for training. When serving, workers divide the layers without it.")


def _each_within(jobs: list[Task], apart: list[Place], each: int, _held: object, memory: str | int) -> Plan:
    """The first worker's, of `apart` ones of whom so many are on `each` node: within the memory that this has for them. Of a
    pipeline, the fastest of `jobs`, that of who needs most."""
    budget = parse_size(memory)
    workers = [Worker(min(budget, place.machine.capacity("host") // each), place) for place in apart]
    return fullest(plan_line(jobs, workers)) if jobs[0].request.legs else plan_workers(jobs[0], workers)[0]


def _within(planning: Planning, _held: object, memory: str | int) -> Plan:
    """`_held` counts in the baseline, as long as plans are made."""
    return planning.within(parse_size(memory))


def _machine(machine: str | Path | Machine | None, directory: Path) -> Machine:
    if isinstance(machine, Machine):
        return machine
    return this_machine(directory) if machine is None else find_machine(str(machine))


def export_run(
    run: Path, folder: StateFolder, step: int | None, target: Path, *, optimizer: bool, masters: bool, compress: bool
) -> Exported:
    """As `outsize checkpoint export` does. Raises OutsizeError subclasses; nothing half-written stays."""
    companions = run / COMPANIONS
    with open_step(folder, step) as checkpoint:
        groups = None
        if optimizer:
            shapes = {name: entry.shape for name, entry in checkpoint.weights.items()}
            known = (run / "run.json").exists()
            groups = groups_at(read_settings(run), checkpoint.step, shapes) if known else []
        return export_checkpoint(
            checkpoint,
            target,
            companions if companions.exists() else None,
            masters=masters or optimizer,
            groups=groups,
            compress=compress,
            notes=folder.exports,
        )
