"""Who is near, when: the recorded trace of a phase is replayed ahead of the real run.

A *phase* (one training step, one evaluation pass) touches blocks in the same order every time. The first time it runs,
the order is recorded: `take` (a lease begins), `give` (it ends), `drop` (its bytes are no longer wanted). From then on a
virtual pointer walks the trace ahead of the real one and decides, with nothing but the trace and the capacity, where in
the near arena each block goes and whom it replaces. Timing never enters a decision, so a run moves the same bytes every
time, whatever the disk does; only *when* a decision can be carried out depends on how far the real run has come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from outsize.memory.layout import Layout, Policy, Resident, evict_oldest


class Touch(Enum):
    """What happens to a block in the trace."""

    TAKE = "take"  # a lease begins and needs the block's bytes
    FRESH = "fresh"  # a lease begins and will write every byte itself: nothing has to be read
    GIVE = "give"  # a lease ends
    DROP = "drop"  # a lease ends and the bytes are worthless


Event = tuple[Touch, str]


@dataclass(frozen=True)
class Placement:
    """A decision: `name` goes to `offset`, in place of whatever is there; `fresh` blocks are not read."""

    name: str
    offset: int
    nbytes: int
    fresh: bool


Decision = tuple[Touch, str, Placement | None]
"""An event of the trace, and where its block must be brought, if it is not near by then."""


def _takes_by_name(trace: list[Event]) -> dict[str, list[int]]:
    takes: dict[str, list[int]] = {}
    for index, (touch, name) in enumerate(trace):
        if touch in (Touch.TAKE, Touch.FRESH):
            takes.setdefault(name, []).append(index)
    return takes


class Foresight:
    """Walks the trace of the current phase ahead of the real run and hands out placements in trace order."""

    def __init__(self, capacity: int, size_of: Callable[[str], int], policy: Policy = evict_oldest) -> None:
        self._capacity = capacity
        self.layout = Layout(capacity)
        self.ahead: Counter[str] = Counter()  # takes the virtual run has seen and the real one has not, by block
        self.stuck = False  # the next block finds no room, because everything is pinned
        self._size_of = size_of
        self._policy = policy
        self._phases: dict[str, list[Event]] = {}
        self._phase: str | None = None
        self._trace: list[Event] = []
        self._takes: dict[str, list[int]] = {}
        self._recording = True
        self._again = False  # the same phase follows this one, so the virtual run may go round
        self._real = 0
        self._virtual = 0
        self._decided: deque[Decision] = deque()  # what the virtual run comes by next

    def foretell(self, phase: str, trace: list[Event]) -> None:
        """Before it begins for the first time, so that nothing need be recorded."""
        self._phases[phase] = trace

    # -- the real run tells what it does ------------------------------------------------------------------------

    def begin(self, phase: str, again: bool) -> bool:
        """The real run enters a phase. True if the virtual run simply goes on; else `rebuild` must follow."""
        continues = self._again and self._phase == phase and not self._recording
        self._phase, self._again = phase, again
        self._recording = phase not in self._phases
        self._trace = self._phases.get(phase, [])
        self._takes = _takes_by_name(self._trace)
        self._real = 0
        return continues

    def end(self) -> bool:
        """The real run leaves the phase. True if the virtual run stays valid; else `rebuild` must follow."""
        complete = self._real == len(self._trace)
        if not self._recording and complete and self._again:  # else nothing more may be brought: nobody wants it
            self._virtual -= len(self._trace)
            return True
        self._phases[self._phase or ""] = self._trace[: self._real]
        self._trace, self._recording = [], True
        self._real, self._virtual = 0, 0
        return False

    def expect(self, event: Event) -> bool:
        """The real run does `event` next. False if the trace says otherwise: from here on it is recorded anew, and
        `rebuild` must follow."""
        if self._recording:
            self._trace.append(event)
            return True
        if self._real < len(self._trace) and self._trace[self._real] == event:
            return True
        self._trace = [*self._trace[: self._real], event]
        self._recording = True
        return False

    def withdraw(self) -> None:
        """The event last expected could not happen. `rebuild` must follow."""
        self._trace, self._recording = self._trace[: self._real], True

    def passed(self) -> None:
        """The event last expected has happened."""
        touch, name = self._trace[self._real]
        self._real += 1
        if touch in (Touch.TAKE, Touch.FRESH):
            self.ahead[name] -= 1

    def rebuild(self, residents: list[Resident]) -> None:
        """Forget what was foreseen and start from what really is near."""
        self._lay(sorted(residents, key=lambda resident: resident.offset))  # who goes side by side leaves one gap
        self.ahead.clear()
        self.stuck = False
        self._virtual = self._real
        self._decided.clear()

    def fits(self, phase: str) -> bool:
        """Whether a recorded phase finds room in an arena in which nothing is near yet. If so it always does,
        for it can begin there (`_look_on`)."""
        alone = Foresight(self._capacity, self._size_of, self._policy)
        alone._trace = self._phases[phase]
        alone._takes, alone._recording = _takes_by_name(alone._trace), False
        return len(alone._decide(0)) == len(alone._trace)

    # -- the virtual run ------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """The virtual run has not yet passed the event that the real run is at."""
        return self._virtual <= self._real

    def next_placement(self) -> Placement | None:
        """Walk on to the next block that must be brought near, and decide where it goes. None at the end of what is
        known, or when it is stuck."""
        self.stuck = False
        while self._decided or self._look_on():
            touch, name, placement = self._decided.popleft()
            if touch in (Touch.TAKE, Touch.FRESH):
                self.ahead[name] += 1
            self._virtual += 1
            if placement is not None:
                return placement
        return None

    def _look_on(self) -> bool:
        """Decide for what is known from the virtual run's event on, to the end of a round at most. Layouts follow from one
        another, and leases of many sizes can in time leave gaps that are each too small; a round in which that would
        happen begins with nobody near but who is pinned. False when nothing is known, or there is no room."""
        length = len(self._trace)
        if self._virtual >= length * (2 if self._again and not self._recording else 1):
            return False
        # A recording decides event by event, and lays nothing anew.
        residents = () if self._recording else self.layout.by_name.values()
        pinned = [replace(resident) for resident in residents if resident.pins]
        first = self._virtual % length
        self._decided.extend(self._decide(first))
        if len(self._decided) < length - first and not self._recording:
            self._lay(pinned)
            self._decided = deque(self._decide(first))
        self.stuck = not self._decided
        return bool(self._decided)

    def _lay(self, residents: list[Resident]) -> None:
        self.layout = Layout(self._capacity)
        for resident in residents:
            self.layout.add(resident)

    def _decide(self, first: int) -> list[Decision]:
        """From an event of the trace on, to its end or the first that finds no room."""
        decided = []
        for index in range(first, len(self._trace)):
            touch, name = self._trace[index]
            resident = self.layout.by_name.get(name)
            placement = None
            if touch in (Touch.GIVE, Touch.DROP):
                assert resident is not None, f"{name} is given back but was never taken"
                self._leave(resident, touch)
            elif resident is not None:
                resident.pins += 1
                self.layout.used(name)
            else:
                placement = self._place(name, touch is Touch.FRESH, index)
                if placement is None:
                    break
            decided.append((touch, name, placement))
        return decided

    def _leave(self, resident: Resident, touch: Touch) -> None:
        resident.pins -= 1
        self.layout.used(resident.name)
        if touch is Touch.DROP and resident.pins == 0:
            self.layout.drop(resident.name)

    def _place(self, name: str, fresh: bool, index: int) -> Placement | None:
        nbytes = self._size_of(name)
        found = self.layout.place(
            nbytes, self._policy(self.layout.by_name.values(), lambda other: self._next_use(other, index))
        )
        if found is None:
            return None
        offset, victims = found
        for victim in victims:
            self.layout.remove(victim)
        self.layout.add(Resident(offset, nbytes, name, pins=1))
        return Placement(name, offset, nbytes, fresh)

    def _next_use(self, name: str, here: int) -> int:
        """Events until the block is taken again, going round; a recording knows nothing of what comes."""
        length = len(self._trace)
        if self._recording or name not in self._takes:
            return length
        takes = self._takes[name]
        after = bisect_right(takes, here)
        return takes[after] - here if after < len(takes) else takes[0] + length - here
