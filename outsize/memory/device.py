"""Memory of a CUDA device as a tier. Written for a GPU, untested on one: none was at hand."""

from __future__ import annotations

from typing import Any

import torch

from outsize.errors import BudgetError, OptionError
from outsize.memory.host import allocate_slab
from outsize.memory.tier import MemoryTier, pages
from outsize.sizes import format_size


class DeviceTier(MemoryTier):
    """A tensor on the device for each extent. Copies run beside compute, on a stream of their own. A device "cpu" stands for
    one where there is none: all but the streams is the same.

    Raises OptionError when there is no such device, BudgetError when the device itself has less than
    `capacity`."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise OptionError(
                f"There is no device {device} for {format_size(capacity)} of device memory: torch finds no "
                "CUDA GPU. Leave the device budget out to compute on the host."
            )
        super().__init__("device", capacity)
        self._device = device

    def new(self, nbytes: int) -> torch.Tensor:
        """Memory beside all extents, as 1-D uint8 of whole pages. Raises BudgetError."""
        return self._new(pages(nbytes))

    def _new(self, nbytes: int) -> torch.Tensor:
        if self._device.type == "cpu":
            return allocate_slab(nbytes)
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as problem:
            free = format_size(torch.cuda.mem_get_info(self._device)[0])
            held = format_size(torch.cuda.memory_allocated(self._device))
            raise BudgetError(
                f"{self._device} has no {format_size(nbytes)} left: {free} are free and tensors hold {held}. Give less "
                "--device-memory than there is."
            ) from problem


def fence_of(memory: torch.Tensor) -> Any:
    """An event that has passed when the device which has this memory has done what is queued on it now; None on the host."""
    if not memory.is_cuda:
        return None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(memory.device))
    return event
