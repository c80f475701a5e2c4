"""Whether leases find room: their order in a run's first steps, laid out in the arena without a clock.

Where a block goes depends on the order of leases alone (`outsize.memory.foresight`), so of a script too long to be played
it is known for all of its units what they find. A run decides for its first step lease by lease, among what bringing the
weights in has left there; each later round is decided as a whole, and may begin with an empty arena."""

from __future__ import annotations

from collections.abc import Iterable

from outsize.errors import BudgetError
from outsize.memory.foresight import Foresight, Touch
from outsize.planner.script import NO_HOST_UPDATES, Begin, Create, Event, HomeOf, HostUpdates, Mark, Script, Touched
from outsize.sizes import format_size


def need_room(
    script: Script,
    arena_bytes: int,
    home_of: HomeOf,
    near: str = "host",
    on_host: HostUpdates = NO_HOST_UPDATES,
) -> None:
    """Raises BudgetError unless a run of the script on the tier `near`, with updates `on_host`, finds room there for all that
    it leases."""
    leases = _Leases(arena_bytes, lambda name: near if on_host.keep(name) else home_of(name), near)
    leases.follow(script.setup)
    for step in script.steps:
        leases.follow(step)
    leases.need_room_later()


class _Leases:
    def __init__(self, arena_bytes: int, home_of: HomeOf, near: str) -> None:
        self._arena_bytes, self._home_of, self._near = arena_bytes, home_of, near
        self._sizes: dict[str, int] = {}  # of blocks that stream
        self._foresight = Foresight(arena_bytes, self._sizes.__getitem__)
        self._phases = 0

    def follow(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Touched):
                if event.name in self._sizes and event.what != "change":
                    self._touch(Touch(event.what), event.name)
            elif isinstance(event, Create):
                if self._home_of(event.block.name) != self._near:
                    self._sizes[event.block.name] = event.block.nbytes
            elif isinstance(event, Begin):
                self._phases += 1  # each as if for the first time
                self._foresight.begin(self._name, again=False)
                self._rebuild()
            elif event is Mark.END:
                self._foresight.end()
                self._rebuild()

    def need_room_later(self) -> None:
        """For a round like the last, whatever came before it."""
        if self._phases and not self._foresight.fits(self._name):
            raise self._too_small("what is leased at once")

    @property
    def _name(self) -> str:
        return str(self._phases)

    def _touch(self, touch: Touch, name: str) -> None:
        self._foresight.expect((touch, name))
        while self._foresight.next_placement() is not None:
            pass
        if self._foresight.behind:
            raise self._too_small(f"block {name} ({format_size(self._sizes[name])}) beside what is leased")
        self._foresight.passed()

    def _rebuild(self) -> None:
        self._foresight.rebuild(list(self._foresight.layout.by_name.values()))

    def _too_small(self, what: str) -> BudgetError:
        return BudgetError(f"{format_size(self._arena_bytes)} near compute are too few for {what}. Give more memory.")
