"""How bytes get from worker to worker. Each pair exchanges directly what the one has and the other needs, so that shares
may be of any size, nothing is sent twice, and sums are taken in the order of the workers whatever the network does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import distributed
from torch.distributed import P2POp


class Unreachable(RuntimeError):
    """A worker, if it is known which, that does not answer."""

    def __init__(self, peer: int | None, problem: Exception) -> None:
        super().__init__(str(problem))
        self.peer = peer


def exchange(outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor]) -> None:
    """Send to workers, and receive from them: bytes, whatever they mean. Raises Unreachable."""
    operations = [P2POp(distributed.isend, _bytes(data), peer) for peer, data in outgoing.items() if data.numel()]
    operations += [P2POp(distributed.irecv, _bytes(data), peer) for peer, data in incoming.items() if data.numel()]
    if not operations:
        return
    works = distributed.batch_isend_irecv(operations)
    for index, work in enumerate(works):
        try:
            work.wait()
        except RuntimeError as problem:
            known = len(works) == len(operations)  # NCCL has one for all
            raise Unreachable(operations[index].peer if known else None, problem) from problem


def _bytes(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8)
