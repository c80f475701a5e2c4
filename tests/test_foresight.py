"""Where a block goes in a full arena, against trying every place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outsize.memory.foresight import Layout, Resident

Told = list[tuple[int, int, bool]]
"""(pages of a gap, pages of the resident after it, whether it is pinned)."""
FULL = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.booleans()), max_size=12)


def layout_of(told: Told, tail: int, used: list[int]) -> Layout:
    """Residents by offset, used last in the order of `used`."""
    layout = Layout(sum(gap + size for gap, size, _ in told) + tail)
    offset = 0
    for number, (gap, size, pinned) in enumerate(told):
        layout.add(Resident(offset + gap, size, str(number), int(pinned)))
        offset += gap + size
    for number in used:
        layout.use(layout.by_use[str(number)])
    return layout


def every_window(layout: Layout, nbytes: int) -> list[tuple[int, int, int]]:
    """(when the last of its residents is given up, room wasted behind it, start) of each window without a pin."""
    order = list(layout.by_use)
    found = []
    for start in [0, *(resident.end for resident in layout.by_offset)]:
        end = start + nbytes
        inside = [r for r in layout.by_offset if r.offset < end and r.end > start]
        if end <= layout.capacity and not any(resident.pins for resident in inside):
            after = min((r.offset for r in layout.by_offset if r.offset >= end), default=layout.capacity)
            found.append((max((order.index(r.name) for r in inside), default=-1), after - end, start))
    return found


@given(FULL, st.integers(0, 4), st.integers(1, 12), st.data())
def test_a_block_goes_where_least_recently_used_ones_leave_first(
    told: Told, tail: int, nbytes: int, data: st.DataObject
) -> None:
    layout = layout_of(told, tail, data.draw(st.permutations(range(len(told)))))
    found = layout.place(nbytes, layout.by_use.values())
    windows = every_window(layout, nbytes)
    if found is None:
        assert not windows
        return
    start, victims = found
    assert min(windows) in [window for window in windows if window[2] == start]
    inside = [r.name for r in layout.by_offset if r.offset < start + nbytes and r.end > start]
    assert victims == inside


@given(FULL, st.integers(1, 12))
def test_residents_leave_the_layout_as_if_they_had_never_been_there(told: Told, nbytes: int) -> None:
    layout, kept = layout_of(told, 2, []), [number for number in range(len(told)) if number % 2]
    for number in range(len(told)):
        if number not in kept:
            layout.remove(str(number))
    other = Layout(layout.capacity)
    for resident in [layout.by_use[str(number)] for number in kept]:
        other.add(resident)
    assert layout.by_offset == other.by_offset
    assert layout.place(nbytes, layout.by_use.values()) == other.place(nbytes, other.by_use.values())
