"""Time as the store sees it. The planner runs the same store under a clock of its own (outsize.planner.clock)."""

from __future__ import annotations

import threading
from collections import deque
from time import perf_counter

Span = tuple[str, float, float]
"""(what was done, its beginning and its end on the clock, in seconds)."""
REMEMBERED = 1 << 14  # spans; some hundred are a small step's, some thousand a large one's


class Clock:
    """The clock on the wall, and what was done when: the last spans that anybody noted, from any thread."""

    def __init__(self) -> None:
        self.noted: deque[Span] = deque(maxlen=REMEMBERED)

    def now(self) -> float:
        """Seconds, from whatever beginning."""
        return perf_counter()

    def wait(self, condition: threading.Condition) -> None:
        """Let time pass until something may have changed; the caller holds `condition` and looks again."""
        condition.wait(timeout=60)

    def note(self, what: str, started: float) -> float:
        """`what` took from `started` until now. Returns its seconds."""
        now = self.now()
        self.noted.append((what, started, now))
        return now - started
