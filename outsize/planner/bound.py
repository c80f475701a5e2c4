"""How long a step takes at least to move its blocks, wherever they live: what cannot be the fastest need not be played.

Whatever is done with activations, a forward pass needs the same weights and an update changes the same blocks. What a pass
needs is near when it begins, or is read in it, and no more can be near than there is room: so of both together all is read
but twice the room. What is changed is written home, but for what lives near."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from outsize.planner.clock import Rates
from outsize.planner.script import Create, HomeOf, Script, Touched


@dataclass(frozen=True)
class Used:
    """Bytes of blocks of weights and state that may live elsewhere: of those that a step takes before it changes the first,
    and of those that it changes."""

    forward: int
    changed: int

    @classmethod
    def by(cls, script: Script, home_of: HomeOf, near: str) -> Used:
        """`home_of`: with nothing near but what must be."""
        created = (event for event in chain(script.setup, *script.steps) if isinstance(event, Create) and event.durable)
        sizes = {e.block.name: e.block.nbytes for e in created if home_of(e.block.name) != near}
        touched = [event for event in script.steps[-1] if isinstance(event, Touched) and event.name in sizes]
        begin = next((at for at, event in enumerate(touched) if event.what in ("change", "fresh")), len(touched))
        first = {event.name: event.what for event in reversed(touched)}
        changed = {event.name for event in touched[begin:] if event.what == "change" and first[event.name] == "take"}
        return cls(
            sum(sizes[name] for name in {event.name for event in touched[:begin] if event.what == "take"}),
            sum(sizes[name] for name in changed),
        )

    def seconds(self, room: int, way: Rates) -> float:
        """To move by one way all but so many bytes, which are near or live elsewhere."""
        reading = (max(self.forward - room, 0) + max(self.changed - room, 0)) / way.read
        writing = max(self.changed - room, 0) / way.write
        slower = min(max((way.read + way.write) / way.both, 1.0), 2.0)  # both at once, than one alone
        return max(reading, writing) + (slower - 1.0) * min(reading, writing)
