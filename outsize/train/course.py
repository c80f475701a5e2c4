"""The course of a step: in which order its micro-batches go through the units that this worker has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from outsize.distributed.group import Group
from outsize.distributed.pipeline import FORWARD, WEIGHTS, Pipeline, order_of, returning
from outsize.divided import HALVES
from outsize.model.attach import Attachment
from outsize.model.halves import in_halves
from outsize.model.laps import Lap
from outsize.model.route import hidden_of, with_hidden
from outsize.train.ending import Batch, Begin, Counts, Ending, hidden_states


class Steps(Protocol):
    """What a course asks of the job whose steps it takes (`outsize.train.job.Job`)."""

    model: nn.Module
    attachment: Attachment
    group: Group
    ending: Ending

    def forward(self, bodies: list[Callable[[], Any]]) -> list[Any]: ...
    def backward(self, begins: Sequence[Begin]) -> None: ...
    def update_unentered(self) -> None: ...
    def apply_held(self) -> None: ...
    def finish_gradients(self, count: int) -> None: ...
    def check_finite(self, loss: float) -> float: ...
    def check_loss(self, part: float) -> float: ...


class Course(Protocol):
    def step(self, micro_batches: list[Batch], counts: Counts) -> float:
        """Forward and backward of all. Returns the loss of the step; raises RunError when it is not finite."""
        ...

    def evaluate(self, batch: Batch, ending: Ending) -> float:
        """The mean loss of a batch, without a gradient, told to every worker."""
        ...


class UnitByUnit:
    """All micro-batches go through a unit while its weights are near; then through the next one."""

    def __init__(self, job: Steps) -> None:
        self._job = job

    def step(self, micro_batches: list[Batch], counts: Counts) -> float:
        job, ending = self._job, self._job.ending
        outputs = job.forward([partial(ending.forward, batch) for batch in micro_batches])
        ends = ending.ends(outputs, micro_batches, counts)
        loss = job.check_loss(float(ending.total(ends.parts, counts)))
        del outputs
        job.backward(ends.begins)
        return loss

    def evaluate(self, batch: Batch, ending: Ending) -> float:
        return ending.evaluate(batch)


@dataclass
class Passage:
    """A micro-batch between its forward and its backward: what came in, what went out, and what waits until it has gone; at
    the end of the model, where its backward begins."""

    came: torch.Tensor | None
    left: torch.Tensor
    gone: Callable[[], None]
    begin: Begin | None = None


@dataclass
class LegByLeg:
    """Each micro-batch goes through all units of a leg, then on to the next worker; in the order of a pipeline's schedule,
    and of several legs each in as many `laps`. Units are leased for one micro-batch at a time: what fits near is read
    once."""

    job: Steps
    pipeline: Pipeline
    schedule: str
    laps: list[Lap]
    _came: torch.Tensor | None = None
    _left: torch.Tensor | None = None
    _open: dict[tuple[int, int], Passage] = field(default_factory=dict)
    _later: dict[tuple[int, int], Callable[[], None]] = field(default_factory=dict)
    _parts: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, lap in enumerate(self.laps):
            hooks = [lap.exit.register_forward_hook(self._leave)]
            if number or not self.pipeline.first:  # where the model begins, nothing comes in
                hooks += [lap.entrance.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)]
            for handle in hooks:
                self.job.attachment.until_detached(handle)

    def _enter(self, lap: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._came = self.pipeline.take(hidden_of(given, named), lap)
        return with_hidden(self._came.requires_grad_(torch.is_grad_enabled()), given, named)

    def _leave(self, module: nn.Module, given: Any, found: torch.Tensor) -> None:
        self._left = found

    def _through(self, batch: Batch) -> torch.Tensor:
        """What leaves the last of a leg's layers; whatever else the module makes of it is another leg's."""
        hidden_states(self.job.model, batch)
        assert self._left is not None, "a leg has layers"
        return self._left

    def _ends(self, lap: int) -> bool:
        """The model ends in this lap."""
        return self.pipeline.last and lap == len(self.laps) - 1

    def step(self, micro_batches: list[Batch], counts: Counts) -> float:
        job, count = self.job, len(self.laps)
        order = order_of(self.schedule, self.pipeline.size, self.pipeline.rank, len(micro_batches), count)
        sent: deque[Callable[[], None]] = deque()
        self._open, self._later, self._parts = {}, {}, []
        with job.attachment.traversal():
            job.update_unentered()
            for what, lap, number in order:
                if what == FORWARD:
                    self._forward(lap, number, micro_batches[number], counts)
                elif what == WEIGHTS:
                    self._later.pop((lap, number))()
                else:
                    if len(sent) == returning(count):
                        sent.popleft()()
                    sent.append(self._backward(lap, number))
            while sent:
                sent.popleft()()
            job.finish_gradients(len(micro_batches))
        return job.check_loss(float(job.ending.total(self._parts, counts)) if self._parts else 0.0)

    def _forward(self, lap: int, number: int, batch: Batch, counts: Counts) -> None:
        job, ends = self.job, self._ends(lap)
        with self.laps[lap].alone():
            output = job.ending.forward(batch) if ends else self._through(batch)
        if number == 0 and lap == len(self.laps) - 1:
            job.apply_held()  # all units have been entered
        passage = Passage(self._came, output, (lambda: None) if ends else self.pipeline.pass_on(output, lap))
        if ends:
            found = job.ending.ends([output], [batch], counts, number)
            self._parts += found.parts
            job.check_finite(float(found.parts[0]))
            (passage.begin,) = found.begins
        self._open[lap, number] = passage
        self._came = self._left = None

    def _backward(self, lap: int, number: int) -> Callable[[], None]:
        passage = self._open.pop((lap, number))
        begin = passage.begin or (passage.left, self.pipeline.take_back(passage.left, lap))
        passage.gone()
        with torch.random.fork_rng(devices=[]):  # units that run again restore what they drew
            gradient = self._back(begin, passage.came, (lap, number))
        return (lambda: None) if gradient is None else self.pipeline.pass_back(gradient, lap)

    def _back(self, begin: Begin, came: torch.Tensor | None, turn: tuple[int, int]) -> torch.Tensor | None:
        """The gradient of what came in; in halves the weights' are for a turn of their own, all of them where nothing did."""
        if self.schedule != HALVES:
            torch.autograd.backward(*begin)
            return None if came is None else came.grad
        if came is None:
            self._later[turn] = partial(torch.autograd.backward, *begin)
            return None
        gradient, self._later[turn] = in_halves(*begin, came)
        return gradient

    def evaluate(self, batch: Batch, ending: Ending) -> float:
        loss = 0.0
        for number, lap in enumerate(self.laps):
            with lap.alone():
                if self._ends(number):
                    loss = ending.evaluate(batch)
                else:
                    self.pipeline.pass_on(self._through(batch), number)()
        self._came = self._left = None
        return self.job.group.each(loss)[-1 if self.pipeline.end else 0][0]
