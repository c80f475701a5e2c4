"""What a user calls: `attach` for a loop of their own, `train` for the command line's task."""

from __future__ import annotations

from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.distributed.group import Group, find_group
from outsize.errors import DamageError, OptionError
from outsize.machine.allocator import give_back, recycle_up_to
from outsize.machine.describe import describe, process_memory
from outsize.machine.find import find_machine, this_machine
from outsize.machine.machine import Machine
from outsize.memory.shared import dismiss
from outsize.model.companions import COMPANIONS, keep_companions
from outsize.model.fingerprint import fingerprint_model, fingerprint_tokenizer, fingerprint_weights
from outsize.model.load import ModelSource, open_model
from outsize.model.units import Unit, describe_units, find_units
from outsize.plan import Plan, Request
from outsize.planner.check import check_plan
from outsize.planner.training import Place, Task, plan_training
from outsize.sizes import parse_size
from outsize.train.data import PackedDataset, prepare
from outsize.train.export import Exported, export_checkpoint
from outsize.train.import_state import bring_optimizer, check_optimizer
from outsize.train.interrupt import finishing_the_step
from outsize.train.job import Job, Read, bind
from outsize.train.optimizer_file import read_optimizer
from outsize.train.optimizers import OptimizerRule, uniform_rule
from outsize.train.precision import find_precision
from outsize.train.progress import Progress, Silent
from outsize.train.recipe import groups_at, optimizer_rule, rule_of, scheduler_for
from outsize.train.report import each_line, held_by_tier, measured, moved_a_step, write_report
from outsize.train.retention import Retention
from outsize.train.run import Run, Schedule, check_loss, export
from outsize.train.settings import TrainSettings, continues, read_settings, record
from outsize.train.state import StateFolder, open_store
from outsize.train.together import bring_back, open_step, retire, settle

CPU = torch.device("cpu")


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
    """Bind `model`, as it is, to a store of at most `memory` with its state under `directory`. `job.model` is `model`:
    run it, call backward as often as you like, then `job.step()`. `job.detach()` gives back an ordinary module.

    `optimizer` is a class with `options`, or a rule (name, parameter) -> (class, options). `precision` "fp32" trains the
    numbers a plain loop would; "mixed" computes in bf16 with an fp32 master. `sequence_length` and `batch_size` are the
    largest a call will see; they size what activations need. `activations` are kept, recomputed or moved to disk ("keep",
    "recompute", "move"), or as the planner finds best. Raises BudgetError when it does not fit, OptionError for
    bad options, ModelError when no repeated block is found: then name its class in `block_class`."""
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
    plan = plan_training(task, Place(this_machine(directory), baseline, describe(directory).disk_free_bytes))
    recycle_up_to(plan.recycle_bytes)  # planning has tried other sizes
    store = open_store(plan, folder)

    def read(name: str, start: int, stop: int) -> torch.Tensor:
        tensor = sources[name]
        return tensor[start:stop] if tensor.dim() else tensor

    def forget(name: str) -> None:
        del sources[name]  # so that the module's own copy goes as soon as the store has it

    return bind(model, units, plan, rule, store, read, CPU, progress=forget)


def train(settings: TrainSettings) -> dict[str, Any]:
    """Fine-tune as `outsize train` does. Returns the report. Raises OutsizeError subclasses; nothing half-written
    stays. On Ctrl-C it commits the step under way and raises KeyboardInterrupt; the second time it stops at once.

    A process that torch's launcher has started is one of several workers; each calls it with the same settings, and the
    first one gets the report."""
    rule = optimizer_rule(settings)
    find_precision(settings.precision)
    source = open_model(settings.model)
    group = find_group(settings.worker_timeout)
    group.agree({"version": f"{version('outsize')} on torch {torch.__version__}", **settings.shared()})
    continuing = bool(group.each(continues(settings))[0][0])
    state = StateFolder(group.folder(settings.out / "state"), several=group.size > 1).lock()
    try:
        report = _train(settings, rule, source, state, continuing, group)
    except DamageError as problem:
        raise DamageError(f"{problem} {state.remedy()}") from problem
    except KeyboardInterrupt:
        dismiss(state.directory)  # somebody is there, and wants the memory back
        raise
    state.close()  # after a failure it stays locked: transfers may be under way until the process ends
    group.close()
    if report is None:
        raise KeyboardInterrupt
    return report


