"""Units that stand for others: four of one shape are rehearsed, and their events repeated for all.

The first and the last stay so; the two between stand in turns for all between. What moves lies in blocks that belong to no
unit: each takes the first that are free, as many as any other, so that their numbers tell whose they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial

from outsize.model.activations import ACTIVATION
from outsize.planner.script import Create, Event, Key, Live, Rows, Stepped, Touched


def spread(events: Iterable[Event], names: list[str], every: list[str]) -> tuple[Event, ...]:
    """The events of a run over the units called `names`, four of one shape, as they would be over `every`.

    The first and the last stay so; the two between stand in turns for all between. Raises ValueError when the units do
    not pass one after the other, or do not move as many blocks."""
    first, one, other, last = range(4)
    middle = [(one if place % 2 else other, place) for place in range(1, len(every) - 1)]
    parts = _by_unit(events, names)
    moved = _moved(parts)
    found: list[Event] = []
    index = before = 0
    while index < len(parts):
        unit, part = parts[index]
        pair = [parts[index + step][0] if index + step < len(parts) else None for step in range(2)]
        if pair in ([one, other], [other, one]):
            copies = middle if pair == [one, other] else middle[::-1]
            by_unit = {unit: part, parts[index + 1][0]: parts[index + 1][1]}
            for template, place in copies:
                later = partial(_later, moved, place - template)
                found += _renamed(by_unit[template], names[template], every[place], place, later)
            index += 2
        elif unit in (one, other):
            raise ValueError("units of one shape do not pass one after the other")
        else:
            before = before if unit is None else unit
            later = partial(_later, moved, len(every) - len(names) if before == last else 0)
            place = {first: 0, last: len(every) - 1}.get(unit, -1) if unit is not None else -1
            old, new = ("", "") if unit is None else (names[unit], every[place])
            found += _renamed(part, old, new, place if unit is not None else None, later)
            index += 1
    return tuple(_matched(found, bool(moved)))


def _moved(parts: list[tuple[int | None, list[Event]]]) -> Counter[str]:
    """How many blocks each unit moves, by shelf. Raises ValueError unless these follow one after the other, from unit to
    unit."""
    numbers: dict[int, dict[str, set[int]]] = {}
    for unit, part in parts:
        for event in part:
            if unit is not None and isinstance(event, Touched) and event.what == "fresh" and _is_moved(event.name):
                shelf, number = _shelf(event.name)
                numbers.setdefault(unit, {}).setdefault(shelf, set()).add(number)
    each = Counter({shelf: len(found) for shelf, found in numbers.get(1, {}).items()})
    for unit, shelves in numbers.items():
        expected = {
            shelf: {number + (unit - 1) * each[shelf] for number in found}
            for shelf, found in numbers.get(1, {}).items()
        }
        if shelves != expected:
            raise ValueError("units of one shape do not move as many blocks")
    return each


def _later(moved: Counter[str], units: int, name: str) -> str:
    """The block in which what is moved lies, so many units later."""
    shelf, number = _shelf(name)
    return f"{shelf}:{number + units * moved[shelf]}"


def _shelf(name: str) -> tuple[str, int]:
    shelf, _, number = name.rpartition(":")
    return shelf, int(number)


def _is_moved(name: str) -> bool:
    return name.startswith(f"{ACTIVATION}:")


def _matched(events: list[Event], sized: bool) -> Iterator[Event]:
    """Let every storage go that came: one may come in one unit and go in another, of which there are as many. `sized`: or
    else one of the same size does, the last that came."""
    alive: dict[int, list[Key]] = {}
    sizes: dict[int, dict[Key, None]] = {}
    for event in events:
        if isinstance(event, Live):
            keys, like = alive.setdefault(event.key[0], []), sizes.setdefault(abs(event.nbytes), {})
            if event.nbytes > 0:
                keys.append(event.key)
                like[event.key] = None
            else:
                if event.key in keys:
                    keys.remove(event.key)
                elif keys:
                    event = replace(event, key=keys.pop())
                elif sized and like:
                    event = replace(event, key=next(reversed(like)))
                    alive[event.key[0]].remove(event.key)
                else:
                    continue
                like.pop(event.key, None)
        yield event


def _by_unit(events: Iterable[Event], names: list[str]) -> list[tuple[int | None, list[Event]]]:
    """Cut at each event that names a block of another unit than the one before; but for blocks of what moves."""

    @cache
    def unit_of(name: str) -> int | None:
        return next((index for index, unit in enumerate(names) if f":{unit}." in name), None)

    parts: list[tuple[int | None, list[Event]]] = [(None, [])]
    for event in events:
        name = event.block.name if isinstance(event, Create) else getattr(event, "name", None)
        if name is not None and not _is_moved(name) and (unit := unit_of(name)) != parts[-1][0]:
            parts.append((unit, []))
        parts[-1][1].append(event)
    return parts


def _renamed(events: list[Event], old: str, new: str, place: int | None, later: Callable[[str], str]) -> list[Event]:
    """For the unit at `place`; None: for no unit."""

    @cache
    def name(said: str) -> str:
        return later(said) if _is_moved(said) else said.replace(f":{old}.", f":{new}.")

    def rename(event: Event) -> Event:
        if isinstance(event, Create):
            return replace(event, block=replace(event.block, name=name(event.block.name)))
        if isinstance(event, Live):
            return event if place is None else Live((event.key[0], place), event.nbytes)
        if isinstance(event, Touched):
            return Touched(event.what, name(event.name))
        if isinstance(event, Stepped):
            return replace(event, name=name(event.name), weight=name(event.weight))
        return replace(event, name=name(event.name)) if isinstance(event, Rows) else event

    return [rename(event) for event in events]
