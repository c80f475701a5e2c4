"""Units that stand for others: four of one shape are rehearsed, and their events repeated for all.

The first and the last stay so; the two between stand in turns for all between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache

from outsize.planner.script import Create, Event, Key, Live, Rows, Touched


def spread(events: Iterable[Event], names: list[str], every: list[str]) -> tuple[Event, ...]:
    """The events of a run over the units called `names`, four of one shape, as they would be over `every`.

    The first and the last stay so; the two between stand in turns for all between. Raises ValueError when the units do
    not pass one after the other."""
    first, one, other, last = range(4)
    middle = [(one if place % 2 else other, place) for place in range(1, len(every) - 1)]
    parts = _by_unit(events, names)
    found: list[Event] = []
    index = 0
    while index < len(parts):
        unit, part = parts[index]
        pair = [parts[index + step][0] if index + step < len(parts) else None for step in range(2)]
        if pair in ([one, other], [other, one]):
            copies = middle if pair == [one, other] else middle[::-1]
            by_unit = {unit: part, parts[index + 1][0]: parts[index + 1][1]}
            for template, place in copies:
                found += _renamed(by_unit[template], names[template], every[place], place)
            index += 2
        elif unit in (one, other):
            raise ValueError("units of one shape do not pass one after the other")
        else:
            place = {first: 0, last: len(every) - 1}.get(unit, -1) if unit is not None else -1
            found += _renamed(part, names[unit], every[place], place) if unit is not None else part
            index += 1
    return tuple(_matched(found))


def _matched(events: list[Event]) -> Iterator[Event]:
    """Let every storage go that came: one may come in one unit and go in another, of which there are as many."""
    alive: dict[int, list[Key]] = {}
    for event in events:
        if isinstance(event, Live):
            keys = alive.setdefault(event.key[0], [])
            if event.nbytes > 0:
                keys.append(event.key)
            elif event.key in keys:
                keys.remove(event.key)
            elif keys:
                event = replace(event, key=keys.pop())
            else:
                continue
        yield event


def _by_unit(events: Iterable[Event], names: list[str]) -> list[tuple[int | None, list[Event]]]:
    """Cut at each event that names a block of another unit than the one before."""

    @cache
    def unit_of(name: str) -> int | None:
        return next((index for index, unit in enumerate(names) if f":{unit}." in name), None)

    parts: list[tuple[int | None, list[Event]]] = [(None, [])]
    for event in events:
        name = event.block.name if isinstance(event, Create) else getattr(event, "name", None)
        if name is not None and (unit := unit_of(name)) != parts[-1][0]:
            parts.append((unit, []))
        parts[-1][1].append(event)
    return parts


def _renamed(events: list[Event], old: str, new: str, place: int) -> list[Event]:
    @cache
    def name(said: str) -> str:
        return said.replace(f":{old}.", f":{new}.")

    def rename(event: Event) -> Event:
        if isinstance(event, Create):
            return replace(event, block=replace(event.block, name=name(event.block.name)))
        if isinstance(event, Live):
            return Live((event.key[0], place), event.nbytes)
        if isinstance(event, Touched):
            return Touched(event.what, name(event.name))
        return replace(event, name=name(event.name)) if isinstance(event, Rows) else event

    return [rename(event) for event in events]
