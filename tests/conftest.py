"""What all tests need of the process they run in."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workers import Crew

# What a shell starts in the background ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def gang() -> Iterator[Crew]:
    """Processes that become workers, with what they import there already."""
    from workers import crew  # which imports torch, for tests that want it

    with crew() as made:
        yield made
