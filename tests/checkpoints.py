"""Tiny jobs that commit into a state folder as a run does, for tests of what is made of their steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from exactness import Setting, make_batches, make_plan
from torch import nn

from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.train.checkpoint import Checkpoint, open_checkpoint
from outsize.train.import_state import bring_optimizer, check_optimizer
from outsize.train.job import Job, bind
from outsize.train.optimizer_file import OptimizerState
from outsize.train.optimizers import OptimizerRule
from outsize.train.run import Run
from outsize.train.state import StateFolder, open_store

BATCHES = make_batches(8, 1)


class Trained:
    """A job on `model` with its state in `directory`; `go(steps)` trains on the next batches and commits."""

    def __init__(
        self, model: nn.Module, rule: OptimizerRule, plan: Plan, directory: Path, begin: OptimizerState | None = None
    ) -> None:
        self.folder = StateFolder(directory).lock()
        sources = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return sources[name][start:stop] if sources[name].dim() else sources[name]

        store = open_store(plan, self.folder)
        self.job: Job = bind(model, find_units(model), plan, rule, store, read, torch.device("cpu"))
        if begin is not None:
            check_optimizer(begin, model, rule)
            bring_optimizer(self.job.updater, self.job.weights, begin)
        self.run = Run(self.job, self.folder, directory / "metrics.jsonl", None)  # pyright: ignore[reportArgumentType]
        self.run.recover()

    def go(self, steps: int, keep: bool = False, first: int | None = None) -> None:
        for _ in range(steps):
            batches = BATCHES[self.job.step_number if first is None else first + self.job.step_number]
            self.job.train_step(batches)
        if keep:
            self.folder.ask_to_keep()
        self.run.finish()

    def masters(self) -> dict[str, torch.Tensor]:
        return {
            name: self.job.read(name, 0, weight.shape[0] if weight.shape else 1, master=True)
            for name, weight in self.job.weights.items()
        }

    def close(self) -> None:
        self.job.close()
        self.folder.close()


@contextmanager
def trained(
    model: nn.Module,
    rule: OptimizerRule,
    directory: Path,
    setting: Setting = Setting(),  # noqa: B008
    begin: OptimizerState | None = None,
) -> Iterator[Trained]:
    run = Trained(model, rule, make_plan(model, setting), directory, begin)
    try:
        yield run
    finally:
        run.close()


@contextmanager
def opened(directory: Path, step: int | None = None) -> Iterator[Checkpoint]:
    with open_checkpoint(StateFolder(directory), step) as checkpoint:
        yield checkpoint
