"""How fast bytes get from worker to worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Link:
    """What each worker sends and receives a second over the links of one tier while all the others do, and what an exchange
    costs however small it is. `busy`: how much of a core that takes meanwhile."""

    bytes_per_second: float
    latency: float = 0.0
    busy: float = 0.0

    def seconds(self, sent: int, received: int) -> float:
        return self.latency + max(sent, received) / self.bytes_per_second


Wire = Mapping[str, Link]
"""By tier."""
NO_WIRE: Wire = MappingProxyType({})
