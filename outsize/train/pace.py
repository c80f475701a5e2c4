"""Whether steps go as planned: the first ones after the warm-up, by cause, beside the plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from statistics import median

from outsize.memory.clock import Span
from outsize.plan import Predicted
from outsize.train.report import WARM_UP

LOOKED_AT = 3  # steps
MUCH_SLOWER = 1.25  # times the planned seconds; below, a step may differ by as much from the next
WORK = ("compute", "update", "wire")


@dataclass(frozen=True)
class Pace:
    """Seconds of a step, and of them: compute, update and exchange; and how long the disk read or wrote."""

    step: float
    work: float
    disk: float

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Pace:
        """Of a step's timeline."""
        spans = list(spans)
        work, waiting = (
            sum(end - begin for lane, begin, end in spans if lane in lanes) for lanes in (WORK, ("waiting",))
        )
        return cls(
            work + waiting, work, covered((begin, end) for lane, begin, end in spans if lane in ("read", "write"))
        )

    @classmethod
    def planned(cls, predicted: Predicted) -> Pace:
        """A long step's timeline is played over some of its units: the share of each cause is that of the whole."""
        played = cls.of(predicted.timeline)
        scale = (predicted.seconds_per_step or 0.0) / played.step if played.step else 1.0
        return cls(*(scale * seconds for seconds in astuple(played)))

    @classmethod
    def median(cls, several: Sequence[Pace]) -> Pace:
        return cls(*(median(values) for values in zip(*map(astuple, several), strict=True)))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of them is."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, until), 0.0)
        until = max(until, end)
    return total


@dataclass(frozen=True)
class Behind:
    """Steps take much longer than planned."""

    planned: Pace
    measured: Pace

    @property
    def disk(self) -> float:
        """How many times as long the disk takes for the same bytes; 1: it is as fast as planned."""
        return max(self.measured.disk / self.planned.disk, 1.0) if self.planned.disk else 1.0

    def __str__(self) -> str:
        then, now = self.planned, self.measured
        return (
            f"steps take {now.step:.2f} s, planned {then.step:.2f}: compute, update and exchange {now.work:.2f} s, "
            f"planned {then.work:.2f}; the disk is busy for {now.disk:.2f} s, planned {then.disk:.2f}"
        )


class Watch:
    """Looks at a run's steps until it knows whether they go as planned."""

    def __init__(self, planned: Pace | None) -> None:
        self._planned = planned
        self._steps, self._seen = 0, list[Pace]()
        self.behind: Behind | None = None

    def look(self, spans: Iterable[Span]) -> bool:
        """At the timeline of the next step. True, once: steps turn out to be `behind`."""
        self._steps += 1
        if self._planned is None or not WARM_UP < self._steps <= WARM_UP + LOOKED_AT:
            return False
        self._seen.append(Pace.of(spans))
        measured = Pace.median(self._seen)
        if len(self._seen) == LOOKED_AT and measured.step > MUCH_SLOWER * self._planned.step:
            self.behind = Behind(self._planned, measured)
        return self.behind is not None
