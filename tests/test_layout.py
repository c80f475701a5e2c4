"""Where a block goes near compute: the window that is free first when residents go in the order of their last use."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from outsize.memory.layout import Layout, Resident

CAPACITY = 40
steps = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.booleans()), min_size=1, max_size=40)


def by_trying_everything(residents: list[Resident], nbytes: int) -> tuple[int, set[str]] | None:
    """`residents`: the one used longest ago first. Of all windows the one whose last victim goes first; among those that
    which wastes least; then the lowest."""
    place = {resident.name: index for index, resident in enumerate(residents)}
    found = []
    for start in [0, *(resident.offset + resident.nbytes for resident in residents)]:
        end = start + nbytes
        inside = [r for r in residents if r.offset < end and r.offset + r.nbytes > start]
        if end <= CAPACITY and not any(resident.pins for resident in inside):
            after = min([r.offset for r in residents if r.offset >= end], default=CAPACITY)
            last = max((place[resident.name] for resident in inside), default=-1)
            found.append((last, after - end, start, {resident.name for resident in inside}))
    return min(found)[2:] if found else None


@settings(max_examples=200, deadline=None)
@given(steps)
def test_a_window_is_the_one_that_trying_everything_finds(steps: list[tuple[int, int, bool]]) -> None:
    layout = Layout(CAPACITY)
    for number, (nbytes, used, pinned) in enumerate(steps):
        order = list(layout.by_name.values())
        found = layout.place(nbytes, order)
        expected = by_trying_everything(order, nbytes)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert (found[0], set(found[1])) == expected
            for victim in found[1]:
                layout.remove(victim)
            layout.add(Resident(found[0], nbytes, str(number), pins=int(pinned and number % 3 == 0)))
        if order and used < len(layout.by_name):
            layout.used(list(layout.by_name)[used])


def test_room_that_was_dropped_comes_last_for_others_and_once_for_its_own_block() -> None:
    """What is placed there waits until the real run has dropped it, and everything behind that waits too."""
    layout = Layout(3)
    for offset, name in enumerate("abc"):
        layout.add(Resident(offset, 1, name))
    layout.drop("b")
    assert "b" not in layout.by_name
    taken = []
    for name in ("d", "e", "b"):
        found = layout.place(1, layout.by_name.values())
        assert found is not None
        offset, victims = found
        for victim in victims:
            layout.remove(victim)
        layout.add(Resident(offset, 1, name))
        taken.append(offset)
    assert taken == [0, 2, 1]
    assert list(layout.by_name) == ["d", "e", "b"]
