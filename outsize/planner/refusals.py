"""Why there is no plan: what is too small, by how much, and what would do."""

from __future__ import annotations

from outsize.errors import BudgetError
from outsize.plan import SPARE
from outsize.planner.keeper import no_room
from outsize.planner.search import Search
from outsize.sizes import format_size


def disk_too_small(nbytes: int, free: int) -> str:
    return (
        f"The state needs {format_size(nbytes)} of disk (two extents of every block, so that no step overwrites the last "
        f"committed one), and {format_size(free)} are free. Free space, or choose another --out."
    )


def no_memory(search: Search) -> BudgetError:
    """`search` is the one that needs the least memory."""
    request, needs = search.request, search.needs
    if search.needs.beside is not None:
        return _device_too_small(search) if search.host_room >= 0 else _host_too_small(search)
    if search.twins:
        return no_room(request, search.twins, _round_up(search.least))
    least = _round_up(needs.least)
    parts = (
        f"{format_size(needs.baseline)} for Python and its libraries, {format_size(needs.tensors)} tensors of a "
        f"step at {request.batch_size} x {request.sequence_length} tokens, "
        f"{format_size(needs.least_arena)} for {_largest(search)} on its way, "
        f"{format_size(needs.always + needs.scratch)} small weights and buffers"
    )
    return BudgetError(
        f"A budget of {format_size(request.memory_bytes)} is too small: this job needs at least "
        f"{format_size(least)} ({parts}). Give --memory {least >> 20}MiB, or a shorter sequence.",
        least,
    )


def _device_too_small(search: Search) -> BudgetError:
    request, needs = search.request, search.needs
    least = _round_up(needs.least)
    return BudgetError(
        f"{format_size(request.device_bytes)} of the device's memory are too few: this job needs at least "
        f"{format_size(least)} of it ({format_size(needs.baseline)} for the driver, {format_size(needs.tensors)} tensors of "
        f"a step at {request.batch_size} x {request.sequence_length} tokens, {format_size(needs.least_arena)} for "
        f"{_largest(search)} on its way, {format_size(needs.always + needs.scratch)} small weights and buffers). Give "
        f"--device-memory {least >> 20}MiB if the device has it, a smaller batch or a shorter sequence, or --device-memory "
        "0 to compute on the host."
    )


def _host_too_small(search: Search) -> BudgetError:
    """Of a device."""
    beside, request = search.needs.beside, search.request
    assert beside is not None
    least = _round_up(int(beside.fixed / (1 - SPARE)))
    moved = f", {format_size(beside.moved)} activations that wait there" if beside.moved else ""
    return BudgetError(
        f"A budget of {format_size(request.memory_bytes)} is too small for the host of a device: it needs at least "
        f"{format_size(least)} ({format_size(beside.baseline)} for Python and its libraries, {format_size(beside.libraries)} "
        f"for CUDA's{moved}, {format_size(beside.scratch + beside.headroom)} buffers). Give --memory {least >> 20}MiB.",
        least,
    )


def _largest(search: Search) -> str:
    return "the largest part of a layer" if search.bare.parts else "the largest layer"


def _round_up(nbytes: int) -> int:
    """To whole steps of 8 MiB, and at least half of one: no two processes hold quite the same."""
    return -(-(nbytes + (4 << 20)) // (8 << 20)) * (8 << 20)
