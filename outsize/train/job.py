"""A model bound to a store and an optimizer, and the step that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from outsize.distributed.group import Group
from outsize.distributed.pipeline import Line, Pipeline
from outsize.errors import RunError
from outsize.machine.devices import CPU
from outsize.memory.store import Store
from outsize.model.attach import Attachment
from outsize.model.laps import laps_of
from outsize.model.units import Unit
from outsize.model.vocabulary import Table
from outsize.model.weights import (
    WEIGHT,
    RowBlock,
    Weight,
    bring_buffers,
    create_blocks,
    fill_blocks,
    leave_meta,
    make_weight,
)
from outsize.plan import Plan
from outsize.train.course import Course, LegByLeg, UnitByUnit
from outsize.train.ending import Begin, BlockedLoss, Counts, Ending, ModuleLoss, count_learnt
from outsize.train.gradients import Gradients
from outsize.train.loss import Head, HeadBlock, Repeat, each_time
from outsize.train.optimizers import OptimizerRule
from outsize.train.precision import find_precision
from outsize.train.randomness import random_state
from outsize.train.update import Updater, shares_for, stage_at_home

Read = Callable[[str, int, int], torch.Tensor]
"""(parameter, first row, past the last) -> those rows, in any float dtype."""


class StreamedOptimizer(Optimizer):
    """What schedulers and loops hold on to: real parameter groups, whose values the streamed update reads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        groups = [
            {"params": [weight.parameter for weight in kind.weights], **kind.initial_group}
            for kind in job.updater.kinds
        ]
        super().__init__(groups, {})
        self._opt_called = True  # schedulers look for a call of step(), which our own loop does not make

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is not None:
            raise RunError("A closure would run the model again inside the step; call loss.backward() before step().")
        self._job.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients were taken away as they came: there is nothing to clear."""


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the step's learnt tokens, `norm` the gradients' global norm before clipping, if computed;
    both, and `tokens`, are of all workers together."""

    loss: float
    norm: float | None
    tokens: int