def _train(
    settings: TrainSettings,
    rule: OptimizerRule,
    source: ModelSource,
    state: StateFolder,
    continuing: bool,
    group: Group,
) -> dict[str, Any] | None:
    """None: it was interrupted, and the last step it did is committed."""
    first_worker = group.rank == 0  # who speaks, and writes what there is one of
    moved = settle(group, settings.out / "state", state)
    memory = settings.memory or int(min(group.each(_free_memory() // group.here))[0])
    torch.manual_seed(settings.seed + group.rank)
    progress = Progress(memory, settings.json) if first_worker else Silent()
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise OptionError(f"{settings.model} has no tokenizer beside its weights; add its tokenizer files.")
    data = _prepared(settings.data, tokenizer, settings, "train", progress, continuing, group)
    evaluation = None
    if settings.eval_data is not None:
        same = continuing and read_settings(settings.out).plain()["eval_data"] == settings.plain()["eval_data"]
        evaluation = _prepared(settings.eval_data, tokenizer, settings, "eval", progress, same, group)
    begin = None
    if settings.optimizer_state is not None and moved is None and state.read() is None:
        begin = read_optimizer(settings.optimizer_state)
    model = source.build(find_precision(settings.precision).compute).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if begin is not None:
        check_optimizer(begin, model, rule)
    if group.size > 1:
        names = [name for name, _ in model.named_parameters()]
        group.agree({"model": fingerprint_weights(source.config, names, source.read), "data": data.digest()})
    units = find_units(model, settings.block_class)
    request, stored = _request(settings, memory, group), _stored_dtype(source)
    sample = data.batch(list(range(min(data.count, request.batch_size))))
    task = Task(model, units, rule, request, [sample] * request.accumulate, stored, settings.block_class)
    disk = describe(settings.out).disk_free_bytes // group.here
    disk += state.blocks.stat().st_size if state.blocks.exists() else 0
    baselines, disks = zip(*group.each(process_memory().resident_bytes, disk), strict=True)
    place = Place(this_machine(settings.out), int(max(baselines)), int(min(disks)))
    plan = group.first(lambda: _planned(settings, task, place))
    if first_worker and not settings.json:
        _show(plan)
    store = open_store(plan, state, group=group)
    progress.message("bringing the weights into the store")

    def bound(read: Read) -> Job:
        return bind(model, units, plan, rule, store, read, CPU, group=group)

    job = bound(source.read) if moved is None else bring_back(settings.out / "state", moved, bound)
    if begin is not None:
        bring_optimizer(job.updater, job.weights, begin)
    give_back()
    if plan.blocked_loss and not continuing:
        check_loss(job, data)
    scheduler = scheduler_for(settings, job.optimizer)
    about = {"model": fingerprint_model(source.config), "tokenizer": fingerprint_tokenizer(tokenizer)}
    retention = Retention(settings.keep_last, settings.keep_every)
    own_folder = settings.out if first_worker else state.directory
    run = Run(job, state, own_folder / "metrics.jsonl", progress, tokenizer, retention, about)
    if first_worker:
        keep_companions(source, model, settings.out / COMPANIONS)
        record(settings)
    first = run.recover()
    group.each(0)
    if moved is not None and group.leads:
        retire(settings.out / "state", group.size)
    for _ in range(first):
        scheduler.step()
    progress.start(settings.steps, first)
    try:
        with finishing_the_step() as pressed:

            def stopping() -> bool:  # after the same step on all workers
                return any(other for (other,) in group.each(pressed()))

            run.train(data, _schedule(settings), scheduler, evaluation, stopping)
        if stopping():
            job.close()
            progress.message(f"step {job.step_number} of {settings.steps} is committed")
            return None
        progress.message("writing the model")
        export(job, settings.out / "model")
        if first_worker:
            source.save_companions(settings.out / "model", find_precision(settings.precision).compute)
    finally:
        progress.stop()
    report = _report(settings, own_folder, run, units, settings.steps - first)
    return report if first_worker else {}


def read_plan(path: Path) -> Plan:
    """The plan that `outsize plan --save` wrote, as it may have been edited since. Raises OptionError."""
    try:
        return Plan.from_json(path.read_bytes().decode(errors="replace"), str(path))
    except OSError as problem:
        raise OptionError(
            f"{path} cannot be read: {problem.strerror}. Write a plan with `outsize plan --save`."
        ) from problem


def _stored_dtype(source: ModelSource) -> torch.dtype:
    return source.config.dtype if isinstance(source.config.dtype, torch.dtype) else torch.float32


def plan(
    model: str,
    *,
    memory: str | int,
    task: str = "train",
    machine: str | Path | Machine | None = None,
    directory: str | Path = ".",
    optimizer: str = "adamw",
    optimizer_options: dict[str, Any] | None = None,
    block_class: str | None = None,
    **request: Any,
) -> Plan:
    """What `task` with `model` would do within `memory`, without doing it. The plan prints itself as a table.

    For `train`, `request` takes the fields of `outsize.plan.Request` (sequence_length, batch_size, accumulate, precision,
    moments, clip, loss, activations, commit_every, keeper); for `serve`, context, concurrency and step_tokens. `machine`
    is the name or file of one described, None this one, whose disk is that of `directory`. `model` may be a folder that
    holds nothing but config.json. Raises OptionError, ModelError, or BudgetError with the smallest memory that works."""
    known = {
        "train": {field.name for field in fields(Request)} - {"memory_bytes", "hold"},
        "serve": {"context", "concurrency", "step_tokens"},
    }.get(task)
    if known is None:
        raise OptionError(f"task {task!r} cannot be planned; there are train and serve.")
    if unknown := sorted(request.keys() - known):
        raise OptionError(f"plan of {task} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if task == "serve":
        from outsize.serving import plan_service

        return plan_service(model, memory=memory, machine=_machine(machine, Path(directory)), **request)
    asked, place = Request(parse_size(memory), **request), _machine(machine, Path(directory))
    source = open_model(model)
    tokenizer = source.tokenizer()  # a run will hold it
    make = source.build if source.files.has_weights else source.outline
    module = make(find_precision(asked.precision).compute).train()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    rule = rule_of(optimizer, optimizer_options or {})
    units = find_units(module, block_class)
    here = Place(place, process_memory().resident_bytes, place.capacity("disk"))
    found = plan_training(Task(module, units, rule, asked, [], _stored_dtype(source), block_class), here)
    del tokenizer
    return found


def _machine(machine: str | Path | Machine | None, directory: Path) -> Machine:
    if isinstance(machine, Machine):
        return machine
    return this_machine(directory) if machine is None else find_machine(str(machine))


def _free_memory() -> int:
    machine = describe(Path.cwd())
    return machine.memory_available_bytes + process_memory().resident_bytes


def _prepared(
    path: Path, tokenizer: Any, settings: TrainSettings, name: str, progress: Progress, continuing: bool, group: Group
) -> PackedDataset:
    packed = settings.out / f"{name}.npy"

    def make() -> None:
        if not (continuing and packed.exists()):
            progress.message(f"reading {path}")
            prepare(path, tokenizer, settings.sequence_length, packed).close()

    group.once(make, packed.exists)
    return PackedDataset.open(packed)


def _request(settings: TrainSettings, memory: int, group: Group) -> Request:
    sequences = settings.batch_size * settings.accumulate
    if sequences < group.size:
        raise OptionError(
            f"A step of {sequences} sequences leaves nothing to do for some of {group.size} workers. Give a larger "
            "--batch-size or --accumulate, or fewer workers."
        )
    if settings.keeper and group.size > 1:
        raise OptionError(
            f"--keeper holds what one worker has, and there are {group.size}. Leave it out, or --workers."
        )
    share = -(-sequences // group.size)  # of the worker with the most
    batch_size = min(settings.batch_size, share)
    return Request(
        memory,
        settings.sequence_length,
        batch_size,
        -(-share // batch_size),
        settings.precision,
        settings.moments,
        settings.clip,
        loss=settings.loss,
        activations=settings.activations,
        commit_every=settings.commit_every,
        keeper=settings.keeper,
        workers=group.size,
        zero=settings.zero,
    )


def _schedule(settings: TrainSettings) -> Schedule:
    return Schedule(
        settings.steps,
        settings.batch_size,
        settings.accumulate,
        settings.seed,
        settings.eval_every,
        settings.sample_every,
        settings.sample_prompt,
    )


def _planned(settings: TrainSettings, task: Task, place: Place) -> Plan:
    return plan_training(task, place) if settings.plan is None else check_plan(read_plan(settings.plan), task, place)


def _show(plan: Plan) -> None:
    from rich.console import Console

    Console(stderr=True).print(str(plan), markup=False, highlight=False)


def _report(settings: TrainSettings, folder: Path, run: Run, units: list[Unit], steps_done: int) -> dict[str, Any]:
    from outsize.planner.pictures import draw_step, write_trace
    from outsize.train.pictures import draw

    job, plan = run.job, run.job.plan
    held = held_by_tier(job.store.ledger.held)
    moved = moved_a_step(run.moved, max(steps_done, 1))
    assert plan.predicted is not None
    planned = {
        name: value for name, value in asdict(plan.predicted).items() if value is None or isinstance(value, int | float)
    }
    planned["mean_seconds_per_step"] = plan.predicted.seconds_per_step
    steps = {"predicted": plan.predicted.timeline, "measured": run.timeline()}
    found = measured(each_line(folder / "metrics.jsonl")) | {"disk_bytes": job.store.tiers["disk"].used}
    job.close()
    give_back()  # what the steps' tensors took is room for the pictures
    facts = {
        "model": settings.model,
        "optimizer": settings.optimizer,
        "precision": settings.precision,
        "exactness": plan.exactness,
        "units": describe_units(units),
        **dict(reason.split(": ", 1) for reason in plan.reasons),
    }
    write_report(folder, planned, found, facts, memory_bytes=plan.memory_bytes, held=held, moved=moved)
    write_trace(steps, folder / "trace.json")
    if folder == settings.out:
        draw(folder)
        draw_step(steps, plan, folder / "timeline.png")
    return {"planned": planned, "measured": found}


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
