"""What a placement takes, cause by cause and tier by tier, and what a step under it does: what a plan predicts."""

from __future__ import annotations

from outsize.distributed.arrangement import WIRE
from outsize.machine.caching import lasting
from outsize.machine.environment import merges
from outsize.plan import SPARE, Predicted
from outsize.planner.forecast import Forecast
from outsize.planner.keeper import twin_bytes
from outsize.planner.needs import KEPT, PINNED, TENSORS
from outsize.planner.search import Choice, Placement, Search

Causes = tuple[tuple[str, int], ...]
HELD = "Python, libraries and the process as it stands"


def predicted(search: Search, choice: Choice) -> Predicted:
    found, placement = choice.forecast, choice.placement
    request = search.request
    tokens = (sum(request.sequences) or request.batch_size * request.accumulate) * request.sequence_length
    memory, on_device = _host_memory(search, placement), _device_memory(search, placement)
    return Predicted(
        host_peak_bytes=sum(nbytes for _, nbytes in memory),
        device_peak_bytes=sum(nbytes for _, nbytes in on_device),
        bytes_read=sum(nbytes for (source, _, _), nbytes in found.moved.items() if source == "disk"),
        bytes_written=sum(nbytes for (_, target, _), nbytes in found.moved.items() if target == "disk"),
        disk_bytes=disk_bytes(search, placement, found),
        seconds_per_step=found.seconds,
        tokens_per_second=tokens / found.seconds,
        compute_seconds=found.lanes.get("compute", 0.0),
        update_seconds=found.lanes.get("update", 0.0),
        read_wait_seconds=found.waiting["read"],
        write_wait_seconds=found.waiting["write"],
        wire_wait_seconds=found.lanes.get("wire", 0.0),
        wire_bytes=sum(nbytes for (source, _, _), nbytes in found.moved.items() if source in WIRE),
        floating_operations=found.floating_operations,
        moved=tuple((*ways, nbytes) for ways, nbytes in sorted(found.moved.items())),
        memory=memory,
        device_memory=on_device,
        timeline=found.step.spans,
        tensors=thinned(found.step.live),
    )


def near_bytes(search: Search, placement: Placement) -> int:
    """Of what stays in the memory that computes, as this takes them."""
    near = sum(search.near_sizes(name)[0] for name in placement.near_weights)
    near += sum(search.near_sizes(name)[1] for name in placement.near_states)
    return near + (search.near_gradients if placement.gradient_home == search.bare.near else 0)


def host_bytes(search: Search, placement: Placement) -> int:
    """Of what lives in the memory of a device's host."""
    sizes = search.job.sizes
    there = sum(sizes[name].bytes for name in placement.host_weights)
    there += sum(sizes[name].state_bytes for name in placement.host_states)
    waiting = search.bare.near != "host" and placement.gradient_home == "host"
    return there + (search.gradient_bytes() if waiting else 0)


def disk_bytes(search: Search, placement: Placement, found: Forecast) -> int:
    """Two extents of every weight and state, and one of whatever else waits there."""
    sizes = search.job.sizes
    disk = sum(2 * (size.bytes + size.state_bytes) for size in sizes.values())
    disk += sum(n for (_, target, kind), n in found.moved.items() if (target, kind) == ("disk", "activation"))
    return disk + (search.gradient_bytes() if placement.gradient_home == "disk" else 0)


def _host_memory(search: Search, placement: Placement) -> Causes:
    beside = search.needs.beside
    if beside is not None:
        return (
            (HELD, beside.baseline),
            *((("CUDA's libraries, assumed", beside.libraries),) * (beside.libraries > 0)),
            ("weights, state and gradients that live there", host_bytes(search, placement)),
            *((("activations that wait there", beside.moved),) * (beside.moved > 0)),
            ("buffers of transfers", beside.scratch),
            *((("buffers of the update there", beside.updating),) * bool(placement.host_updates)),
        )
    needs = search.needs
    causes = (
        (HELD, needs.baseline),
        *_near_memory(search, placement),
        ("buffers of update and transfers", needs.scratch),
        *(
            (("a second copy of what changes, and the process that keeps it", twin_bytes(search.job.sizes)),)
            * placement.shared
        ),
    )
    left = search.wall - sum(nbytes for _, nbytes in causes) - needs.headroom
    kept = 0 if merges() else min(PINNED, left - int(SPARE * search.wall))
    return (*causes, *(((KEPT, kept),) * (kept > 0)))


def _device_memory(search: Search, placement: Placement) -> Causes:
    if search.needs.beside is None:
        return ()
    return (
        ("the driver and its libraries, assumed", search.needs.baseline),
        *_near_memory(search, placement),
        ("buffers of update and products", search.needs.scratch),
    )


def _near_memory(search: Search, placement: Placement) -> Causes:
    arena = placement.arena_bytes
    return (
        ("weights, state and gradients that stay near", near_bytes(search, placement)),
        ("the arena for what streams", lasting(arena) if search.bare.device_bytes else arena),
        (TENSORS, search.needs.tensors),
    )


def thinned(live: tuple[tuple[float, int], ...], points: int = 500) -> tuple[tuple[float, int], ...]:
    """The highest of each of so many runs of (time, bytes)."""
    width = max(1, len(live) // points)
    return tuple(max(live[start : start + width], key=lambda point: point[1]) for start in range(0, len(live), width))
