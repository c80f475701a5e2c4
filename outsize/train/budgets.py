"""How much memory each worker may use: what it was told, or what is free."""

from __future__ import annotations

from pathlib import Path

from outsize.distributed.group import Group
from outsize.distributed.measure import leveled
from outsize.machine.describe import describe, process_memory
from outsize.machine.devices import free_bytes
from outsize.train.settings import TrainSettings


def host_memories(memory: int | None, group: Group) -> list[int]:
    """Of each worker's process: as told, or what is free; nearly alike being alike."""
    free = 0 if memory else _free_memory() // group.here
    told, found = zip(*group.each(memory or 0, free), strict=True)
    return [int(said or there) for said, there in zip(told, leveled(found), strict=True)]


def device_memory(settings: TrainSettings, group: Group) -> int:
    """Of each worker's GPU, the same for all; 0: the host computes."""
    own = free_bytes() if settings.device_memory is None else settings.device_memory
    return int(min(said for (said,) in group.each(own)))


def _free_memory() -> int:
    machine = describe(Path.cwd())
    return machine.memory_available_bytes + process_memory().resident_bytes
