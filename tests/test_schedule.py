"""Policies on a simulated clock: who waits how long under a burst, without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outsize.serve.pages import Pages, digest
from outsize.serve.request import Request, Sampling, Sequence
from outsize.serve.schedule import FairShare, FeedbackQueues, FirstCome, Policy, Priority, Scheduler

Job = tuple[int, int, int, str, int]  # arrives at step, prompt, new tokens, key, priority


def simulate(policy: Policy, jobs: list[Job], pages: int = 64, seats: int = 4) -> list[int]:
    """The step in which each job finishes; a step computes up to 64 tokens, and every token of a sequence is 7."""
    scheduler = Scheduler(Pages(pages, 16), policy, seats, 64)
    scheduler.sharing = False
    ended: dict[int, int] = {}
    made: dict[Sequence, int] = {}
    clock = 0
    while len(ended) < len(jobs):
        for number, (at, prompt, new, key, priority) in enumerate(jobs):
            if at == clock:
                request = Request((7,) * prompt, Sampling(new), lambda event: None, key, priority)
                sequence = Sequence(request, 0, number, list(request.prompt))
                made[sequence] = number
                scheduler.add(sequence)
        turns = scheduler.schedule()
        scheduler.done(turns)
        clock += 1
        for sequence in [turn.sequence for turn in turns if turn.sequence.pending == 0]:
            sequence.tokens.append(7)
            if sequence.new_tokens == sequence.request.sampling.max_new_tokens:
                ended[made[sequence]] = clock
                scheduler.remove(sequence)
        scheduler.pages.check([sequence.pages for sequence in scheduler.sequences])
        assert turns or not scheduler.sequences, "nobody gets on"
        assert clock < 20_000
    assert scheduler.pages.available == pages
    return [ended[number] for number in range(len(jobs))]


BURST: list[Job] = [(0, 60, 200, "greedy", 0) for _ in range(12)] + [(5, 10, 5, "modest", 1) for _ in range(4)]


def late(policy: Policy) -> float:
    """Mean steps that the short jobs of the burst take."""
    return sum(simulate(policy, BURST)[12:]) / 4 - 5


def test_first_come_serves_in_order() -> None:
    ended = simulate(FirstCome(), BURST, pages=256)
    assert ended == sorted(ended)


@pytest.mark.parametrize("policy", [FeedbackQueues, FairShare, Priority])
def test_short_jobs_need_not_wait_for_long_ones(policy: Callable[[], Policy]) -> None:
    assert late(policy()) < late(FirstCome()) / 2


def test_feedback_knows_no_length_and_still_serves_everybody() -> None:
    ended = simulate(FeedbackQueues(), BURST)
    assert max(ended[12:]) < min(ended[:12])


def test_a_key_that_was_away_has_saved_nothing_up() -> None:
    busy = [(0, 16, 30, "busy", 0) for _ in range(8)]
    back = [(150, 16, 50, "back", 0) for _ in range(8)] + [(150, 16, 50, "busy", 0) for _ in range(8)]
    ended = simulate(FairShare(), [*busy, *back], seats=2)
    first, second = sum(ended[8:16]) / 8, sum(ended[16:]) / 8
    assert abs(first - second) < 0.25 * (max(ended) - 150)


@given(
    st.sampled_from([FirstCome, FeedbackQueues, FairShare, Priority]),
    st.lists(
        st.tuples(
            st.integers(0, 30), st.integers(1, 100), st.integers(1, 40), st.sampled_from("ab"), st.integers(0, 2)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(9, 20),
)
def test_everybody_finishes_and_every_page_comes_back(
    policy: Callable[[], Policy], jobs: list[Job], pages: int
) -> None:
    first = min(at for at, *_ in jobs)
    simulate(policy(), [(at - first, *rest) for at, *rest in jobs], pages)


def test_a_prefix_is_known_by_all_that_is_in_it() -> None:
    pages = Pages(8, 4)
    tokens = list(range(12))
    held = [pages.take() for _ in range(3)]
    pages.know(tokens, held, 0, 12)

    def find(tokens: list[int]) -> list[int | None]:
        return [page for _, page in pages.find(tokens)]

    assert find([*tokens, 1]) == held
    assert find(tokens) == held[:2], "one token at least is left to compute"
    assert find([9, *tokens[1:], 1]) == [] and find([*tokens[:4], 9, *tokens[5:], 1]) == held[:1]
    assert digest(digest(b"", [1]), [2]) != digest(digest(b"", [2]), [2])
    pages.release(held)
    pages.check()
    taken = [pages.take() for _ in range(8)]
    assert find([*tokens, 1]) == [], "a place that was wanted has forgotten"
    with pytest.raises(AssertionError, match="is held 1 times, by 0"):
        pages.check()
    pages.release(taken)
    pages.check()
