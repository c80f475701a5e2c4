"""Which machine a plan is for: one described here by name, one in a file, or this one."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from outsize.errors import OptionError
from outsize.machine.cache import cache_file
from outsize.machine.describe import Resources, describe
from outsize.machine.file import read_machine, write_machine
from outsize.machine.machine import Machine

HERE = Path(__file__).parent
DESCRIBED = HERE / "described"
HOLDS = 3600.0  # seconds for which an estimate is kept
MEASURED = [HERE / "probe.py", HERE / "probe_disk.py", HERE / "probe_compute.py"]


def described_machines() -> list[str]:
    """Return the names of the machines that come with Outsize."""
    return sorted(path.stem for path in DESCRIBED.glob("*.toml"))


def find_machine(name: str) -> Machine:
    """Return the described machine of that name, or the one in the file at that path.

    Raises:
        OptionError: there is neither, or the file is not as it should be.
    """
    if name in described_machines():
        return read_machine(DESCRIBED / f"{name}.toml")
    if Path(name).exists() or name.endswith(".toml") or "/" in name:
        return read_machine(Path(name))
    known = ", ".join(described_machines())
    raise OptionError(f"there is no machine {name!r}. Give the path of a machine's file, or one of: {known}.")


def machine_file() -> Path:
    """Return where the probe keeps what it measured: $OUTSIZE_MACHINE, or a file in the user's configuration."""
    named = os.environ.get("OUTSIZE_MACHINE")
    if named:
        return Path(named)
    configuration = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configuration) if configuration else Path.home() / ".config") / "outsize" / "machine.toml"


def this_machine(directory: Path) -> Machine:
    """Return this machine as probed, or a quick estimate, which holds for an hour; `origin` says which. Imports torch.

    What there is of memory and of the disk of `directory` is always as it is now; how fast the disk is, is what the
    probe saw of the directory that it was given, or an estimate of one on the same disk.

    Raises:
        OptionError: the probe's file is not as it should be, or is of a machine with other processors.
    """
    from outsize.machine.probe import capacities

    resources = describe(directory)
    path = machine_file()
    if not path.exists() and "OUTSIZE_MACHINE" not in os.environ:
        return replace(_estimated(resources, directory), capacities=capacities(resources))
    machine = read_machine(path)
    now = capacities(resources)
    if {capacity.tier for capacity in now} != set(machine.tiers):
        there = ", ".join(capacity.tier for capacity in now)
        raise OptionError(
            f"{path} is of a machine with {', '.join(machine.tiers)}; this one has {there}. Run `outsize probe` again."
        )
    return replace(machine, capacities=now)


def _estimated(resources: Resources, directory: Path) -> Machine:
    """An estimate that was made within the last hour, or one that is made now, and kept if the disk could be measured."""
    import torch

    from outsize.machine.probe import estimate

    try:
        disk = os.stat(directory).st_dev
    except OSError:
        return estimate(resources, directory)
    depends = (torch.__version__, torch.get_num_threads(), platform.uname(), resources.cores, resources.device, disk)
    kept = cache_file("estimate", ".toml", depends, MEASURED)
    with suppress(OSError, OptionError):
        if 0 <= time.time() - kept.stat().st_mtime < HOLDS:
            return read_machine(kept)
    found = estimate(resources, directory)
    if found.notes:  # of its disk
        with suppress(OptionError):  # then it is made again the next time
            write_machine(found, kept)
    return found
