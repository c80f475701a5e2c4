"""From what a run was told to its optimizer classes, their options and its schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from outsize.train.optimizer_file import Group, class_path
from outsize.train.optimizers import OptimizerRule, UniformRule, default_rule, find_optimizer, fused_options
from outsize.train.schedules import schedule
from outsize.train.settings import TrainSettings


def optimizer_rule(settings: TrainSettings) -> OptimizerRule:
    """Raises OptionError for an unknown optimizer or option."""
    return rule_of(settings.optimizer, {"lr": settings.learning_rate, **settings.optimizer_options})


def rule_of(name: str, options: dict[str, Any]) -> OptimizerRule:
    """The optimizer of that name. Raises OptionError for an unknown optimizer or option."""
    cls, rule = find_optimizer(name), default_rule(name, options)
    return UniformRule(cls, {**fused_options(cls), **options}) if isinstance(rule, UniformRule) else rule


def scheduler_for(settings: TrainSettings, optimizer: Optimizer) -> Any:
    """The run's schedule over `optimizer`, at step 0."""
    options = {}
    if settings.schedule == "power":
        options = {"batch_size": settings.batch_size * settings.accumulate, "sequence_length": settings.sequence_length}
    return schedule(settings.schedule, optimizer, settings.steps, settings.warmup_steps, **options)


def groups_at(settings: TrainSettings, step: int, shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """What an ordinary optimizer would have in its parameter groups once `step` steps of the run are done, the learning
    rate among it, for parameters of these shapes."""
    rule = optimizer_rule(settings)
    kinds: list[tuple[tuple[type[Optimizer], dict[str, Any]], list[str]]] = []
    for name, shape in shapes.items():
        choice = rule(name, torch.empty(shape, device="meta"))
        same = next((names for known, names in kinds if known == choice), None)
        if same is None:
            kinds.append((choice, same := []))
        same.append(name)
    optimizer = Optimizer([_own_group(cls, options) for (cls, options), _ in kinds], {})
    optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue] - schedulers look for a call of step()
    scheduler = scheduler_for(settings, optimizer)
    for _ in range(step):
        scheduler.step()
    return [
        Group(class_path(cls), {k: v for k, v in group.items() if k not in ("params", "initial_lr")}, tuple(names))
        for ((cls, _), names), group in zip(kinds, optimizer.param_groups, strict=True)
    ]


def _own_group(cls: type[Optimizer], options: dict[str, Any]) -> dict[str, Any]:
    return cls([torch.nn.Parameter(torch.zeros(1, 1))], **options).param_groups[0]
