"""Which split weights workers gather before anybody asks for them: those that came next the last time.

A phase of the store leases and changes the same split weights in the same order every time, on all workers alike. From the
second time on each lease begins gathers of those that follow, as many as a number of bytes allows that all workers were
told. So all begin the same gathers at the same place in their work: what is near, or how fast a disk is, has no say."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from enum import Enum


class Act(Enum):
    """What happens to a split weight."""

    LEASE = "lease"  # somebody needs all of it
    CHANGE = "change"  # the worker's share of it is updated


Event = tuple[Act, str]


class Ahead:
    """What is begun of up to `most` bytes, the first to be needed first; `size_of` a weight is in bytes.

    Who begins a gather because of `next` ends it by a lease, or when he is told that it was begun in vain."""

    def __init__(self, most: int, size_of: Callable[[str], int]) -> None:
        self._most, self._size_of = most, size_of
        self._records: dict[str, list[Event]] = {}
        self._phase: str | None = None
        self._told: list[Event] = []  # what happened in this phase the last time
        self._seen: list[Event] = []
        self._next = 0  # the event of `_told` that is looked at next
        self._begun: deque[str] = deque()
        self._held: Counter[str] = Counter()  # leased, or begun
        self._due: Counter[str] = Counter()  # changes that were looked at and have not happened

    def enter(self, phase: str) -> list[str]:
        """A phase begins. Returns what was begun in vain, as the phase before has not ended."""
        vain = self._abandon()
        self._phase, self._told, self._seen, self._next = phase, self._records.get(phase, []), [], 0
        return vain

    def leave(self, well: bool = True) -> list[str]:
        """The phase has ended, or failed: then nothing is learnt from it. Returns what was begun in vain."""
        vain = self._abandon()
        if self._phase is not None and well:
            self._records[self._phase] = self._seen
        self._phase = None
        return vain

    def see(self, act: Act, name: str) -> list[str]:
        """It happens now. Returns what was begun in vain, as something else was to happen."""
        vain = self._note(act, name) if self._phase is not None else []
        if act is Act.LEASE:
            if self._begun and self._begun[0] == name:
                self._begun.popleft()
            else:
                self._held[name] += 1
        return vain

    def _note(self, act: Act, name: str) -> list[str]:
        index = len(self._seen)
        self._seen.append((act, name))
        if self._told[index : index + 1] != [(act, name)]:
            return self._abandon()
        if index >= self._next:
            self._next = index + 1
        elif act is Act.CHANGE:
            self._due[name] -= 1
        return []

    def _abandon(self) -> list[str]:
        vain = list(self._begun)
        self._begun.clear()
        self._due.clear()
        self._told = []
        return vain

    def ended(self, name: str) -> None:
        """A lease has, or what was begun in vain is forgotten."""
        self._held[name] -= 1

    def next(self) -> str | None:
        """The weight to gather now; None: none for the time being. One that is about to change, or is leased, waits, and
        those after it, too."""
        while self._next < len(self._told):
            act, name = self._told[self._next]
            if act is Act.CHANGE:
                self._due[name] += 1
            elif self._due[name] or self._held[name] or self._size_of(name) > self._left:
                return None
            else:
                self._begun.append(name)
                self._held[name] += 1
            self._next += 1
            if act is Act.LEASE:
                return name
        return None

    @property
    def _left(self) -> int:
        return self._most - sum(map(self._size_of, self._begun))