class Job:
    """Built by `bind`. `model` is the caller's own module; run it in any loop, or give micro-batches to `train_step`."""

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        plan: Plan,
        units: list[Unit],
        weights: dict[str, Weight],
        updater: Updater,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        """`group`: of all workers; those of the updater's, all or those of a leg, divide state and batch between them."""
        self.model, self.store, self.plan, self.updater, self.weights = model, store, plan, updater, weights
        self.device = device
        self.group = group or updater.group
        tables = dict(plan.table_rows)
        resident = always_near(units) | {
            name for unit in units if not unit.repeated for name, _ in unit.parameters if name in plan.near_weights
        }
        resident -= tables.keys() | plan.split_weights
        self.attachment = Attachment(model, store, units, weights, resident, plan, device)
        self.tables = [Table(weights[name], store, users_of(model, weights[name].parameter), device) for name in tables]
        pipeline = Line(self.group.column(plan.sharers), plan.legs_shape) if plan.legs else Pipeline()
        apart = plan.accumulate if plan.legs else 0
        self.gradients = Gradients(
            *(store, self.attachment, updater, plan.gradient_home, plan.hold, plan.zero == 1, plan.accumulate > 1),
            *(apart, pipeline),
        )
        for table in self.tables:
            table.take_rows = self.gradients.take_rows
        self.optimizer = StreamedOptimizer(self)
        self.step_number = 0
        self.random_state = random_state(device)
        self.on_complete: Callable[[int], None] | None = None
        self.repeat: Repeat = each_time
        self.ending: Ending = BlockedLoss(model, self.head) if plan.blocked_loss else ModuleLoss(model)
        self.course: Course = UnitByUnit(self)
        if plan.legs:
            lengths = [plan.legs[number] for number in plan.own_legs]
            dtype = find_precision(plan.precision).compute
            laps = laps_of(model, units, lengths, pipeline.first, pipeline.last, dtype)
            self.course = LegByLeg(self, pipeline, plan.schedule, laps)
        self._own_loop: Any = None

    # -- a step of ours ---------------------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]], again: bool = True) -> StepResult:
        """One optimizer step over all micro-batches, unit by unit. `again`: another step follows at once.

        Raises RunError when the loss or a gradient is not finite; nothing of the step is then kept."""
        learnt = [count_learnt(self.model, batch["labels"]) for batch in micro_batches]
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        everyone = self.updater.group.each(sum(learnt), tokens)
        counts = Counts(learnt, int(sum(said[0] for said in everyone)))
        if not counts.everyone:
            self.check_finite(nan)  # the mean of no loss
        self.updater.step_number = self.step_number
        with self.store.phase(self._phase(), again):
            self.gradients.begin_step(self.groups())
            with torch.autograd.set_multithreading_enabled(False):
                loss = self.course.step([self.bring(batch) for batch in micro_batches], counts)
            norm = self.gradients.settle(self.groups(), self.plan.clip) if self.plan.hold else None
        self.step_number += 1
        self.updater.step_number = self.step_number  # of a held update, whether the next step applies it or a flush
        self.random_state = random_state(self.device)
        if not self.plan.hold:
            self._completed()
        return StepResult(loss, norm, int(sum(said[1] for said in everyone)))

    def bring(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch to where the model computes."""
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _phase(self) -> str:
        """A held update is applied a step late: a run's first step touches blocks otherwise than all later ones."""
        return "step, nothing to apply" if self.plan.hold and not self.gradients.settled else "step"

    def _completed(self) -> None:
        """Every weight and state is that of step `step_number`: the moment at which it can be committed."""
        if self.on_complete is not None:
            self.on_complete(self.step_number)

    def forward(self, bodies: list[Callable[[], Any]]) -> list[Any]:
        """All lanes through the model; a held update of the step before is applied on the way."""
        with self.attachment.traversal():
            self.update_unentered()
            results = self.attachment.lanes.run(bodies)
        self.apply_held()
        return results

    def apply_held(self) -> None:
        """What is left of a held update, when all units have been entered."""
        if self.gradients.settled:
            self.gradients.apply_all()
            self._completed()

    def update_unentered(self) -> None:
        """Tables and resident weights are read without a unit being entered: their held gradients come first."""
        entered = {weight.name for unit in self.attachment.units for weight in unit.weights}
        entered -= {table.weight.name for table in self.tables}  # whose rows are gathered before their unit is entered
        for name, weight in self.weights.items():
            if name not in entered:
                self.gradients.apply_weight(weight)

    def backward(self, begins: Sequence[Begin]) -> None:
        with self.attachment.traversal():
            self.attachment.lanes.back(begins)
            self.finish_gradients(len(begins))

    def finish_gradients(self, count: int) -> None:
        """All `count` micro-batches are back at the embeddings."""
        self.gradients.complete_all(count)
        for table in self.tables:
            if table.embeddings and table.weight.trainable:
                self.gradients.finish_table(table)

    def head(self, lanes: range, count: int) -> Head:
        """The head's table for these of the `count` micro-batches of a step; after the last one's gradient a block's is
        complete. None are taken of no lanes."""
        table = next(table for table in self.tables if table.heads)
        by_rows = {(block.start, block.stop): block for block in table.weight.blocks}
        tied = bool(table.embeddings)

        @contextmanager
        def weight(rows: HeadBlock) -> Iterator[torch.Tensor]:
            self.attachment.ceiling.keep()
            with self.store.lease(by_rows[rows].name) as lease:
                yield lease.tensors[WEIGHT]

        def take(rows: HeadBlock, lane: int, gradient: torch.Tensor) -> None:
            last = lanes[lane] == count - 1
            self.gradients.take_block(table, by_rows[rows], gradient, last and not tied)
            if last and tied:
                self.gradients.pause_block(by_rows[rows])

        return Head(list(by_rows), weight, take if lanes and table.weight.trainable else None, self.repeat)

    def evaluate(self, batches: Iterator[dict[str, torch.Tensor]]) -> float:
        """Mean loss over batches, without a gradient, streamed as in training."""
        total, count = 0.0, 0
        self.flush()
        with torch.no_grad(), self.evaluation_mode():
            coming = next(batches, None)
            while (batch := coming) is not None:
                coming, learnt = next(batches, None), count_learnt(self.model, batch["labels"])
                # After the last nothing is read ahead: nobody would want it.
                with self.store.phase("evaluate", again=coming is not None), self.attachment.traversal():
                    loss = self.course.evaluate(self.bring(batch), self.ending)
                total += loss * learnt if learnt else 0.0  # else the loss is the mean of nothing
                count += learnt
        return total / max(count, 1)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """The module in eval(), and optimizers that keep other weights for evaluation (schedulefree) switched over."""
        self.flush()
        training = self.model.training
        self.model.eval()
        if self.updater.has_modes:
            self.updater.visit_all("eval", self.groups())
        try:
            yield
        finally:
            self.attachment.leave_all()
            if self.updater.has_modes:
                self.updater.visit_all("train", self.groups())
            self.model.train(training)

    # -- a step of the caller's own loop ------------------------------------------------------------------------------

    def step(self) -> None:
        """End a step of the caller's own loop: the gradients that have come since the last one are applied, at once or
        just before the weight is next used."""
        self.flush()
        for table in self.tables:
            self.gradients.finish_table(table)
        self.gradients.settle(self.groups(), self.plan.clip)
        self.update_unentered()
        self.step_number += 1
        self.updater.step_number = self.step_number
        if self._own_loop is not None:
            self._own_loop.__exit__(None, None, None)
        self._own_loop = self.store.phase("own loop", again=True)
        self._own_loop.__enter__()

    # -- state ------------------------------------------------------------------------------------------------------

    def groups(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def flush(self) -> None:
        """Apply everything that is due; afterwards every weight is that of the last step."""
        self.attachment.leave_all()
        self.apply_held()

    def read(self, name: str, start: int, stop: int, master: bool = False) -> torch.Tensor:
        """Rows [start, stop) of a weight as it is now, on the host: its compute copy, or its fp32 master. Memory: the blocks'
        rows."""
        weight = self.weights[name]
        pieces = [self._read_block(weight, block, start, stop, master) for block in weight.blocks]
        found = [piece for piece in pieces if piece is not None]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_block(self, weight: Weight, block: RowBlock, start: int, stop: int, master: bool) -> torch.Tensor | None:
        first, last = max(start, block.start), min(stop, block.stop)
        if first >= last and weight.shape:
            return None
        with self.store.lease(block.name) as lease:
            whole = lease.tensors[WEIGHT]
            if master:
                whole = self.updater.masters(block, whole.view(-1)).view(weight.block_shape(block))
            rows = whole[first - block.start : last - block.start] if weight.shape else whole
            return rows.to("cpu", copy=True)

    def detach(self) -> nn.Module:
        """The module as an ordinary one, with its weights in the host's memory, in the dtype it computes in; the store is
        closed."""
        self.flush()
        found = {name: self.read(name, 0, w.shape[0] if w.shape else 1) for name, w in self.weights.items()}
        for table in self.tables:
            table.detach()
        self.attachment.detach()
        for name, weight in self.weights.items():
            weight.parameter.data = found[name]
        bring_buffers(self.model, CPU)
        self.close()
        return self.model

    def close(self) -> None:
        self.store.flush()
        self.store.close()

    def check_loss(self, part: float) -> float:
        """The loss of the step, of which this worker's lanes have found `part`. Raises RunError when it is not finite."""
        return self.check_finite(float(sum(torch.tensor(said) for (said,) in self.group.each(part))))

    def check_finite(self, loss: float) -> float:
        """Raises RunError."""
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise RunError(
                f"The loss of step {self.step_number + 1} is {loss}. The weights of the last committed step are untouched; "
                "use a smaller learning rate, warm-up, clipping, or look at the data."
            )
        return loss


def always_near(units: list[Unit]) -> set[str]:
    """Weights of modules that enclose others: they are in use for as long as the whole model runs."""
    return {name for unit in units if unit.encloses for name, _ in unit.parameters}


def users_of(model: nn.Module, parameter: nn.Parameter) -> list[nn.Module]:
    """The modules that own the parameter; several, when it is tied."""
    return [module for module in model.modules() if any(p is parameter for p in module.parameters(recurse=False))]


def bind(
    model: nn.Module,
    units: list[Unit],
    plan: Plan,
    rule: OptimizerRule,
    store: Store,
    read: Read,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
    make_updater: type[Updater] = Updater,
    group: Group | None = None,
) -> Job:
    """Bring a model's weights into the store as the plan says, and attach the module to it. `progress` hears of each
    weight that is there. Memory held is one block and its source rows. Of several workers each calls it alike."""
    leave_meta(model, device)
    bring_buffers(model, device)
    precision = find_precision(plan.precision)
    moments = torch.bfloat16 if plan.moments == "bf16" else None
    group = group or Group()
    updater = make_updater(store, precision, rule, moments, group=group.row(plan.sharers))
    weights: dict[str, Weight] = {}
    rows = dict(plan.table_rows)
    always = always_near(units)  # what is never let go must be at home near: only there is it committed
    for name, parameter in model.named_parameters():
        home = plan.near if name in always else plan.home_of(name)
        dtype = precision.compute if parameter.requires_grad else parameter.dtype
        shares = shares_for(rule, name, parameter, updater.group, plan.shares)
        stage = stage_at_home(plan, name, updater.group)
        weight = weights[name] = make_weight(name, parameter, dtype, home, rows.get(name), shares, stage)
        create_blocks(store, weight)
        if weight.trainable:
            updater.add(weight, plan.home_of_state(name), name in plan.host_updates)
        if not store.has_bytes(weight.blocks[0].home):  # else a committed step has brought them
            fill_blocks(store, weight, lambda start, stop, name=name: read(name, start, stop), updater.put)
        if progress is not None:
            progress(name)
    store.flush()
    return Job(model, store, plan, units, weights, updater, device, group)
