"""The least of a convex function, each value of which takes long to find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from math import inf


def values_about_least(value_at: Callable[[int], float], at_zero: float, last: int, below: float) -> dict[int, float]:
    """Values at 0 and at some places from 1 to `last`, a power of two: ever finer about the least. Not where the function
    would be no less than at another place, or than `below`. A value may be infinite."""
    known, step = {0: at_zero}, last
    while step:
        least = min(known, key=known.__getitem__)
        for place in sorted({least - step, least + step} & set(range(1, last + 1)) - known.keys()):
            if least_at(place, known) < min(below, *known.values()):
                known[place] = value_at(place)
        step //= 2
    return known


def least_at(place: int, known: Mapping[int, float]) -> float:
    """What a convex function with these values is at least there: not below a line through two places on one side of it."""
    finite = [one for one, value in known.items() if value < inf]
    sides = ((p, q) for p, q in permutations(finite, 2) if q < p < place or place < p < q)
    return max((known[p] + (known[p] - known[q]) / (p - q) * (place - p) for p, q in sides), default=-inf)
