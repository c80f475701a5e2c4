"""What a measured step did when: from what the engine noted on its clock."""

from __future__ import annotations

from collections.abc import Iterable

from outsize.memory.clock import Span


def timeline(noted: Iterable[Span], started: float, ended: float) -> tuple[Span, ...]:
    """(compute, update, wire, waiting, read, write or exchange, begin, end), in seconds since the step began. A step waits,
    exchanges (wire), updates or computes; what happens in waiting, or over the wire, is just that. Meanwhile it reads, writes
    and exchanges."""
    inside = [
        (what, max(begin, started), min(end, ended)) for what, begin, end in noted if begin < ended and end > started
    ]
    waiting, exchanging = (
        [(begin, end) for what, begin, end in inside if what == lane] for lane in ("waiting", "wire")
    )
    updating = [(begin, end) for what, begin, end in inside if what == "update"]
    found = [(what, begin, end) for what, begin, end in inside if what in ("read", "write", "exchange")]
    found += [("waiting", begin, end) for begin, end in waiting]
    found += [("wire", begin, end) for begin, end in exchanging]
    found += [("update", begin, end) for begin, end in without(updating, waiting + exchanging)]
    found += [("compute", begin, end) for begin, end in without([(started, ended)], waiting + exchanging + updating)]
    return tuple((what, begin - started, end - started) for what, begin, end in sorted(found, key=lambda span: span[1]))


def without(spans: list[tuple[float, float]], others: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The parts of `spans` that lie in none of `others`."""
    taken, first, found = sorted(others), 0, []
    for begin, end in sorted(spans):
        while first < len(taken) and taken[first][1] <= begin:
            first += 1
        index = first
        while index < len(taken) and taken[index][0] < end:
            start, stop = taken[index]
            if start > begin:
                found.append((begin, start))
            begin = max(begin, stop)
            index += 1
        if begin < end:
            found.append((begin, end))
    return found
