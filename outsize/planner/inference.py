"""From a budget to a Plan for running a model forward only."""

from __future__ import annotations

import torch
from torch import nn

from outsize.errors import BudgetError
from outsize.memory.tier import pages
from outsize.model.units import Unit
from outsize.model.vocabulary import Table
from outsize.plan import KEEP, Plan, Predicted
from outsize.planner.demand import measure_demand
from outsize.planner.training import SMALL, TABLE_BLOCK, table_rows
from outsize.sizes import format_size
from outsize.train.job import always_near, users_of

ALLOCATOR = 2.0  # resident over live bytes of torch's CPU allocator; docs/log.md has the measurement
FIXED = 232 << 20  # bytes: what glibc's heap hoards beside, thread stacks, kernels' scratch; docs/log.md


def plan_inference(
    model: nn.Module, units: list[Unit], memory_bytes: int, tokens: int, baseline_bytes: int, disk_free_bytes: int
) -> Plan:
    """The plan for running `model` over up to `tokens` tokens of one sequence within `memory_bytes`.

    Raises BudgetError, with the smallest budget that works."""
    sizes = {name: pages(p.numel() * p.dtype.itemsize) for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())

    def run(fake: nn.Module) -> torch.Tensor:
        return fake(input_ids=torch.zeros((1, tokens), dtype=torch.long), logits_to_keep=1)

    dtype = next(iter(parameters.values())).dtype
    demand = measure_demand(model, dtype, run, KEEP, gradients=False)
    fixed = baseline_bytes + int(ALLOCATOR * demand.peak) + FIXED
    if fixed + sum(sizes.values()) <= memory_bytes:
        predicted = Predicted(fixed + sum(sizes.values()), 0, 0, 0, 0)
        return Plan("stored", pages(1), frozenset(sizes), memory_bytes=memory_bytes, predicted=predicted)
    rows = {
        name: table_rows(parameter)
        for name, parameter in parameters.items()
        if parameter.numel() > TABLE_BLOCK and _is_table(model, parameter)
    }
    near = {n for n, p in parameters.items() if p.numel() <= SMALL and n not in rows} | always_near(units)
    largest = max(sum(sizes[n] for n, _ in unit.parameters if n not in near and n not in rows) for unit in units)
    largest = max(largest, *(TABLE_BLOCK * parameters[n].dtype.itemsize for n in rows), 0)
    fixed += sum(sizes[name] for name in near)
    least = fixed + pages(int(1.1 * largest))
    if least > memory_bytes:
        raise BudgetError(
            f"A budget of {format_size(memory_bytes)} is too small for {tokens} tokens: at least "
            f"{format_size(least)} are needed ({format_size(baseline_bytes)} for Python and its libraries, "
            f"{format_size(largest)} for the largest layer). Give --memory {-(-least // (1 << 20))}MiB."
        )
    arena = min(pages(int(2.3 * largest)), memory_bytes - fixed) // pages(1) * pages(1)
    room = memory_bytes - fixed - arena
    for name, nbytes in sizes.items():
        if name not in near and name not in rows and nbytes <= room:
            near.add(name)
            room -= nbytes
    far = sum(nbytes for name, nbytes in sizes.items() if name not in near)
    if far > disk_free_bytes:
        raise BudgetError(
            f"{format_size(far)} of weights must stream from disk and {format_size(disk_free_bytes)} are free. "
            "Free space, or name another directory with --scratch."
        )
    predicted = Predicted(memory_bytes - room, 0, far, 0, far)
    return Plan(
        "stored",
        arena,
        frozenset(near),
        table_rows=tuple(rows.items()),
        blocked_loss=bool(rows),
        memory_bytes=memory_bytes,
        predicted=predicted,
    )


def _is_table(model: nn.Module, parameter: nn.Parameter) -> bool:
    users = users_of(model, parameter)
    return bool(users) and all(Table.suits(module) for module in users) and _outside_units(model, users)


def _outside_units(model: nn.Module, users: list[nn.Module]) -> bool:
    ends = [
        getattr(model, "get_output_embeddings", lambda: None)(),
        getattr(model, "get_input_embeddings", lambda: None)(),
    ]
    return all(any(user is end for end in ends) for user in users)
