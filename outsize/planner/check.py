"""A plan that somebody else made, or edited: obeyed, or refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import LARGEST_RECYCLED
from outsize.plan import Plan, Request
from outsize.planner.search import Choice, Placement
from outsize.planner.training import Place, Task, check_disk, search_of, sizes_of_job
from outsize.sizes import format_size


def check_plan(plan: Plan, task: Task, place: Place) -> Plan:
    """`plan` with what is predicted for it here and now; its decisions stay as they are.

    Raises OptionError when it is of another job, BudgetError when it does not fit, each with what is wrong."""
    request = task.request
    _compare_with_request(plan, request)
    known = task.job
    _refuse_unknown("near_weights", plan.near_weights, known.sizes)
    _refuse_unknown("near_states", plan.near_states, known.sizes)
    _refuse_unknown("activations", [name for name, _ in plan.activations], [unit.name for unit in task.units])
    _refuse_unknown("table_rows", [name for name, _ in plan.table_rows], known.rows)
    if plan.blocked_loss != bool(plan.table_rows):
        raise OptionError(
            "The plan's blocked_loss and table_rows contradict each other: blocks need tables, and only they."
        )
    job = sizes_of_job(task, dict(plan.table_rows), plan.blocked_loss, plan.hold)
    search = search_of(replace(task, request=replace(request, commit_every=plan.commit_every)), place, job, plan)
    if plan.shared_bytes not in (0, job.all_bytes):
        raise OptionError(f"The plan's shared_bytes is {plan.shared_bytes}; it is {job.all_bytes} (all blocks), or 0.")
    if request.keeper and not plan.shared_bytes:
        raise OptionError("The plan has no keeper (shared_bytes is 0). Make it with --keeper, or leave --keeper out.")
    told = Placement(
        near_weights=plan.near_weights | job.always,
        near_states=plan.near_states | job.always,
        arena_bytes=plan.arena_bytes,
        gradient_home=plan.gradient_home,
        filled="as told",
        generous=plan.recycle_bytes >= LARGEST_RECYCLED,
        shared=plan.shared_bytes > 0,
    )
    search.tried.append(Choice(told, search.foretell(told)))
    checked = search.finished(search.tried[0])
    _check_memory(checked, request)
    check_disk(checked, place)
    return replace(plan, memory_bytes=request.memory_bytes, predicted=checked.predicted, reasons=checked.reasons)


def _check_memory(plan: Plan, request: Request) -> None:
    predicted = plan.predicted
    assert predicted is not None
    if predicted.host_peak_bytes > request.memory_bytes:
        causes = ", ".join(f"{format_size(nbytes)} {cause}" for cause, nbytes in predicted.memory)
        raise BudgetError(
            f"The plan needs {format_size(predicted.host_peak_bytes)} here, more than the "
            f"{format_size(request.memory_bytes)} allowed: {causes}. Keep less near, or allow more memory."
        )


def _compare_with_request(plan: Plan, request: Request) -> None:
    """Raises OptionError when the plan and the command line do not say the same of what changes the numbers."""
    hold = request.hold or request.clip is not None
    for name, said in (
        ("precision", request.precision),
        ("moments", request.moments),
        ("workers", request.workers),
        ("zero", request.zero),
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
