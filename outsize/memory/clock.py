"""Time as the store sees it. The planner runs the same store under a clock of its own (outsize.planner.clock)."""

from __future__ import annotations

import threading
from time import perf_counter


class Clock:
    """The clock on the wall."""

    def now(self) -> float:
        """Seconds, from whatever beginning."""
        return perf_counter()

    def wait(self, condition: threading.Condition) -> None:
        """Let time pass until something may have changed; the caller holds `condition` and looks again."""
        condition.wait(timeout=60)
