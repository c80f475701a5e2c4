"""What a keeper takes of the budget: a twin for each block that changes, and its process."""

from __future__ import annotations

from outsize.asked import Request
from outsize.errors import BudgetError, OptionError
from outsize.memory.shared import AVAILABLE
from outsize.planner.sizes_of import WeightSize
from outsize.sizes import format_size

PROCESS = 12 << 20  # bytes


def keeper_bytes(request: Request, sizes: dict[str, WeightSize]) -> int:
    """Bytes beside the state; 0 when no keeper is asked for. Raises OptionError where there is no memory for one to hold."""
    if not request.keeper:
        return 0
    if request.device_bytes:
        raise OptionError(
            "--keeper holds what is in the host's memory, and a device computes here. Leave it out, or compute on the host "
            "with --device-memory 0."
        )
    if not AVAILABLE:
        raise OptionError("--keeper needs memory that outlives a process, which only Linux has here. Leave it out.")
    return twin_bytes(sizes)


def twin_bytes(sizes: dict[str, WeightSize]) -> int:
    """A twin for each block that changes, and the process."""
    return PROCESS + sum((size.bytes if size.weight.trainable else 0) + size.state_bytes for size in sizes.values())


def no_room(request: Request, twins: int, least: int) -> BudgetError:
    """`least`: the memory in which all of the state stays near, and `twins` beside it."""
    return BudgetError(
        f"A keeper holds state that stays in memory, all of it, and {format_size(twins)} more: that takes "
        f"{format_size(least)}, and the budget is {format_size(request.memory_bytes)}. Give --memory {least >> 20}MiB, or "
        "leave --keeper out.",
        least,
    )
