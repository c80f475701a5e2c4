"""Which machine a plan is for: one described here by name, one in a file, or this one."""

from __future__ import annotations

from pathlib import Path

from outsize.errors import OptionError
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
