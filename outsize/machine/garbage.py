"""When Python looks for garbage: hardly while a process makes what it will keep."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = 1000  # collections of what is young for each of everything; Python's own is 10


@contextmanager
def lasting() -> Iterator[None]:
    """What is made within it stays, such as modules that are imported: of half a million objects, to look at all of them
    again and again takes a sixth of the time. What dies young is still collected."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)
