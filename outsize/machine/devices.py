"""The GPU that this process computes on, if any. Written for CUDA, untested on a GPU: none was at hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from outsize.errors import OptionError
from outsize.sizes import format_size

CPU = torch.device("cpu")
CONTEXT = 1 << 30  # bytes of a device that the driver and its libraries take; assumed


def find_device(nbytes: int) -> torch.device:
    """Where to compute with up to `nbytes` of a device's memory, driver included: with 0 on the host. Torch is told to take
    no more. Of several workers on one machine each has a GPU of its own. Raises OptionError when there is none."""
    if not nbytes:
        return CPU
    number, count = _number(), torch.cuda.device_count()
    if number >= count:
        who = f" for worker {number} of this machine" if number else ""
        raise OptionError(
            f"{format_size(nbytes)} of device memory are asked for, and torch finds {count} CUDA GPUs{who}. Give "
            "--device-memory 0 to compute on the host, or fewer workers."
        )
    if nbytes > free_bytes():
        raise OptionError(
            f"GPU {number} has {format_size(free_bytes())} free, less than --device-memory {format_size(nbytes)}. Give that "
            "much, or less."
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(max(nbytes - CONTEXT, 0) / total, 1.0), device)
    return device


def free_bytes() -> int:
    """What this process may use of its GPU, driver included; 0 where there is no GPU."""
    number = _number()
    return CONTEXT + torch.cuda.mem_get_info(number)[0] if number < torch.cuda.device_count() else 0


def peak_bytes(device: torch.device) -> int:
    """The most that this process has held of the device, with what others and its driver hold now; 0 on the host."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)


def queue_beside(devices: Iterable[torch.device]) -> AbstractContextManager[None]:
    """A context for another thread: what it queues on a device among `devices` begins after what is queued there now, runs
    beside what comes later, and is done when the context ends."""
    device = next((device for device in devices if device.type == "cuda"), None)
    if device is None:
        return nullcontext()
    queued = torch.cuda.Event()
    queued.record(torch.cuda.current_stream(device))
    return _beside(torch.cuda.Stream(device), queued)


@contextmanager
def _beside(stream: torch.cuda.Stream, queued: torch.cuda.Event) -> Iterator[None]:
    with torch.cuda.stream(stream):
        stream.wait_event(queued)
        yield
    stream.synchronize()


def _number() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))
