"""What several workers divide between them, and which part is whose."""

from __future__ import annotations

LOOP, V = "loop", "v"
HALVES = "zero-bubble"  # an order of micro-batches in which backward is in two halves
SHAPES = (LOOP, V)
"""How the way through more legs than workers lies: from the last worker to the first again, or back as it came."""


def leg_of(worker: int, lap: int, workers: int, shape: str) -> int:
    """The leg that a worker has in a lap."""
    return lap * workers + (workers - 1 - worker if _returns(lap, shape) else worker)


def worker_of(leg: int, workers: int, shape: str) -> int:
    """Who has a leg."""
    lap, place = divmod(leg, workers)
    return workers - 1 - place if _returns(lap, shape) else place


def _returns(lap: int, shape: str) -> bool:
    return shape == V and lap % 2 == 1


class Divided:
    """What one of several workers does, worker `rank`. With `legs`, equally many of them have each leg; or, if there are more
    legs than workers, each has equally many, and the way through all of them has the shape `legs_shape`."""

    workers: int
    rank: int
    legs: tuple[int, ...]
    legs_shape: str

    @property
    def sharers(self) -> int:
        """Workers who divide state and batch: all, or those of a leg, who are neighbours by rank."""
        return max(self.workers // max(len(self.legs), 1), 1)

    @property
    def leg(self) -> int:
        """Which one the worker has; of several, the first."""
        return self.rank // self.sharers

    @property
    def own_legs(self) -> tuple[int, ...]:
        """All that it has."""
        line = self.workers // self.sharers
        return tuple(leg_of(self.leg, lap, line, self.legs_shape) for lap in range(self.laps))

    @property
    def laps(self) -> int:
        """How many those are: so many times a micro-batch goes through all workers."""
        return max(len(self.legs), 1) // (self.workers // self.sharers)
