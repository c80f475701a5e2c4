"""What several workers divide between them, and which part is whose."""

from __future__ import annotations


class Divided:
    """What one of several workers does, worker `rank`; with `legs`, equally many of them have each leg."""

    workers: int
    rank: int
    legs: tuple[int, ...]

    @property
    def sharers(self) -> int:
        """Workers who divide state and batch: all, or those of a leg, who are neighbours by rank."""
        return self.workers // max(len(self.legs), 1)

    @property
    def leg(self) -> int:
        """Which one the worker has."""
        return self.rank // self.sharers
