"""What a job has moved and what took its time, so far: the difference of two counts is what lies between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from outsize.distributed.arrangement import WIRE
from outsize.train.job import Job

Ways = Counter[tuple[str, str, str]]
"""Bytes by source, destination and kind, as the ledger counts them."""


@dataclass(frozen=True)
class Counts:
    """Bytes moved, and seconds by cause; `passed` is all the time, of which the others are disjoint parts."""

    moved: Ways = field(default_factory=Counter)
    passed: float = 0.0
    read_wait: float = 0.0
    write_wait: float = 0.0
    update: float = 0.0
    wire_wait: float = 0.0

    @classmethod
    def of(cls, job: Job) -> Counts:
        """All since the job's store was made."""
        store = job.store
        waits = store.waiting_seconds
        spent = (waits["read"], waits["write"], job.updater.seconds, job.group.waiting_seconds)
        return cls(Counter(store.ledger.moved), store.clock.now(), *spent)

    @property
    def bytes_read(self) -> int:
        """From disk."""
        return sum(nbytes for (source, _, _), nbytes in self.moved.items() if source == "disk")

    @property
    def bytes_written(self) -> int:
        """To disk."""
        return sum(nbytes for (_, target, _), nbytes in self.moved.items() if target == "disk")

    @property
    def wire_bytes(self) -> int:
        """From other workers."""
        return sum(nbytes for (source, _, _), nbytes in self.moved.items() if source in WIRE)

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, 1)

    def __sub__(self, other: Counts) -> Counts:
        """What came after `other`, which is earlier."""
        return self._with(other, -1)

    def _with(self, other: Counts, sign: int) -> Counts:
        moved = self.moved + other.moved if sign > 0 else self.moved - other.moved
        return Counts(
            moved,
            self.passed + sign * other.passed,
            self.read_wait + sign * other.read_wait,
            self.write_wait + sign * other.write_wait,
            self.update + sign * other.update,
            self.wire_wait + sign * other.wire_wait,
        )
