"""A step whose workers gather ahead, made from one in which each lease of a split weight waits for its own gather.

Units that stand for others are rehearsed one after the other (`outsize.planner.spread`), so what is begun in one for the next
is put in afterwards, by what decides it in a run, too (`outsize.distributed.ahead`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from outsize.distributed.ahead import Act, Ahead
from outsize.distributed.arrangement import PEER
from outsize.planner.script import Awaited, Begin, Create, Event, Exchanged, Live, Mark, Script, Spend, Touched


def overlapped(script: Script, most: int) -> Script:
    """The script of workers that gather up to `most` bytes ahead: in its first steps they learn what comes when."""
    if not most:
        return script
    writer = _Writer(script.setup, most)
    return Script(script.setup, tuple(tuple(writer.step(step)) for step in (*script.steps, script.steps[-1])))


class _Writer:
    def __init__(self, setup: Sequence[Event], most: int) -> None:
        created = [event for event in setup if isinstance(event, Create)]
        sizes = {event.block.name: event.block.nbytes for event in created}
        self._whole_of = {  # a share is created just before the whole
            share.block.name: whole.block.name for share, whole in pairwise(created) if whole.home == PEER
        }
        self._wholes = set(self._whole_of.values())
        self._ahead = Ahead(most, sizes.__getitem__)
        self._gathers: dict[str, Sequence[Event]] = {}  # what a lease of a split weight does: the same every time
        self._coming: set[str] = set()

    def step(self, step: Sequence[Event]) -> Iterator[Event]:
        gathers = {index: _gather_at(step, index) for index in range(len(step)) if self._leases(step[index])}
        self._gathers |= {gather[0].name: gather for gather in gathers.values() if isinstance(gather[0], Touched)}
        index = 0
        while index < len(step):
            event = step[index]
            if index in gathers and isinstance(event, Touched):
                yield from self._lease(event.name)
                index += len(gathers[index])
                continue
            if event is Mark.END:
                yield from self._vain(self._ahead.leave())
            elif isinstance(event, Touched):
                yield from self._touch(event)
            yield event
            if isinstance(event, Begin):
                yield from self._vain(self._ahead.enter(event.phase))
            index += 1

    def _leases(self, event: Event) -> bool:
        return isinstance(event, Touched) and event.what == "fresh" and event.name in self._wholes

    def _touch(self, event: Touched) -> Iterator[Event]:
        if event.what == "change" and event.name in self._whole_of:
            yield from self._vain(self._ahead.see(Act.CHANGE, self._whole_of[event.name]))
        elif event.what == "drop" and event.name in self._wholes:
            self._ahead.ended(event.name)

    def _lease(self, name: str) -> Iterator[Event]:
        yield from self._vain(self._ahead.see(Act.LEASE, name))
        if name in self._coming:
            yield self._awaited(name)
        else:
            yield from self._gathers[name]
        while (following := self._ahead.next()) is not None:
            self._coming.add(following)
            for event in self._gathers[following]:
                yield replace(event, ahead=True) if isinstance(event, Exchanged) else event

    def _awaited(self, name: str) -> Awaited:
        self._coming.discard(name)
        return Awaited(sum(isinstance(event, Exchanged) for event in self._gathers[name]))

    def _vain(self, names: list[str]) -> Iterator[Event]:
        for name in names:
            yield self._awaited(name)
            self._ahead.ended(name)
            yield Touched("drop", name)


def _gather_at(step: Sequence[Event], start: int) -> Sequence[Event]:
    """From a place near for the whole, over a lease of the share, to the last exchange of it."""
    stop = next(index for index in range(start, len(step)) if _gives(step[index])) + 1
    for index in range(stop, len(step)):
        event = step[index]
        if isinstance(event, Exchanged) and event.kind == "weight":
            stop = index + 1
        elif not isinstance(event, Spend | Live):
            break
    return step[start:stop]


def _gives(event: Event) -> bool:
    return isinstance(event, Touched) and event.what == "give"
