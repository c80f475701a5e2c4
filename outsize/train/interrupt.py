"""Ctrl-C in two strengths: the first lets the step end and be committed, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from outsize.distributed.launch import says_for_all

SAID = b"\noutsize: stopping when this step is done and committed; press Ctrl-C again to stop at once\n"


@contextmanager
def finishing_the_step() -> Iterator[Callable[[], bool]]:
    """Yields a function that is true once Ctrl-C was pressed. The second time raises KeyboardInterrupt, as ever; so does
    the first in a program that handles Ctrl-C otherwise, and nothing changes outside the main thread."""
    pressed = threading.Event()

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pressed.set()
        with suppress(OSError):
            if says_for_all():
                os.write(2, SAID)  # a print might be in the middle of another print

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, first)
    try:
        yield pressed.is_set
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
