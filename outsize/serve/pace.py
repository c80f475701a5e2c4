"""Move or compute again: what each costs here, planned at first, then as measured."""

from __future__ import annotations

from dataclasses import dataclass

from outsize.memory.transfer import Transfers
from outsize.plan import Serving

LEARNT = 64 << 20  # bytes that must have moved before their rate is believed
PROMPT = 32  # tokens of a step from which its time says what a token of a prompt costs
NEWEST = 0.3  # weight of the newest step in the mean


@dataclass
class Pace:
    """Seconds for a token of a prompt to be `computed`, for its keys and values to be read from, or written to, the tier
    where far pages are."""

    computed: float
    read: float
    written: float
    token_bytes: int

    @classmethod
    def planned(cls, serving: Serving) -> Pace:
        return cls(*serving.token_seconds, serving.page_bytes // serving.page_tokens)

    def step(self, tokens: int, seconds: float, transfers: Transfers) -> None:
        """A step of so many tokens took so long."""
        if tokens >= PROMPT:
            self.computed += NEWEST * (seconds / tokens - self.computed)
        self.read = self._measured(transfers, "read", self.read)
        self.written = self._measured(transfers, "write", self.written)

    def _measured(self, transfers: Transfers, direction: str, otherwise: float) -> float:
        moved = transfers.bytes[direction]
        return self.token_bytes * transfers.busy_seconds[direction] / moved if moved >= LEARNT else otherwise

    @property
    def worth_saving(self) -> bool:
        """A page is written and read again sooner than computed again."""
        return self.read + self.written < self.computed

    @property
    def worth_loading(self) -> bool:
        return self.read < self.computed
