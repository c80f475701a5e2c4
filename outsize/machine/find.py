"""Which machine a plan is for: one described here by name, one in a file, or this one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from outsize.errors import OptionError
from outsize.machine.describe import describe
from outsize.machine.file import read_machine
from outsize.machine.machine import Machine

DESCRIBED = Path(__file__).parent / "described"


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
    """Return this machine as probed, or a quick estimate; `origin` says which. Imports torch.

    What there is of memory and of the disk of `directory` is always as it is now; how fast the disk is, is what the
    probe saw of the directory that it was given.

    Raises:
        OptionError: the probe's file is not as it should be, or is of a machine with other processors.
    """
    from outsize.machine.probe import capacities, estimate

    resources = describe(directory)
    path = machine_file()
    if not path.exists() and "OUTSIZE_MACHINE" not in os.environ:
        return estimate(resources, directory)
    machine = read_machine(path)
    now = capacities(resources)
    if {capacity.tier for capacity in now} != set(machine.tiers):
        there = ", ".join(capacity.tier for capacity in now)
        raise OptionError(
            f"{path} is of a machine with {', '.join(machine.tiers)}; this one has {there}. Run `outsize probe` again."
        )
    return replace(machine, capacities=now)
