"""Plans for several workers who serve a model together, each with a leg of it: what each of them does at its start, and what
`outsize plan` does for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from outsize.asked import ServeRequest
from outsize.errors import BudgetError
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.cluster import wire_of
from outsize.planner.legs import divide, find_route
from outsize.planner.serving import beside, plan_serving, with_pages
from outsize.planner.serving_forecast import Turn, with_forecast
from outsize.planner.training import Place
from outsize.serve.constraint import schemas_bytes
from outsize.serve.leg import Leg
from outsize.sizes import format_size


def baseline_of(model: nn.Module, resident_bytes: int, rank: int = 0) -> int:
    """What a worker holds and will hold whatever is planned: the first one follows schemas of answers."""
    config = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return resident_bytes + (schemas_bytes(config.vocab_size) if rank == 0 else 0)


def room_of(model: nn.Module, request: ServeRequest, baseline_bytes: int) -> int:
    """Bytes that a worker has for weights and pages, whichever leg it will have."""
    return request.memory_bytes - baseline_bytes - beside(model, request)


def plan_leg(
    model: nn.Module, request: ServeRequest, baseline_bytes: int, disk_free_bytes: int, rooms: Sequence[int], rank: int
) -> tuple[Plan, Leg]:
    """The leg of worker `rank` of those who have so much room, and its plan. Raises as `plan_serving`, `find_route`,
    `divide`."""
    route, units = find_route(model), find_units(model)
    leg = route.leg(divide(route, units, rooms), rank)
    plan = plan_serving(model, units, request, baseline_bytes, disk_free_bytes, leg)
    return replace(plan, workers=len(rooms), rank=rank, reasons=(f"worker {rank}: {leg}", *plan.reasons)), leg


def pages_of(plan: Plan) -> tuple[int, int]:
    """Near, and far."""
    assert plan.serving is not None
    return plan.serving.pages, plan.serving.far_pages


def with_fewest(plan: Plan, counts: Sequence[tuple[int, int]]) -> Plan:
    """All workers keep as many pages as those who have room for the fewest."""
    near, far = (min(found) for found in zip(*counts, strict=True))
    return with_pages(plan, near, far)


def plan_together(model: nn.Module, request: ServeRequest, place: Place, workers: int) -> Plan:
    """One plan of what so many workers do, on as many nodes as the machine has: memory is that of the fullest, all else of
    all together. Raises as `plan_leg`; BudgetError names the worker."""
    here = -(-workers // place.machine.nodes.count)
    disk = place.disk_free_bytes // here
    baselines = [baseline_of(model, place.baseline_bytes, rank) for rank in range(workers)]
    rooms = [room_of(model, request, baseline) for baseline in baselines]
    found = []
    for rank, baseline in enumerate(baselines):
        try:
            found.append(plan_leg(model, request, baseline, disk, rooms, rank))
        except BudgetError as problem:
            raise BudgetError(f"Worker {rank}: {problem}", problem.least) from problem
    counts = [pages_of(plan) for plan, _ in found]
    turns = [Turn.of(with_fewest(plan, counts), model, leg) for plan, leg in found]
    wire = wire_of(place.machine, here)
    return with_forecast(_together([turn.plan for turn in turns]), model, place.machine, place.prices, turns, wire)


def _together(plans: Sequence[Plan]) -> Plan:
    first = plans[0]
    predicted = [plan.predicted for plan in plans if plan.predicted is not None]
    serving = [plan.serving for plan in plans if plan.serving is not None]
    fullest = max(predicted, key=lambda one: one.host_peak_bytes)
    streamed = sum(one.bytes_read for one in predicted)
    lines = [
        f"{plan.reasons[0]}; peaks at {format_size(one.host_peak_bytes)}; {plan.reasons[-2].partition(': ')[2]}"
        for plan, one in zip(plans, predicted, strict=True)
    ]
    whole = replace(
        serving[0],
        layers=tuple(layer for one in serving for layer in one.layers),
        page_bytes=sum(one.page_bytes for one in serving),
    )
    whole_first = with_pages(replace(first, serving=whole), *pages_of(first))
    return replace(
        whole_first,
        near_weights=frozenset().union(*(plan.near_weights for plan in plans)),
        table_rows=tuple(dict(row for plan in plans for row in plan.table_rows).items()),
        packed=tuple(group for plan in plans for group in plan.packed),
        predicted=replace(fullest, bytes_read=streamed, disk_bytes=streamed),
        reasons=(*first.reasons[1:-2], *lines, whole_first.reasons[-1]),
    )
