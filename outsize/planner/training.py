"""From a request to a Plan for training: what must be near, what may be, and where the rest goes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import LARGEST_RECYCLED, give_back
from outsize.machine.describe import process_memory
from outsize.machine.find import this_machine
from outsize.machine.machine import Machine
from outsize.model.units import Unit
from outsize.model.vocabulary import Table
from outsize.plan import KEEP, MOVE, RECOMPUTE, Activations, Plan, Request
from outsize.planner.clock import Rates
from outsize.planner.needs import Needs, find_needs
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import Batch, rehearse
from outsize.planner.search import Choice, JobSizes, Placement, Search
from outsize.planner.sizes_of import WeightSize, sizes_of
from outsize.sizes import format_size
from outsize.train.job import always_near, users_of
from outsize.train.optimizers import OptimizerRule

SMALL = 1 << 16  # elements; so small a weight stays near with its state: reading it costs more than holding it
TABLE_BLOCK = 4 << 20  # elements of a vocabulary's table in one block, at most
TABLE_ROWS = 2048  # and rows: the logits of 512 tokens against them are 4 MiB


def plan_training(
    model: nn.Module,
    units: list[Unit],
    rule: OptimizerRule,
    request: Request,
    baseline_bytes: int,
    disk_free_bytes: int,
    machine: Machine | None = None,
    micro_batches: list[Batch] | None = None,
    source_dtype: torch.dtype = torch.bfloat16,
    block_class: str | None = None,
) -> Plan:
    """The plan for training `model` (its parameters may be on the meta device) within `request.memory_bytes`.

    `baseline_bytes` is what the process holds already. `machine` is where it will run; None: this one. `micro_batches`
    are like those that will come (which rows of the vocabulary they use is a matter of the text); None: made up.
    Raises BudgetError, with the smallest budget that works, when the job does not fit memory or disk."""
    job = _describe(model, units, rule, request)
    place = Place(machine or this_machine(Path.cwd()), baseline_bytes, source_dtype, block_class)
    micro_batches = micro_batches or sample_batches(model, request)
    searches = []
    for activations in _considered(request):
        bare = job.plan(request, tuple((unit.name, activations) for unit in units if unit.repeated))
        searches.append(_search(model, units, rule, request, bare, job, place, micro_batches))
    fitting = [search for search in searches if search.needs.least <= request.memory_bytes]
    if not fitting:
        raise BudgetError(
            _too_small(request, min((search.needs for search in searches), key=lambda needs: needs.least))
        )
    found = min(((search.best(), search) for search in fitting), key=lambda pair: pair[0].forecast.seconds)
    plan = found[1].finished(found[0])
    assert plan.predicted is not None
    if plan.predicted.disk_bytes > disk_free_bytes:
        raise BudgetError(
            f"The state needs {format_size(plan.predicted.disk_bytes)} of disk (two extents of every block, so that no "
            f"step overwrites the last committed one), and {format_size(disk_free_bytes)} are free. Free space, or "
            "choose another --out."
        )
    return plan


@dataclass(frozen=True)
class Place:
    """Where a job will run, and what is known of it there."""

    machine: Machine
    baseline_bytes: int
    source_dtype: torch.dtype
    block_class: str | None


def _search(
    model: nn.Module,
    units: list[Unit],
    rule: OptimizerRule,
    request: Request,
    bare: Plan,
    job: JobSizes,
    place: Place,
    micro_batches: list[Batch],
) -> Search:
    """Rehearse a plan that places nothing yet, and find what it needs. What rehearsing leaves in memory counts."""
    resident = process_memory().resident_bytes
    prices = RatedPrices(place.machine)
    found = rehearse(model, bare, rule, prices, micro_batches, place.source_dtype, place.block_class)
    give_back()
    baseline = place.baseline_bytes + max(process_memory().resident_bytes - resident, 0)
    needs = find_needs(units, job.sizes, job.rows, job.always, baseline, found, bare)
    return Search(bare, job, needs, request, Rates.of(place.machine), found)


def _considered(request: Request) -> list[Activations]:
    choices = {"keep": KEEP, "recompute": RECOMPUTE, "move": MOVE}
    if request.activations not in ("auto", *choices):
        raise OptionError(f"activations {request.activations!r} is unknown; there are auto, {', '.join(choices)}.")
    return [KEEP, RECOMPUTE] if request.activations == "auto" else [choices[request.activations]]


def check_plan(
    plan: Plan,
    model: nn.Module,
    units: list[Unit],
    rule: OptimizerRule,
    request: Request,
    baseline_bytes: int,
    disk_free_bytes: int,
    machine: Machine | None = None,
    micro_batches: list[Batch] | None = None,
    source_dtype: torch.dtype = torch.bfloat16,
    block_class: str | None = None,
) -> Plan:
    """A plan that somebody else made, with what is predicted for it here and now; its decisions stay as they are.

    Raises OptionError when it is of another job, BudgetError when it does not fit, each with what is wrong."""
    _compare_with_request(plan, request)
    job = _describe(model, units, rule, request)
    _refuse_unknown("near_weights", plan.near_weights, job.sizes)
    _refuse_unknown("near_states", plan.near_states, job.sizes)
    _refuse_unknown("activations", [name for name, _ in plan.activations], [unit.name for unit in units])
    _refuse_unknown("table_rows", [name for name, _ in plan.table_rows], job.rows)
    if plan.blocked_loss != bool(plan.table_rows):
        raise OptionError(
            "The plan's blocked_loss and table_rows contradict each other: blocks need tables, and only they."
        )
    rows = dict(plan.table_rows)
    sizes = sizes_of(model, rule, plan.precision, plan.moments, rows)
    job = JobSizes(sizes, rows, plan.blocked_loss, _always(units, sizes, rows), plan.hold)
    place = Place(machine or this_machine(Path.cwd()), baseline_bytes, source_dtype, block_class)
    search = _search(model, units, rule, request, plan, job, place, micro_batches or sample_batches(model, request))
    near = Placement(
        plan.near_weights | job.always,
        plan.near_states | job.always,
        plan.arena_bytes,
        plan.gradient_home,
        "as told",
        plan.recycle_bytes >= LARGEST_RECYCLED,
    )
    search.tried.append(Choice(near, search.foretell(near)))
    checked = search.finished(search.tried[0])
    predicted = checked.predicted
    assert predicted is not None
    if predicted.host_peak_bytes > request.memory_bytes:
        causes = ", ".join(f"{format_size(nbytes)} {cause}" for cause, nbytes in predicted.memory)
        raise BudgetError(
            f"The plan needs {format_size(predicted.host_peak_bytes)} here, more than the "
            f"{format_size(request.memory_bytes)} allowed: {causes}. Keep less near, or allow more memory."
        )
    if predicted.disk_bytes > disk_free_bytes:
        raise BudgetError(
            f"The plan needs {format_size(predicted.disk_bytes)} of disk, and {format_size(disk_free_bytes)} are free."
        )
    return replace(plan, predicted=predicted, reasons=checked.reasons)


def _compare_with_request(plan: Plan, request: Request) -> None:
    """Raises OptionError when the plan and the command line do not say the same of what changes the numbers."""
    hold = request.hold or request.clip is not None
    for name, said in (
        ("precision", request.precision),
        ("moments", request.moments),
        ("accumulate", request.accumulate),
        ("clip", request.clip),
        ("hold", hold),
    ):
        if getattr(plan, name) != said:
            raise OptionError(
                f"The plan says {name} {getattr(plan, name)}, the command says {said}. Make a plan for this command, or "
                "give the command the plan's value."
            )


def _refuse_unknown(key: str, names: Iterable[str], known: Collection[str]) -> None:
    strange = sorted(set(names) - set(known))
    if strange:
        raise OptionError(
            f"The plan's {key} names {strange[0]!r}, which this model does not have there. It is a plan for another model, "
            "or the name is misspelt."
        )


def _describe(model: nn.Module, units: list[Unit], rule: OptimizerRule, request: Request) -> JobSizes:
    blocked, tables = _loss_choice(model, request)
    rows = {name: table_rows(parameter) for name, parameter in tables.items()}
    sizes = sizes_of(model, rule, request.precision, request.moments, rows)
    return JobSizes(sizes, rows, blocked, _always(units, sizes, rows), request.hold or request.clip is not None)


def sample_batches(model: nn.Module, request: Request) -> list[Batch]:
    """Micro-batches of made-up text: word frequencies fall as 1 / (rank + 2.7), as in natural language (Mandelbrot)."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    words = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 256
    weights = 1.0 / (torch.arange(words, dtype=torch.float32) + 2.7)
    generator = torch.Generator().manual_seed(0)
    count = request.batch_size * request.sequence_length

    def batch() -> Batch:
        ids = torch.multinomial(weights, count, replacement=True, generator=generator)
        ids = ids.view(request.batch_size, request.sequence_length)
        return {"input_ids": ids, "labels": ids.clone()}

    return [batch() for _ in range(request.accumulate)]


