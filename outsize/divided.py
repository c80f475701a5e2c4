"""What several workers divide between them, and which part is whose."""

from __future__ import annotations


class Divided:
    """What one of several workers does, worker `rank`. With `legs`, equally many of them have each leg; or, if there are more
    legs than workers, each has equally many, and between one and the next there is one of every other worker."""

    workers: int
    rank: int
    legs: tuple[int, ...]

    @property
    def sharers(self) -> int:
        """Workers who divide state and batch: all, or those of a leg, who are neighbours by rank."""
        return max(self.workers // max(len(self.legs), 1), 1)

    @property
    def leg(self) -> int:
        """Which one the worker has; of several, the first."""
        return self.rank // self.sharers

    @property
    def own_legs(self) -> range:
        """All that it has."""
        return range(self.leg, max(len(self.legs), 1), self.workers // self.sharers)

    @property
    def laps(self) -> int:
        """How many those are: so many times a micro-batch goes through all workers."""
        return len(self.own_legs)
