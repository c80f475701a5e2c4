"""Python looks at all objects hardly ever while many are made that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from outsize.machine.garbage import lasting

MANY = 300_000


@pytest.fixture
def nothing_else() -> Iterator[None]:
    """What other tests left is set aside: by its number Python decides when to look at everything."""
    gc.freeze()
    gc.collect()
    yield
    gc.unfreeze()


def collections_of_all(make: int) -> int:
    before = gc.get_stats()[2]["collections"]
    kept = [[number] for number in range(make)]
    assert len(kept) == make
    return gc.get_stats()[2]["collections"] - before


@pytest.mark.usefixtures("nothing_else")
def test_what_stays_is_not_looked_at_again_and_again() -> None:
    before = gc.get_threshold()
    assert collections_of_all(MANY) > 0
    with lasting():
        assert collections_of_all(MANY) == 0
    assert gc.get_threshold() == before and gc.isenabled()


def test_cycles_that_die_young_go_all_the_same() -> None:
    class Node:
        alive = 0

        def __init__(self) -> None:
            Node.alive += 1
            self.itself = self

        def __del__(self) -> None:
            Node.alive -= 1

    with lasting():
        for _ in range(20_000):
            Node()
        assert Node.alive < 5_000
