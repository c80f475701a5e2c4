"""PyTorch's caching allocator, played: its rules, as c10/cuda/CUDACachingAllocator.cpp has them."""

from __future__ import annotations

from random import Random

import pytest

from outsize.machine.caching import cached_peak, lasting

MIB = 1 << 20


@pytest.mark.parametrize(
    ("nbytes", "segments"),
    [
        (1, 2 * MIB),  # small ones share segments of 2 MiB
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),  # others up to 10 MiB those of 20
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),  # larger ones have their own, of whole 2 MiB
        (10 * MIB + 1, 12 * MIB),
    ],
)
def test_a_tensor_gets_a_segment_for_its_size(nbytes: int, segments: int) -> None:
    assert cached_peak([(0, nbytes)]) == segments


def test_small_tensors_are_multiples_of_512_bytes() -> None:
    count = 2 * MIB // 512
    assert cached_peak([(n, 1) for n in range(count)]) == 2 * MIB
    assert cached_peak([(n, 1) for n in range(count + 1)]) == 4 * MIB
    assert cached_peak([(n, 513) for n in range(count // 2 + 1)]) == 4 * MIB


def test_what_was_freed_is_used_again_by_its_own_pool_alone() -> None:
    assert cached_peak([(0, 64 * MIB), (0, -64 * MIB), (1, 64 * MIB)]) == 64 * MIB
    assert cached_peak([(0, 64 * MIB), (0, -64 * MIB), (1, MIB)]) == 66 * MIB
    assert cached_peak([(0, 64 * MIB), (1, 64 * MIB)]) == 128 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken_and_split() -> None:
    freed = [(0, 64 * MIB), (1, 32 * MIB), (0, -64 * MIB), (1, -32 * MIB)]
    assert cached_peak([*freed, (2, 30 * MIB), (3, 64 * MIB)]) == 96 * MIB  # else 64 had no room
    assert cached_peak([*freed, (2, 40 * MIB), (3, 24 * MIB)]) == 96 * MIB
    assert cached_peak([*freed, (2, 40 * MIB), (3, 33 * MIB)]) == 130 * MIB  # 24 + 32 lie apart; a segment of 34


def test_a_rest_of_a_large_block_up_to_1_mib_stays_with_it() -> None:
    """It is not split off, so that a tensor as large as the rest finds no room there."""
    base = [(0, 20 * MIB), (0, -20 * MIB)]
    assert cached_peak([*base, (1, 18 * MIB), (2, 2 * MIB)]) == 20 * MIB
    assert cached_peak([*base, (1, 19 * MIB), (2, MIB + 512)]) == 40 * MIB


def test_free_neighbours_become_one_block_again() -> None:
    parts = [(n, 5 * MIB) for n in range(4)]  # of one segment of 20 MiB
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3)):
        freed = [(n, -5 * MIB) for n in order]
        assert cached_peak([*parts, *freed, (9, 20 * MIB)]) == 20 * MIB
    assert cached_peak([*parts, (0, -5 * MIB), (2, -5 * MIB), (9, 10 * MIB)]) == 30 * MIB  # no neighbours


def test_more_is_held_than_is_alive() -> None:
    random, alive, changes, most = Random(0), {}, [], 0
    for number in range(2000):
        if alive and random.random() < 0.5:
            gone = random.choice(list(alive))
            changes.append((gone, -alive.pop(gone)))
        nbytes = random.choice([1 << random.randrange(8, 27), random.randrange(1, 40 * MIB)])
        alive[number] = nbytes
        changes.append((number, nbytes))
        most = max(most, sum(alive.values()))
    once = cached_peak(changes)
    assert most <= once <= 2 * most
    ended = [*changes, *((number, -nbytes) for number, nbytes in alive.items())]
    assert cached_peak([*ended, (0, max(nbytes for _, nbytes in changes))]) == once  # segments are whole again


@pytest.mark.parametrize("nbytes", [300, 4096, 700_000, MIB, 3 * MIB, 7 * MIB, 10 * MIB, 33 * MIB + 1])
def test_what_stays_takes_its_part_of_segments(nbytes: int) -> None:
    """But for what is left of the last one, and for a byte of rounding each."""
    count = 500
    found = cached_peak([(n, nbytes) for n in range(count)])
    assert -count <= found - count * lasting(nbytes) < 20 * MIB