# -- choices ----------------------------------------------------------------------------------------------------------


def _loss_choice(model: nn.Module, request: Request) -> tuple[bool, dict[str, nn.Parameter]]:
    """Whether the head is computed in blocks, and the weights that become tables for it."""
    if request.loss not in ("auto", "blocked", "module"):
        raise OptionError(f"loss {request.loss!r} is unknown; there are auto, blocked and module.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    plain = isinstance(head, nn.Linear) and head.bias is None and isinstance(embedding, nn.Embedding)
    if request.loss == "module" or not plain or not decoder_only:
        if request.loss == "blocked":
            raise OptionError(
                f"{type(model).__name__} has no plain embedding and head to compute in blocks; use loss=module."
            )
        return False, {}
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    chosen = {id(head.weight), id(embedding.weight)}
    tables = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and all(Table.suits(module) for module in users_of(model, parameter))
    }
    return len(tables) == len(chosen), tables if len(tables) == len(chosen) else {}


def table_rows(parameter: nn.Parameter) -> int:
    """Rows of a vocabulary's table in one block."""
    return max(1, min(TABLE_ROWS, TABLE_BLOCK // parameter[0].numel()))


def _always(units: list[Unit], sizes: dict[str, WeightSize], rows: dict[str, int]) -> set[str]:
    small = {name for name, size in sizes.items() if size.weight.numel <= SMALL and name not in rows}
    return small | always_near(units)


def _too_small(request: Request, needs: Needs) -> str:
    parts = (
        f"{format_size(needs.baseline)} for Python and its libraries, {format_size(needs.tensors)} tensors of a "
        f"step at {request.batch_size} x {request.sequence_length} tokens, "
        f"{format_size(needs.least_arena)} for the largest layer on its way, "
        f"{format_size(needs.always + needs.scratch)} small weights and buffers"
    )
    return (
        f"A budget of {format_size(request.memory_bytes)} is too small: this job needs at least "
        f"{format_size(_round_up(needs.least))} ({parts}). Give --memory {_mebibytes(needs.least)}, or a shorter sequence."
    )


def _round_up(nbytes: int) -> int:
    return -(-nbytes // (1 << 20)) * (1 << 20)


def _mebibytes(nbytes: int) -> str:
    return f"{_round_up(nbytes) >> 20}MiB"
