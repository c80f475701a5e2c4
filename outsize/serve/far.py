"""Pages of keys and values for which there is no place near: on another tier, and back again.

They lie in a ring of places, which are made as they are needed: what was written longest ago makes way. A full page never
changes, so it is written once, however often it comes near and goes again. Moves are whole pages, all layers at once,
between the cache itself and the tier; nothing waits for them but who wants the very page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from outsize.errors import StorageError
from outsize.serve.pace import Pace
from outsize.serve.places import Move, Places


@dataclass(frozen=True)
class Load:
    """One page on its way back from its place of the ring."""

    key: bytes
    page: int
    place: int
    move: Move


@dataclass(frozen=True)
class Coming:
    """Pages that wait for their content; `loads` of those whose content had not been forgotten meanwhile."""

    pages: tuple[int, ...]
    loads: tuple[Load, ...]

    @property
    def arrived(self) -> bool:
        return all(load.move.done for load in self.loads)


class FarPages:
    """What is at which of `count` `places`. `pace` says whether moving is worth it. If these are `lasting`, what is there
    outlives the process, and whatever was there before is found again."""

    def __init__(self, places: Places, count: int, pace: Pace) -> None:
        self.count, self.lasting = count, places.index is not None
        self._there, self._pace = places, pace
        self._keys: list[bytes | None] = [None] * count
        self._places: dict[bytes, int] = {}
        self._leaving: dict[bytes, tuple[Move, int]] = {}
        self._readers: Counter[int] = Counter()
        self._next, self._broken = 0, False
        for place, key in places.found.items():
            self._keys[place], self._places[key] = key, place
        while places.count <= max(self._places.values(), default=-1):
            places.make()

    @property
    def known(self) -> int:
        """Pages that can be brought back."""
        return len(self._places)

    def has(self, key: bytes) -> bool:
        return key in self._places

    # -- away -------------------------------------------------------------------------------------------------------

    def save(self, page: int, key: bytes) -> None:
        if key in self._places or key in self._leaving or self._broken or not self._pace.worth_saving:
            return
        place = self._claim()
        if place is None:
            return
        self._leaving[key] = self._there.save(page, place, key), place

    def _claim(self) -> int | None:
        """The next place of the ring that nobody reads or writes; what was there is forgotten."""
        busy = {place for _, place in self._leaving.values()}
        for place in (*range(self._next, self.count), *range(self._next)):
            if place not in busy and not self._readers[place] and self._is_there(place):
                self._next = (place + 1) % self.count
                self._forget(place)
                return place
        return None

    def _is_there(self, place: int) -> bool:
        """The place has a block. When the disk has no room for another one the ring goes round where it is."""
        if self._there.count <= place < self.count:
            try:
                self._there.make()
            except StorageError:
                self.count = self._there.count
        return place < self.count

    def _forget(self, place: int) -> None:
        key, self._keys[place] = self._keys[place], None
        if key is not None:
            del self._places[key]

    def settle(self, key: bytes) -> None:
        move, place = self._leaving.pop(key, (None, 0))
        if move is None:
            return
        try:
            move.wait()
        except Exception:  # a disk that fails here costs time, not tokens
            self._broken = True
            return
        self._keys[place], self._places[key] = key, place

    def collect(self) -> None:
        """Note what has been written meanwhile."""
        for key in [key for key, (move, _) in self._leaving.items() if move.done]:
            self.settle(key)

    # -- and back ---------------------------------------------------------------------------------------------------

    @property
    def worth_loading(self) -> bool:
        return self._pace.worth_loading

    def load(self, wanted: Sequence[tuple[bytes, int]]) -> Coming:
        """Begin to fill pages, which nobody else may touch until `finish`, with what is known by these keys."""
        loads = tuple(self._load(key, page) for key, page in wanted if key in self._places)
        return Coming(tuple(page for _, page in wanted), loads)

    def _load(self, key: bytes, page: int) -> Load:
        place = self._places[key]
        self._readers[place] += 1
        return Load(key, page, place, self._there.load(place, page))

    def finish(self, coming: Coming) -> list[tuple[bytes, int]]:
        """Wait until they are there. Returns (key, page) of those that came back as they were."""
        sound = []
        for load in coming.loads:
            well = _succeeds(load.move)
            self._readers[load.place] -= 1
            if well:
                sound.append((load.key, load.page))
            elif self._keys[load.place] == load.key:
                self._forget(load.place)
        return sound

    # -- the whole --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Integrity: raises AssertionError unless keys and places agree."""
        assert {key: place for place, key in enumerate(self._keys) if key is not None} == self._places
        assert all(readers >= 0 for readers in self._readers.values())
        self._there.check()

    def close(self) -> None:
        """Finish what is on its way. No page may be coming."""
        for key in list(self._leaving):
            self.settle(key)
        assert not +self._readers, "pages are still on their way"


def _succeeds(move: Move) -> bool:
    try:
        move.wait()
    except Exception:
        return False
    return True
