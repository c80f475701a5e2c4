"""A plan that somebody else made, or edited: obeyed, or refused with the reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from outsize.asked import Request
from outsize.errors import BudgetError, OptionError
from outsize.plan import Plan
from outsize.planner.needs import tensor_bytes
from outsize.planner.reasons import finished, of_machine
from outsize.planner.search import Placement
from outsize.planner.task import JobSizes, Task, sizes_of_job
from outsize.planner.training import Place, check_disk, search_of
from outsize.sizes import format_size
from outsize.train.job import always_near


def read_plan(path: Path) -> Plan:
    """The plan that `outsize plan --save` wrote, as it may have been edited since. Raises OptionError."""
    try:
        return Plan.from_json(path.read_bytes().decode(errors="replace"), str(path))
    except OSError as problem:
        raise OptionError(
            f"{path} cannot be read: {problem.strerror}. Write a plan with `outsize plan --save`."
        ) from problem


def check_plan(plan: Plan, task: Task, place: Place) -> Plan:
    """`plan` with what is predicted for it here and now; its decisions stay as they are.

    Raises OptionError when it is of another job, BudgetError when it does not fit, each with what is wrong."""
    request = task.request
    plan = replace(plan, rank=request.rank)
    _compare_with_request(plan, request)
    known = task.job
    _refuse_unknown("near_weights", plan.near_weights, known.sizes)
    _refuse_unknown("near_states", plan.near_states, known.sizes)
    _refuse_unknown("host_weights", plan.host_weights, known.sizes)
    _refuse_unknown("host_states", plan.host_states, known.sizes)
    _refuse_unknown("host_updates", plan.host_updates, known.sizes)
    _check_device(plan, request)
    _check_host_updates(plan, known)
    _refuse_unknown("activations", [name for name, _ in plan.activations], [unit.name for unit in task.units])
    modules = [name for unit in task.units if unit.repeated for name, _ in unit.module.named_modules()]
    _refuse_unknown("parts", plan.parts, modules)
    for part in sorted(set(plan.parts) - set(task.called(plan.parts))):
        raise OptionError(
            f"The plan's parts name {part!r}, which is not called in every unit that has it: who else uses its weight would "
            "find nothing. Leave it out."
        )
    _refuse_unknown("table_rows", [name for name, _ in plan.table_rows], known.rows)
    if {name for name, _ in plan.table_rows} != (known.rows.keys() if plan.blocked_loss else set()):
        raise OptionError(
            "The plan's blocked_loss and table_rows contradict each other: blocks need all tables, and only they need any."
        )
    job = sizes_of_job(task, dict(plan.table_rows), plan.blocked_loss, plan.hold, plan.weight_copies)
    small = always_near(task.units)  # other small weights, too, are where the plan says
    job = replace(job, always=small, ahead=plan.gather_ahead_bytes, parts=plan.parts)
    if request.keeper and not plan.shared_bytes:
        raise OptionError("The plan has no keeper (shared_bytes is 0). Make it with --keeper, or leave --keeper out.")
    _check_shared(plan, job)
    search = search_of(replace(task, request=replace(request, commit_every=plan.commit_every)), place, job, plan)
    search.needs = replace(search.needs, tensors=tensor_bytes(search.rehearsed, plan))
    told = Placement(
        near_weights=plan.near_weights | job.always,
        near_states=plan.near_states,
        arena_bytes=plan.arena_bytes,
        gradient_home=plan.gradient_home,
        filled="as told",
        shared=plan.shared_bytes > 0,
        host_weights=plan.host_weights - plan.near_weights - job.always,
        host_states=plan.host_states - plan.near_states,
        host_updates=plan.host_updates,
    )
    search.tried.append(search.choice(told))
    checked = finished(search, search.tried[0])
    _check_memory(checked, request)
    check_disk(checked, place.disk_free_bytes)
    return replace(
        plan,
        sequences=plan.sequences or request.sequences,
        memory_bytes=request.memory_bytes,
        device_bytes=request.device_bytes,
        predicted=checked.predicted,
        reasons=(*checked.reasons, of_machine(place.machine)),
    )


def _check_device(plan: Plan, request: Request) -> None:
    """Raises OptionError when plan and command do not compute at the same place."""
    where = {True: "on a device", False: "on the host"}
    planned, said = plan.device_bytes > 0, request.device_bytes > 0
    if planned != said:
        remedy = f"{plan.device_bytes >> 20}MiB" if planned else "0"
        raise OptionError(
            f"The plan computes {where[planned]}, the command {where[said]}. Give --device-memory {remedy}, or plan anew."
        )
    if not planned and (plan.host_weights or plan.host_states or plan.host_updates):
        raise OptionError(
            "The plan's host_weights, host_states and host_updates are of a device's host, and no device computes "
            "(device_bytes is 0). Name weights and states in near_weights and near_states, and no updates."
        )


def _check_host_updates(plan: Plan, job: JobSizes) -> None:
    """The host's processors update what its memory holds."""
    if plan.host_updates and plan.legs:
        raise OptionError(
            "The plan's host_updates are of a pipeline, whose ends may hold one table that they must update alike. Leave "
            "them out."
        )
    for name in sorted(plan.host_updates):
        home = plan.home_of_state(name)
        if home != "host":
            raise OptionError(
                f"The plan's host_updates names {name!r}, whose state lives on the {home}. The host updates what "
                "lives in its memory: name it in host_states and not in near_states, or not in host_updates."
            )
        if not job.sizes[name].state_bytes:
            raise OptionError(
                f"The plan's host_updates names {name!r}, which has no optimizer state: nothing is saved by updating "
                "it on the host. Leave it out."
            )
        if not job.sizes[name].elementwise:
            raise OptionError(
                f"The plan's host_updates names {name!r}, whose optimizer multiplies whole matrices: what that takes on the "
                "host is not known. Leave it out."
            )


