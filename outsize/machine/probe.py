"""Measures this machine once, as the engine will use it. A minute in full, a few seconds when quick."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

from outsize.machine.describe import Resources, describe
from outsize.machine.machine import Capacity, Limit, Link, Machine, Processor, Spread
from outsize.machine.probe_compute import Stopwatch, probe_links, probe_processor
from outsize.machine.probe_disk import DiskProbe, probe_disk

Report = Callable[[str], None]
SECONDS, QUICK_SECONDS = 0.6, 0.02  # for each figure
ASSUMED_DISK, ASSUMED_LATENCY = 1e9, 1e-4  # bytes/s and seconds, of a disk that nobody measured
ESTIMATE_ROOM = 64 << 20  # bytes; an estimate is made inside a run, whose memory is the user's budget
CUDA_LATENCY = 1e-5  # seconds; starting a copy, assumed


def probe(directory: Path, quick: bool = False, report: Report = lambda _: None) -> Machine:
    """Measure processors, memory, the disk of `directory` and, when there is a GPU, its links.

    `quick` is to see that all works: its figures are rough. `report` hears what is being measured.

    Raises:
        StorageError: the directory cannot be written, or has too little space.
    """
    resources = describe(directory)
    disk = probe_disk(directory, resources.file_system, quick, report)
    origin = f"probed {'quickly ' if quick else ''}on {date.today()}"
    return _machine(resources, _Compute(resources, QUICK_SECONDS if quick else SECONDS, report), disk, origin)


def estimate(resources: Resources) -> Machine:
    """Measure what takes a second and 64 MiB, and assume a disk of 1 GB/s."""
    compute = _Compute(resources, QUICK_SECONDS, lambda _: None, ESTIMATE_ROOM)
    return _machine(resources, compute, None, "estimated in a second, its disk assumed; `outsize probe` measures it")


class _Compute:
    """The processors of this machine and the links between them, measured in an eighth of each memory or in `room`."""

    def __init__(self, resources: Resources, seconds: float, report: Report, room: int | None = None) -> None:
        self.processors: list[Processor] = []
        self.links: list[Link] = []
        self.limits: list[Limit] = []
        self.spreads: list[Spread] = []
        host = Stopwatch("cpu", seconds)
        self._add(
            host, "host", _processor_name(), resources.cores, room or resources.memory_available_bytes // 8, report
        )
        if resources.device is not None:
            device = Stopwatch("cuda", seconds)
            self._add(device, "device", resources.device.name, 1, room or resources.device.memory_bytes // 8, report)
            report("links between host and device")
            self._link(probe_links(device, room or resources.memory_available_bytes // 8))

    def _add(self, watch: Stopwatch, tier: str, name: str, cores: int, room: int, report: Report) -> None:
        processor, seen = probe_processor(watch, tier, name, cores, room, report)
        self.processors.append(processor)
        self.spreads += seen

    def _link(self, seen: list[Spread]) -> None:
        up, down, both, *others = (one.median for one in seen)
        self.links += [
            Link("host", "device", up, CUDA_LATENCY, "host and device"),
            Link("device", "host", down, CUDA_LATENCY, "host and device"),
            *(Link("device", "device", rate, CUDA_LATENCY) for rate in others),
        ]
        self.limits.append(Limit("host and device", both))
        self.spreads += seen


def _machine(resources: Resources, compute: _Compute, disk: DiskProbe | None, origin: str) -> Machine:
    read, write, mixed, read_latency, write_latency = (
        (seen.median for seen in disk.spreads) if disk else (*[ASSUMED_DISK] * 3, *[ASSUMED_LATENCY] * 2)
    )
    links = (
        Link("disk", "host", read, read_latency, "disk"),
        Link("host", "disk", write, write_latency, "disk"),
        *compute.links,
    )
    return Machine(
        name=f"{platform.node() or 'this machine'}: {_processor_name()}",
        capacities=capacities(resources),
        links=links,
        processors=tuple(compute.processors),
        limits=(Limit("disk", mixed), *compute.limits),
        origin=origin,
        notes=disk.notes if disk else (),
        spreads=(*compute.spreads, *(disk.spreads if disk else ())),
    )


def capacities(resources: Resources) -> tuple[Capacity, ...]:
    """Return what there is now: all memory of host and device, and what the disk has free."""
    device = [Capacity("device", resources.device.memory_bytes)] if resources.device else []
    return (
        *device,
        Capacity("host", resources.memory_bytes),
        Capacity("disk", max(1, resources.disk_free_bytes)),
    )


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "CPU"
