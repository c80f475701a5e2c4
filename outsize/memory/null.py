"""A tier without memory: it hands out extents and counts, so a plan runs where the bytes do not exist."""

from __future__ import annotations

import torch

from outsize.memory.tier import Extent, Tier


class NullTier(Tier):
    """Checks and counts like any tier. A read leaves its target as it is; it may be a fake or meta tensor."""

    def view(self, extent: Extent) -> torch.Tensor:
        return torch.empty(extent.nbytes, dtype=torch.uint8, device="meta")

    def close(self) -> None:
        pass

    def _provide(self, extent: Extent) -> None:
        pass

    def _withdraw(self, extent: Extent) -> None:
        pass

    def _fill(self, extent: Extent, offset: int, target: torch.Tensor) -> None:
        pass

    def _store(self, extent: Extent, offset: int, source: torch.Tensor) -> None:
        pass
