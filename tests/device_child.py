"""The command `outsize` on a machine with a GPU, for which host memory stands: all but its streams and events is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import outsize.training
from outsize.cli import main
from outsize.machine.devices import CPU
from outsize.machine.find import find_machine, this_machine
from outsize.machine.machine import Machine


def with_a_card(directory: Path) -> Machine:
    """This machine's memory and disk, and the card of a described one."""
    here, card = this_machine(directory), find_machine("rtx-4090")
    tiers = {capacity.tier: capacity for capacity in (*card.capacities, *here.capacities)}
    return replace(card, capacities=tuple(tiers.values()))


if __name__ == "__main__":
    outsize.training.find_device = lambda nbytes: CPU
    outsize.training.this_machine = with_a_card
    main()
