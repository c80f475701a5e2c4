"""What `outsize train` does, from its settings to its report."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.asked import PipelineRequest, Request
from outsize.distributed.group import Group
from outsize.distributed.measure import Crowd, leveled, measure_crowd, measure_speeds, measure_wire
from outsize.distributed.shares import in_proportion
from outsize.distributed.wire import NO_WIRE
from outsize.distributed.workers import find_group
from outsize.divided import LOOP
from outsize.errors import DamageError, OptionError, OutsizeError, PlanAgain, RunError
from outsize.machine.allocator import give_back, recycle_up_to
from outsize.machine.describe import describe, process_memory
from outsize.machine.devices import find_device
from outsize.machine.find import this_machine
from outsize.machine.garbage import lasting
from outsize.machine.machine import Machine
from outsize.memory.shared import dismiss
from outsize.model.companions import COMPANIONS, keep_companions
from outsize.model.fingerprint import fingerprint_model, fingerprint_tokenizer, fingerprint_weights
from outsize.model.load import ModelSource, open_model
from outsize.model.units import Unit, find_units
from outsize.plan import Plan
from outsize.planner.check import check_plan, read_plan
from outsize.planner.from_settings import check_arranged, request_of
from outsize.planner.pipeline import leave_legs, lines_of, plan_line
from outsize.planner.remembered import circumstances, recall, recall_slowness, remember, remember_slowness
from outsize.planner.task import Task
from outsize.planner.training import Place, check_disk, plan_training
from outsize.planner.workers import Worker, alike_disks, plan_workers
from outsize.reporting import report_run
from outsize.train.budgets import device_memory, host_memories
from outsize.train.data import PackedDataset, prepare
from outsize.train.import_state import bring_optimizer, check_optimizer
from outsize.train.interrupt import finishing_the_step
from outsize.train.job import Job, bind
from outsize.train.optimizer_file import OptimizerState, read_optimizer
from outsize.train.optimizers import OptimizerRule
from outsize.train.precision import find_precision
from outsize.train.progress import Progress, Silent
from outsize.train.recipe import optimizer_rule, scheduler_for
from outsize.train.retention import Retention
from outsize.train.run import Run, Schedule, check_loss, export
from outsize.train.settings import TrainSettings, continues, forget_beginning, read_settings, record
from outsize.train.state import REMEMBERED, StateFolder, open_store
from outsize.train.together import bring_back, retire, settle


def train(settings: TrainSettings) -> dict[str, Any]:
    """Fine-tune as `outsize train` does. Returns the report. Raises OutsizeError subclasses; nothing half-written
    stays. On Ctrl-C it commits the step under way and raises KeyboardInterrupt; the second time it stops at once. With
    `replan` it may stop as early, and raise PlanAgain: to go on with another plan is for a process with a clean heap.

    A process that a launcher has started is one of several workers; each calls it with the same settings, and the
    first one gets the report."""
    recycle_up_to(0)  # what comes before the steps does not come again: the heap is to stay small
    rule = optimizer_rule(settings)
    find_precision(settings.precision)
    if settings.replan and settings.plan is not None:
        raise OptionError("--replan may leave the plan that --plan gives. Give one of them.")
    group = find_group(settings.worker_timeout, close=settings.close)
    try:
        report = _train(settings, rule, group)
    except OutsizeError as problem:
        group.fail(problem)
        raise
    group.close()
    if report is None:
        raise KeyboardInterrupt
    return report


def _train(settings: TrainSettings, rule: OptimizerRule, group: Group) -> dict[str, Any] | None:
    with lasting():
        source = open_model(settings.model)
    group.agree({"version": f"{version('outsize')} on torch {torch.__version__}", **settings.shared()})
    continuing = bool(group.each(continues(settings))[0][0])
    state = StateFolder(group.folder(settings.out / "state"), several=group.size > 1).lock()
    try:
        report = _Training(settings, rule, source, state, group, continuing).report()
    except DamageError as problem:
        raise DamageError(f"{problem} {state.remedy()}") from problem
    except OutsizeError:
        if not continuing:
            state.abandon()
            forget_beginning(settings.out)
        raise
    except KeyboardInterrupt:
        dismiss(state.directory)  # somebody is there, and wants the memory back
        raise
    state.close()  # after a failure it stays locked: transfers may be under way until the process ends
    return report


class _Training:
    """One worker's part in one call of `train`."""

    def __init__(
        self,
        settings: TrainSettings,
        rule: OptimizerRule,
        source: ModelSource,
        state: StateFolder,
        group: Group,
        continuing: bool,
    ) -> None:
        self.settings, self.rule, self.source, self.state = settings, rule, source, state
        self.group, self.continuing = group, continuing
        self.moved = settle(group, settings.out / "state", state)
        self.memories = host_memories(settings.memory or self._told("memory_bytes"), group)
        self.memory = self.memories[group.rank]
        self.device_memory = device_memory(settings, group)
        self.device = find_device(self.device_memory)
        self.speaks = group.rank == 0  # and writes what there is one of
        self.folder = settings.out if self.speaks else state.directory
        self.wire, self.speeds, self.crowd = NO_WIRE, [1.0], Crowd()
        self.progress = Progress(self.memory, settings.json) if self.speaks else Silent()
        torch.manual_seed(settings.seed + group.rank)

    def report(self) -> dict[str, Any] | None:
        """None: it was interrupted, and the last step it did is committed."""
        tokenizer = self.source.tokenizer()
        if tokenizer is None:
            raise OptionError(f"{self.settings.model} has no tokenizer beside its weights; add its tokenizer files.")
        data, evaluation = self._texts(tokenizer)
        model = self.source.build(find_precision(self.settings.precision).compute).train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self._agree(model, data)
        units = find_units(model, self.settings.block_class)
        begin = self._beginning(model)
        plan = self._planned(model, units, data)
        if self.speaks:
            keep_companions(self.source, model, self.settings.out / COMPANIONS)
        if plan.legs:
            units = leave_legs(model, plan, self.settings.block_class)
        job = self._placed(model, units, plan, begin)
        if job.plan.blocked_loss and not self.continuing:
            check_loss(job, data)
        run = self._run(job, tokenizer)
        if self.speaks:
            record(self.settings)
        first = self._recovered(run)
        if not self._trained(run, data, evaluation, first):
            return None
        report = report_run(self.settings, self.folder, run, units, self.settings.steps - first)
        return report if self.speaks else {}

    # -- what it begins with ----------------------------------------------------------------------------------------

    def _texts(self, tokenizer: Any) -> tuple[PackedDataset, PackedDataset | None]:
        """What to train with, and what to evaluate with."""
        settings = self.settings
        data = self._packed(settings.data, "train", tokenizer, self.continuing)
        if settings.eval_data is None:
            return data, None
        same = self.continuing and read_settings(settings.out).plain()["eval_data"] == settings.plain()["eval_data"]
        return data, self._packed(settings.eval_data, "eval", tokenizer, same)

    def _packed(self, path: Path, name: str, tokenizer: Any, known: bool) -> PackedDataset:
        packed = self.settings.out / f"{name}.npy"

        def make() -> None:
            if not (known and packed.exists()):
                self.progress.message(f"reading {path}")
                prepare(path, tokenizer, self.settings.sequence_length, packed).close()

        self.group.once(make, packed.exists)
        return PackedDataset.open(packed)

    def _agree(self, model: nn.Module, data: PackedDataset) -> None:
        """Raises OutsizeError on all workers when one has another model or other data."""
        if self.group.size > 1:
            names = [name for name, _ in model.named_parameters()]
            weights = fingerprint_weights(self.source.config, names, self.source.read)
            self.group.agree({"model": weights, "data": data.digest()})

    # -- what goes where --------------------------------------------------------------------------------------------

    def _beginning(self, model: nn.Module) -> OptimizerState | None:
        """The optimizer's state with which the run is to begin, if any."""
        if self.settings.optimizer_state is None or self.moved is not None or self.state.read() is not None:
            return None
        begin = read_optimizer(self.settings.optimizer_state)
        check_optimizer(begin, model, self.rule)
        return begin

    def _placed(self, model: nn.Module, units: list[Unit], plan: Plan, begin: OptimizerState | None) -> Job:
        """The job, with all weights and states in the store."""
        self.group.meet_on(self.device)
        store = open_store(plan, self.state, group=self.group, device=self.device)
        self.progress.message("bringing the weights into the store")
        bound = partial(bind, model, units, plan, self.rule, store, device=self.device, group=self.group)
        job = bound(self.source.read) if self.moved is None else bring_back(self._states, self.moved, bound)
        if begin is not None:
            bring_optimizer(job.updater, job.weights, begin)
        give_back()
        return job

    def _planned(self, model: nn.Module, units: list[Unit], data: PackedDataset) -> Plan:
        settings, group = self.settings, self.group
        self.speeds, self.crowd = measure_speeds(group), measure_crowd(group)
        self.wire = measure_wire(group, self.crowd.workers)
        committed = self.state.read()
        begun = {} if committed is None else committed.facts
        if committed is not None:
            check_arranged(settings.out, begun, group)
        task = Task(
            *(model, units, self.rule, self._asked(begun, committed is not None), []),
            *(self.source.stored_dtype, settings.block_class),
        )
        if settings.pipeline and group.size > 1:
            requests = [replace(r, memory_bytes=self.memory) for r in group.first(lambda: self._lines(task, begun))]
        else:
            sequences = group.first(lambda: tuple(begun.get("sequences", ())) or self._sequences())
            requests = [task.request.divided(sequences, group.nodes)]
        sample = data.batch(list(range(min(data.count, requests[0].batch_size))))
        task = replace(task, micro_batches=[sample] * requests[0].accumulate)
        plan = self._made([replace(task, request=request) for request in requests])
        if self.speaks and not settings.json:
            _show(plan)
        return plan

    def _asked(self, begun: dict[str, Any], committed: bool) -> Request:
        """Of all workers together; `begun` is what the last committed step says."""
        settings, group = self.settings, self.group
        count, shape = len(begun.get("legs", ())), begun.get("legs_shape", LOOP)
        same = settings.legs in (None, count) and settings.legs_shape in (None, shape)
        if committed and group.size > 1 and (bool(count), True) != (settings.pipeline, same):
            raise RunError(
                f"The {group.size} workers of {settings.out} {_say_legs(count, shape)}, or another number of workers."
            )
        copies = begun.get("weight_copies", 1) if committed else None
        shares = group.first(lambda: tuple(begun.get("shares", ())) if committed else self._told("shares"))
        return request_of(settings, self.memory, self.device_memory, group, copies, shares)

    def _lines(self, task: Task, begun: dict[str, Any]) -> list[Request]:
        """Of each pipeline that the workers can be; of one that was begun, only its schedule may change."""
        legs, asked = tuple(begun.get("legs", ())), self._line
        if legs:
            asked = replace(asked, legs=len(legs), shape=begun.get("legs_shape", LOOP))
        return [line.request for line in lines_of(task, self.group.size, self.group.nodes, asked, legs)]

    @property
    def _line(self) -> PipelineRequest:
        legs = self.settings.legs or (self.group.size if self.device_memory else None)
        return PipelineRequest(legs, self.settings.legs_shape, self.settings.zero_bubble)

    def _told(self, what: str) -> Any:
        """What a plan that was given says; None if there is none."""
        return None if self.settings.plan is None else getattr(read_plan(self.settings.plan), what)

    def _sequences(self) -> tuple[int, ...]:
        """How many of a step's sequences each worker takes: as a plan says, or in proportion to their speeds."""
        settings, count = self.settings, self.settings.batch_size * self.settings.accumulate
        told = self._told("sequences")
        if told and (len(told) != self.group.size or sum(told) != count or 0 in told):
            raise OptionError(
                f"The plan's sequences {list(told)} are not those of a step of {count} for {self.group.size} workers. Make a "
                "plan for this command, or leave them out."
            )
        return told or in_proportion(count, self.speeds if settings.plan is None else [1.0] * self.group.size)

    def _made(self, tasks: list[Task]) -> Plan:
        """This worker's plan: one that was given, that of the last start, or a new one, for the best of `tasks`."""
        settings, group, path, task = self.settings, self.group, self._remembered, tasks[0]
        baseline, disks = self._found()
        now = circumstances(replace(task.request, rank=group.rank), self._line, settings.out)
        known = recall(path, now, baseline) if self.continuing and settings.plan is None else None
        if known is not None and task.request.shares not in (None, known.shares):
            known = None  # since then it was begun anew by a plan that was given
        same = group.tell(None if known is None else known.alike)
        if known is not None and same == [same[0]] * group.size:
            check_disk(known, disks[group.rank])
            return known
        slowness = recall_slowness(path) if self.continuing else None
        machine = self._machine().slowed("disk", slowness or 1.0) if group.leads else None
        machines = group.tell(machine)
        plan = group.first(lambda: self._plans(tasks, machines, baseline, disks))[group.rank]
        if settings.plan is None:
            remember(path, plan, now, baseline, slowness)
        return plan

    def _machine(self) -> Machine:
        here = this_machine(self.settings.out)
        return here if self.device_memory else here.hosted

    def _plans(self, tasks: list[Task], machines: list[Machine | None], baseline: int, disks: list[int]) -> list[Plan]:
        """One for each worker; `machines` is of the first on each node."""
        settings = self.settings
        crowd = self.crowd.times(self.speeds[0] / max(self.speeds))  # this one's prices, and the fastest one's work
        found = alike_disks(machines)
        place = Place(found[0], baseline, disks[0], self.wire, crowd, min(self.memories) - baseline)
        places = [place.beside(machine, disk) for machine, disk in zip(found, disks, strict=True)]
        workers = [Worker(memory, place) for memory, place in zip(self.memories, places, strict=True)]
        if tasks[0].request.legs:
            return plan_line(tasks, workers, settled=self.state.read() is not None)
        make = plan_training if settings.plan is None else partial(check_plan, read_plan(settings.plan))
        return plan_workers(tasks[0], workers, make)

    def _found(self) -> tuple[int, list[int]]:
        """Bytes in the process that holds most already, and free on the disk of each."""
        out, blocks = self.settings.out, self.state.blocks
        disk = describe(out).disk_free_bytes // self.group.here
        disk += blocks.stat().st_size if blocks.exists() else 0
        baselines, disks = zip(*self.group.each(process_memory().resident_bytes, disk), strict=True)
        return int(max(baselines)), list(map(int, leveled(disks)))

    # -- the steps --------------------------------------------------------------------------------------------------

    def _run(self, job: Job, tokenizer: Any) -> Run:
        about = {"model": fingerprint_model(self.source.config), "tokenizer": fingerprint_tokenizer(tokenizer)}
        retention = Retention(self.settings.keep_last, self.settings.keep_every)
        metrics = self.folder / "metrics.jsonl"
        return Run(job, self.state, metrics, self.progress, tokenizer, retention, about)

    def _recovered(self, run: Run) -> int:
        """The number of steps that are committed."""
        first = run.recover()
        self.group.each(0)
        if self.moved is not None and self.group.leads:
            retire(self._states, self.group.size)
        return first

    def _trained(self, run: Run, data: PackedDataset, evaluation: PackedDataset | None, first: int) -> bool:
        """Do the steps that are left and write the model; False: somebody wanted it to stop."""
        settings = self.settings
        scheduler = scheduler_for(settings, run.job.optimizer)
        for _ in range(first):
            scheduler.step()
        self.progress.start(settings.steps, first)
        try:
            with finishing_the_step() as pressed:

                def stopping() -> bool:  # after the same step on all workers
                    return any(other for (other,) in self.group.each(pressed() or self._plans_again(run)))

                run.train(data, Schedule.of(settings), scheduler, evaluation, stopping)
            if stopping():
                run.job.close()
                self.progress.message(f"step {run.job.step_number} of {settings.steps} is committed")
                if self._plans_again(run) and not pressed():
                    self._forget_plan(run)
                return False
            self.progress.message("writing the model")
            give_back()  # what the steps' tensors took is room for that
            export(run.job, settings.out / "model")
            if self.speaks:
                self.source.save_companions(settings.out / "model", find_precision(settings.precision).compute)
        finally:
            self.progress.stop()
        return True

    def _plans_again(self, run: Run) -> bool:
        """Steps take much longer than planned, and this was not known when they were."""
        return self.settings.replan and run.watch.behind is not None and recall_slowness(self._remembered) is None

    def _forget_plan(self, run: Run) -> None:
        """Whoever goes on plans for the disk as it was seen. Raises PlanAgain."""
        assert run.watch.behind is not None
        remember_slowness(self._remembered, run.watch.behind.disk)
        raise PlanAgain(f"{run.watch.behind}. Start again with the same command: it will plan for that.")

    @property
    def _remembered(self) -> Path:
        return self.folder / REMEMBERED

    @property
    def _states(self) -> Path:
        """Where all workers' states are."""
        return self.settings.out / "state"


def _say_legs(count: int, shape: str) -> str:
    """What workers were who had so many legs, and what to give them again."""
    if not count:
        return "divided state. Leave out --pipeline"
    return f"were a pipeline of {count} legs ({shape}). Give --pipeline without --legs and --legs-shape"


def _show(plan: Plan) -> None:
    from rich.console import Console

    Console(stderr=True).print(str(plan), markup=False, highlight=False)
