"""How bytes get from worker to worker. Each pair exchanges directly what the one has and the other needs, so that shares
may be of any size, nothing is sent twice, and sums are taken in the order of the workers whatever the network does."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed import P2POp

from outsize.distributed.shares import Shares


class Unreachable(RuntimeError):
    """A worker, if it is known which, that does not answer."""

    def __init__(self, peer: int | None, problem: Exception) -> None:
        super().__init__(str(problem))
        self.peer = peer


def gather(whole: torch.Tensor, shares: Shares) -> None:
    """Fill `whole` (1-D) with the shares of the other workers, who get this one's.

    Received are the others' shares; sent is the own one to each of them."""
    parts = [whole[span.start : span.stop] for span in shares.spans]
    _exchange({peer: parts[shares.rank] for peer in _others(shares)}, {peer: parts[peer] for peer in _others(shares)})


def scatter(parts: torch.Tensor, shares: Shares, received: torch.Tensor) -> None:
    """Send each other worker its share of `parts` (1-D); their versions of the own share come into `received`
    `[workers - 1, own share]`, in the order of the workers."""
    peers = _others(shares)
    _exchange(
        {peer: parts[shares.spans[peer].start : shares.spans[peer].stop] for peer in peers},
        {peer: received[index] for index, peer in enumerate(peers)},
    )


def _others(shares: Shares) -> list[int]:
    return [peer for peer in range(len(shares.spans)) if peer != shares.rank]


def _exchange(outgoing: dict[int, torch.Tensor], incoming: dict[int, torch.Tensor]) -> None:
    """Bytes, whatever they mean. Raises Unreachable."""
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
