"""How long a step of a pipeline takes: the workers' orders, played against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from outsize.asked import Request
from outsize.distributed.pipeline import BACKWARD, FORWARD, WEIGHTS, Turn, order_of
from outsize.divided import HALVES, leg_of, worker_of

Seconds = Callable[[int, int, int], float]
"""(worker, what, lap) -> what a turn takes."""


def stretch_of(request: Request) -> float:
    """How many times as long a step is as what each worker does in it, if all legs of the pipeline take equally long."""
    count, schedule = request.workers // request.sharers, request.schedule
    orders = [order_of(schedule, count, n, request.accumulate, request.laps) for n in range(count)]

    def turn(worker: int, what: int, lap: int) -> float:
        return 2.0 if what == BACKWARD and schedule != HALVES else 1.0

    own = sum(turn(0, what, lap) for what, lap, _ in orders[0])
    return play_turns(orders, turn, request.legs_shape) / own


def play_turns(orders: Sequence[Sequence[Turn]], seconds: Seconds, shape: str) -> float:
    """Seconds until the last of the workers is done, each of whom takes its turns in order, each when what it needs is
    there; ways between them take none. Raises AssertionError where they wait for each other for ever."""
    workers, laps = len(orders), 1 + max(lap for _, lap, _ in orders[0])
    done: dict[Turn, float] = {}  # by leg
    at, free = [0] * workers, [0.0] * workers

    def needed(what: int, leg: int, number: int) -> Turn | None:
        """A worker's own turns come in order anyway."""
        before = leg - 1 if what == FORWARD else leg + 1
        return (what, before, number) if what != WEIGHTS and 0 <= before < workers * laps else None

    going = list(range(workers))
    while going:
        worker = going.pop()
        while at[worker] < len(orders[worker]):
            what, lap, number = orders[worker][at[worker]]
            leg = leg_of(worker, lap, workers, shape)
            before = needed(what, leg, number)
            if before is not None and before not in done:
                break
            begin = max(free[worker], done[before] if before is not None else 0.0)
            free[worker] = done[what, leg, number] = begin + seconds(worker, what, lap)
            at[worker] += 1
            after = leg + 1 if what == FORWARD else leg - 1
            if 0 <= after < workers * laps and (other := worker_of(after, workers, shape)) not in going:
                going.append(other)
    assert at == [len(order) for order in orders], f"workers of {workers} legs wait for each other for ever"
    return max(free)