def _check_shared(plan: Plan, job: JobSizes) -> None:
    """Memory that outlives the process must hold all of a step: with blocks on disk a crash would leave parts of two."""
    if plan.shared_bytes not in (0, job.all_bytes):
        raise OptionError(f"The plan's shared_bytes is {plan.shared_bytes}; it is {job.all_bytes} (all blocks), or 0.")
    away = sorted(
        (job.sizes.keys() - plan.near_weights - job.always)
        | {name for name, size in job.sizes.items() if size.state_bytes and name not in plan.near_states}
    )
    if plan.shared_bytes and away:
        raise OptionError(
            f"The plan's shared_bytes wants all blocks in memory that outlives the process, but {away[0]!r} or its state is "
            "on disk. Write shared_bytes 0, or name it in near_weights and near_states."
        )


def _check_memory(plan: Plan, request: Request) -> None:
    predicted = plan.predicted
    assert predicted is not None
    if predicted.device_peak_bytes > request.device_bytes:
        causes = ", ".join(f"{format_size(nbytes)} {cause}" for cause, nbytes in predicted.device_memory)
        raise BudgetError(
            f"The plan needs {format_size(predicted.device_peak_bytes)} of the device's memory, more than the "
            f"{format_size(request.device_bytes)} allowed: {causes}. Keep less near, or give more --device-memory."
        )
    needed = predicted.host_peak_bytes + plan.headroom_bytes
    if needed > request.memory_bytes:
        parts = (*predicted.memory, ("for what may come until the process looks again", plan.headroom_bytes))
        causes = ", ".join(f"{format_size(nbytes)} {cause}" for cause, nbytes in parts)
        raise BudgetError(
            f"The plan needs {format_size(needed)} here, more than the "
            f"{format_size(request.memory_bytes)} allowed: {causes}. Keep less near, or allow more memory."
        )


def _compare_with_request(plan: Plan, request: Request) -> None:
    """Raises OptionError when the plan and the command line do not say the same."""
    hold = request.hold or request.clip is not None
    loss = "blocked" if plan.blocked_loss else "module"
    if request.loss not in ("auto", loss):
        raise OptionError(
            f"The plan says loss {loss}, the command says {request.loss}. Leave --loss away, or plan anew."
        )
    for name, said in (
        ("precision", request.precision),
        ("moments", request.moments),
        ("workers", request.workers),
        ("nodes", request.nodes),
        ("close", request.close),
        ("zero", request.zero),
        ("sequences", request.sequences if plan.sequences else ()),
        ("shares", request.shares or ()),
        ("weight_copies", request.weight_copies or plan.weight_copies),
        ("accumulate", request.accumulate),
        ("clip", request.clip),
        ("hold", hold),
        ("commit_every", request.commit_every or plan.commit_every),
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
