"""From a rehearsed script and a placement to the figures of a plan: seconds, bytes, and where memory goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from outsize.planner.clock import Ways
from outsize.planner.play import PlayedStep, play
from outsize.planner.rehearsal import FEWEST, Rehearsed
from outsize.planner.script import NO_HOST_UPDATES, HomeOf, HostUpdates, Script, Touched

Name = TypeVar("Name")
FEW_EVENTS = 2_000  # that touch blocks, when placements are compared
MOST_EVENTS = 12_000  # for the one that is chosen


@dataclass(frozen=True)
class Forecast:
    """A step in the middle of a run. `moved`: (source, destination, kind) -> bytes. What commits write of blocks that stay
    near is not in it (`with_snapshots`)."""

    seconds: float
    lanes: dict[str, float]
    waiting: dict[str, float]
    moved: dict[tuple[str, str, str], int]
    step: PlayedStep
    """As played: over fewer units when the script is long."""
    floating_operations: float
    commit_every: int = 1
    """Steps from commit to commit."""

    @property
    def hides_all(self) -> bool:
        """Hardly anything is waited for: no placement is worth looking for."""
        return self.seconds <= 1.01 * sum(self.lanes.get(lane, 0.0) for lane in ("compute", "update", "wire"))


def forecast(
    rehearsed: Rehearsed,
    arena_bytes: int,
    home_of: HomeOf,
    ways: Ways,
    closely: bool,
    near: str = "host",
    on_host: HostUpdates = NO_HOST_UPDATES,
) -> Forecast:
    """Play the step under a placement, on the tier `near`, with updates `on_host`. A script too long to be played is played
    over some of the units, evenly taken, and over half as many; what those of the difference add is taken for what all
    others add. `closely` is slower: with more units.

    Raises BudgetError when leases leave no room in the arena."""

    def run(script: Script, foretold: bool = False) -> Forecast:
        steps = 3 if closely else 2
        return _played(script if closely else script.lean, arena_bytes, home_of, ways, near, on_host, steps, foretold)

    units = rehearsed.units
    if not units:
        return run(rehearsed.script)
    a_unit = sum(isinstance(event, Touched) for event in rehearsed.script.steps[-1]) / (4 * len(rehearsed.runs))
    count = max(2 * FEWEST * len(rehearsed.runs), int((MOST_EVENTS if closely else FEW_EVENTS) / a_unit))
    if len(units) <= 2 * count:
        return run(rehearsed.whole)
    many, few = (rehearsed.some(number) for number in (count, count // 2))
    more, fewer = (run(rehearsed.over(some), foretold=not closely) for some in (many, few))
    return _carried_on(more, fewer, len(many), len(few), len(units))


def with_snapshots(found: Forecast, snapshot: dict[tuple[str, str], int], every: int, ways: Ways) -> Forecast:
    """The mean of steps of which each `every`-th is committed, and `snapshot` ((tier, kind) -> bytes) is then written from
    memory. That takes what it takes of the processors; and of the disk, only where this has no time to spare."""
    written = {(tier, "disk", kind): nbytes // every for (tier, kind), nbytes in snapshot.items()}
    takes = sum(written.values()) / ways["disk"].write + ways["disk"].flush / every
    busy = min(found.seconds, max(found.lanes.get("read", 0.0), found.lanes.get("write", 0.0)))
    lanes = found.lanes | {"write": found.lanes.get("write", 0.0) + takes}
    late = max(takes - (found.seconds - busy), 0.0)
    waiting = found.waiting | {"write": found.waiting["write"] + late}
    moved = dict(Counter(found.moved) + Counter(written))
    taken = sum(written.values()) * ways["disk"].writing
    lanes["compute"] = lanes.get("compute", 0.0) + taken
    seconds = found.seconds + late + taken
    return replace(found, seconds=seconds, lanes=lanes, waiting=waiting, moved=moved, commit_every=every)


def _played(
    script: Script,
    arena_bytes: int,
    home_of: HomeOf,
    ways: Ways,
    near: str,
    on_host: HostUpdates,
    steps: int,
    foretold: bool,
) -> Forecast:
    """The first steps record; of the `steps` that follow everything is the mean, for what is read ahead crosses the
    border between them. Where leases are `foretold`, none is played to record them."""
    first = 0 if foretold else len(script.steps)
    played = play(script, arena_bytes, home_of, ways, first + steps, near=near, on_host=on_host, foretold=foretold)
    alike = played.steps[-steps:]

    def mean(found: Iterable[Mapping[Name, float]]) -> dict[Name, float]:
        total: Counter[Name] = Counter()
        for one in found:
            total.update(one)
        return {name: amount / steps for name, amount in total.items()}

    return Forecast(
        sum(step.seconds for step in alike) / steps,
        mean(step.lanes for step in alike),
        mean(step.waiting for step in alike),
        {ways: int(nbytes) for ways, nbytes in mean(step.moved for step in alike).items()},
        alike[len(alike) // 2],
        script.floating_operations,
    )


def _carried_on(many: Forecast, few: Forecast, count: int, fewer: int, units: int) -> Forecast:
    def on(large: float, small: float) -> float:
        return large + (large - small) * (units - count) / (count - fewer)

    return Forecast(
        on(many.seconds, few.seconds),
        {lane: on(value, few.lanes.get(lane, 0.0)) for lane, value in many.lanes.items()},
        {name: max(on(value, few.waiting[name]), 0.0) for name, value in many.waiting.items()},
        {ways: round(on(value, few.moved.get(ways, 0))) for ways, value in many.moved.items()},
        many.step,
        on(many.floating_operations, few.floating_operations),
    )
