"""What this computer has, and what this process holds of it, as the operating system counts it."""

import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROCESS = Path("/proc/self")
MEMORY_INFORMATION = Path("/proc/meminfo")
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Device:
    """A GPU. `memory_bytes` is all that it has, whoever uses it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Resources:
    """What this process may use.

    `memory_bytes` is the RAM of the computer or of the cgroup that confines this process, whichever is less;
    `memory_available_bytes` is the part of it that could still be taken without swapping, beyond what this
    process already holds. `disk_free_bytes` and `file_system` are those of the directory asked about.
    """

    cores: int
    memory_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    file_system: str
    device: Device | None


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of this process, interpreter and libraries included: now, and at its highest so far."""

    resident_bytes: int
    peak_bytes: int


def describe(directory: str | Path) -> Resources:
    """Return what this process may use, with `directory` (which need not exist yet) as the place for files.

    Imports torch, to ask it for a GPU.
    """
    existing = _existing(Path(directory))
    total, available = memory()
    return Resources(
        cores=count_cores(),
        memory_bytes=total,
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(existing).free,
        file_system=file_system(existing),
        device=first_device(),
    )


def process_memory() -> ProcessMemory:
    """Return what this process holds: VmRSS and VmHWM on Linux; elsewhere the peak stands for both."""
    try:
        fields = _fields(PROCESS / "status")
        return ProcessMemory(fields["VmRSS"], fields["VmHWM"])
    except (OSError, KeyError):
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = highest if sys.platform == "darwin" else highest * 1024  # macOS counts bytes, the others KiB
        return ProcessMemory(peak, peak)


def resident_bytes() -> int:
    """What this process holds now, told fast: it is asked hundreds of times a step."""
    try:
        return int(os.pread(_statm(os.getpid()), 256, 0).split()[1]) * resource.getpagesize()
    except OSError:
        return process_memory().resident_bytes


@cache
def _statm(process: int) -> int:
    """A file descriptor that stays open: to open the file anew takes ten times as long as to read it. A child that was
    forked opens its own."""
    return os.open(PROCESS / "statm", os.O_RDONLY)


def open_files() -> int:
    """Return how many file descriptors this process holds open."""
    return len(os.listdir("/dev/fd")) - 1  # less the one that lists them


def memory(process: Path = PROCESS, information: Path = MEMORY_INFORMATION) -> tuple[int, int]:
    """Return (total, available) bytes of RAM for this process, the limits of its cgroups heeded."""
    try:
        fields = _fields(information)
        total, available = fields["MemTotal"], fields["MemAvailable"]
    except (OSError, KeyError):
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, left in _cgroup_limits(process):
        total, available = min(total, limit), min(available, left)
    return total, available


def first_device() -> Device | None:
    """Return the GPU that torch would use, or None. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Device(properties.name, properties.total_memory)


def file_system(directory: Path, process: Path = PROCESS) -> str:
    """Return the kind of file system that `directory` is on ("ext4", "tmpfs"), or "unknown"."""
    target = directory.resolve()
    around = [mount for mount in _mounts(process) if target.is_relative_to(mount.point)]
    # Of several mounts over one point the last hides the others; max() keeps the first of equals.
    nearest = max(reversed(around), key=lambda mount: len(mount.point.parts), default=None)
    return nearest.kind if nearest else "unknown"


@dataclass(frozen=True)
class _Mount:
    root: str
    point: Path
    kind: str
    options: frozenset[str]


@dataclass(frozen=True)
class _CgroupFiles:
    """The files in which a version of cgroups tells about memory; `cache` is use that can be had back."""

    limit: str
    usage: str
    cache: str


_VERSION_1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")


def which_boot() -> str:
    """Return what no other boot of any machine has; empty where the system does not say. Containers of a machine have the
    same."""
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def count_cores() -> int:
    """Return the cores that this process is allowed to run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _existing(directory: Path) -> Path:
    absolute = directory.absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def _fields(path: Path) -> dict[str, int]:
    """Read the lines `Name:  123 kB` of a file under /proc as bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}


def _mounts(process: Path) -> list[_Mount]:
    """Read proc_pid_mountinfo(5): `id parent major:minor root point options [tags] - kind source options`."""
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        place, _, what = line.partition(" - ")
        root, point = place.split()[3:5]
        kind, *_, options = what.split()
        mounts.append(_Mount(root, Path(_unescaped(point)), kind, frozenset(options.split(","))))
    return mounts


def _unescaped(path: str) -> str:
    """Undo mountinfo's spelling of white space and backslashes: a space in a path is written \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _cgroup_limits(process: Path) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes left under it) of every cgroup around the process, the innermost first."""
    for folder, files in _cgroup_folders(process):
        try:
            limit = int((folder / files.limit).read_text())
            used = int((folder / files.usage).read_text())
            statistics = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = next((int(count) for name, count in statistics if name == files.cache), 0)
        except (OSError, ValueError):  # no such file, or the word "max": this one sets no limit
            continue
        yield limit, max(0, limit - used + cache)


def _cgroup_folders(process: Path) -> Iterator[tuple[Path, _CgroupFiles]]:
    """Yield the folders that tell about the memory of the process's cgroup and of those around it."""
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        for mount in _mounts(process):
            version_2 = number == "0" and mount.kind == "cgroup2"
            version_1 = "memory" in controllers.split(",") and mount.kind == "cgroup" and "memory" in mount.options
            if not version_1 and not version_2:
                continue
            # In a container the mount may begin at the container's own cgroup, and `path` lead through it.
            inside = Path(path).relative_to(mount.root) if Path(path).is_relative_to(mount.root) else Path()
            for part in (inside, *inside.parents):
                yield mount.point / part, _VERSION_1 if version_1 else _VERSION_2
