"""What is found of a convex function, and what need not be."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from random import Random

import pytest

from outsize.planner.convex import least_at, values_about_least


def made_of(*lines: tuple[float, float]) -> Callable[[int], float]:
    """The highest of lines of (slope, value at 0)."""
    return lambda place: max(slope * place + start for slope, start in lines)


def test_a_convex_function_is_not_below_what_is_said_of_it() -> None:
    draw = Random(0)
    for _ in range(200):
        function = made_of(*[(draw.uniform(-3, 3), draw.uniform(-3, 3)) for _ in range(4)])
        known = {place: function(place) for place in draw.sample(range(5), 3)}
        assert all(least_at(place, known) <= function(place) + 1e-9 for place in range(5) if place not in known)
    assert least_at(1, {2: 3.0, 4: 7.0}) == 1.0  # on their line
    assert least_at(3, {2: 3.0, 4: 7.0}) == -inf
    assert least_at(1, {2: 3.0, 3: inf, 4: inf}) == -inf  # no line


def test_nothing_is_passed_over_that_is_less() -> None:
    """But places that a line rules out, or that lie beyond one that is less."""
    draw, spared = Random(1), 0
    for _ in range(200):
        function = made_of(*[(draw.uniform(-3, 3), draw.uniform(-3, 3)) for _ in range(3)])
        everywhere = {place: function(place) for place in range(5)}
        values = values_about_least(everywhere.__getitem__, everywhere[0], 4, inf)
        assert values.items() <= everywhere.items() and min(values.values()) == min(everywhere.values())
        spared += 5 - len(values)
    assert spared > 200


@pytest.mark.parametrize(("below", "tried"), [(inf, [4, 2, 1, 3]), (2.0, [4, 2])])
def test_what_cannot_be_less_than_something_known_is_not_looked_for(below: float, tried: list[int]) -> None:
    """By the lines from (0, 8) and (4, 8) through (2, 4) it is at least 2 between."""
    places: list[int] = []
    values = {4: 8.0, 2: 4.0, 1: 5.0, 3: 6.0}
    values_about_least(lambda place: places.append(place) or values[place], 8.0, 4, below)
    assert places == tried


def test_a_place_without_a_value_rules_out_no_other() -> None:
    values = {4: inf, 2: 3.0, 1: 3.5, 3: 2.0}
    assert values_about_least(values.__getitem__, 4.0, 4, inf) == {0: 4.0, **values}
