"""Measures this machine once, as the engine will use it. A minute in full, a few seconds when quick."""

from __future__ import annotations

import platform
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from statistics import median

from outsize.errors import StorageError
from outsize.machine.describe import Resources, describe
from outsize.machine.machine import Capacity, Limit, Link, Machine, Processor, Spread
from outsize.machine.probe_compute import ROWS, Stopwatch, count_devices, make_processor, probe_links, time_processor
from outsize.machine.probe_disk import ESTIMATE, FULL, QUICK, DiskProbe, probe_disk

Report = Callable[[str], None]
SECONDS, QUICK_SECONDS = 0.6, 0.02  # for each figure, all passes together
PASSES = 3
ASSUMED_DISK, ASSUMED_LATENCY = 1e9, 1e-4  # bytes/s and seconds, of a disk that nobody measured
ESTIMATE_ROOM = 64 << 20  # bytes; an estimate is made inside a run, whose memory is the user's budget
FEW_ROWS = ROWS[:-1]  # of an estimate's products: the last take longest, and differ little from those before
CUDA_LATENCY = 1e-5  # seconds; starting a copy, assumed


def probe(directory: Path, quick: bool = False, report: Report = lambda _: None) -> Machine:
    """Measure processors, memory, the disk of `directory` and, when there is a GPU, its links.

    `quick` is to see that all works: its figures are rough. `report` hears what is being measured.

    Raises:
        StorageError: the directory cannot be written, or has too little space.
    """
    resources = describe(directory)
    disk = probe_disk(directory, resources.file_system, QUICK if quick else FULL, report)
    origin = f"probed {'quickly ' if quick else ''}on {date.today()}"
    seconds, passes = (QUICK_SECONDS, 1) if quick else (SECONDS, PASSES)
    return _machine(resources, _Compute(resources, seconds, passes, report), disk, origin)


def estimate(resources: Resources, directory: Path) -> Machine:
    """Measure what takes two seconds, some 250 MiB of memory, and for that long 256 MiB of the disk of `directory`; a disk
    that cannot be written is assumed."""
    origin = f"estimated in two seconds{{}}, {datetime.now():%Y-%m-%d %H:%M}; `outsize probe` measures it"
    compute = _Compute(resources, QUICK_SECONDS, 1, lambda _: None, ESTIMATE_ROOM, FEW_ROWS)
    try:
        disk = probe_disk(directory, resources.file_system, ESTIMATE, lambda _: None)
    except StorageError:
        return _machine(resources, compute, None, origin.format(", its disk assumed"))
    return _machine(resources, compute, disk, origin.format(""))


class _Compute:
    """The processors of this machine and the links between them, measured `passes` times one after the other, so that a
    passing disturbance is not all in one figure; in an eighth of each memory, or in `room` bytes; products of `rows`."""

    def __init__(
        self,
        resources: Resources,
        seconds: float,
        passes: int,
        report: Report,
        room: int | None = None,
        rows: tuple[int, ...] = ROWS,
    ) -> None:
        self.processors: list[Processor] = []
        self.links: list[Link] = []
        self.limits: list[Limit] = []
        self.spreads: list[Spread] = []
        host_room = room or resources.memory_available_bytes // 8
        host = Stopwatch("cpu", seconds / passes)
        seen = _combined([time_processor(host, "host", host_room, report, rows) for _ in range(passes)])
        self.processors.append(make_processor("host", _processor_name(), 1, resources.cores, seen))
        self.spreads += seen
        if resources.device is not None:
            device = Stopwatch("cuda", seconds / passes)
            device_room = room or resources.device.memory_bytes // 8
            seen = _combined([time_processor(device, "device", device_room, report, rows) for _ in range(passes)])
            self.processors.append(make_processor("device", resources.device.name, count_devices(), 1, seen))
            report("links between host and device")
            self._link(probe_links(device, host_room))
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


def _combined(passes: list[list[Spread]]) -> list[Spread]:
    """Return one spread for each figure: the median of the passes' medians, and the extremes of all."""
    return [
        Spread(
            same[0].figure,
            same[0].unit,
            min(one.lowest for one in same),
            median(one.median for one in same),
            max(one.highest for one in same),
            sum(one.times for one in same),
        )
        for same in zip(*passes, strict=True)
    ]


def _machine(resources: Resources, compute: _Compute, disk: DiskProbe | None, origin: str) -> Machine:
    read, write, both = _disk(disk)
    return Machine(
        name=f"{platform.node() or 'this machine'}: {_processor_name()}",
        capacities=capacities(resources),
        links=(read, write, *compute.links),
        processors=tuple(compute.processors),
        limits=(both, *compute.limits),
        origin=origin,
        notes=disk.notes if disk else (),
        spreads=(*compute.spreads, *(disk.spreads if disk else ())),
    )


def _disk(seen: DiskProbe | None) -> tuple[Link, Link, Limit]:
    """Its links, and what both together are limited to; assumed, where nobody measured it."""
    if seen is None:
        assumed = (ASSUMED_DISK, ASSUMED_LATENCY, "disk")
        return Link("disk", "host", *assumed), Link("host", "disk", *assumed), Limit("disk", ASSUMED_DISK)
    return (
        Link("disk", "host", seen.read.median, seen.read_latency.median, "disk", seen.read_core.median),
        Link("host", "disk", seen.write.median, seen.write_latency.median, "disk", seen.write_core.median),
        Limit("disk", seen.mixed.median),
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
