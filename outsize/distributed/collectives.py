"""How bytes get from worker to worker. Each pair exchanges directly what the one has and the other needs, so that shares
may be of any size, nothing is sent twice, and sums are taken in the order of the workers whatever the network does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import P2POp


class Unreachable(RuntimeError):
    """A worker, if it is known which, that does not answer."""

    def __init__(self, peer: int | None, problem: Exception) -> None:
        super().__init__(str(problem))
        self.peer = peer


@dataclass(frozen=True)
class Begun:
    """Some of what is on its way; `tensors` are to stay until it is there. `peer`: with whom, if it is one."""

    work: distributed.Work
    tensors: list[torch.Tensor]
    peer: int | None


def exchange(outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor], tag: int = 0) -> None:
    """Send to workers, and receive from them: bytes, whatever they mean. Raises Unreachable."""
    finish(begin(outgoing, incoming, tag))


def begin(outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor], tag: int = 0) -> list[Begun]:
    """As `exchange`, which ends with `finish`: until then the tensors must stay, and what is sent must not change. What is
    sent under a `tag` is received under it, in order."""
    # Gloo sends to who has said that it waits, and says so on the connection that its own bytes take: said after them, it
    # comes when they are through, and only then the other's set out. Whoever is a moment late would halve the link.
    pairs = [(distributed.irecv, *message) for message in incoming.items()]
    pairs += [(distributed.isend, *message) for message in outgoing.items()]
    operations = [P2POp(way, _bytes(data), peer, tag=tag) for way, peer, data in pairs if data.numel()]
    works = distributed.batch_isend_irecv(operations) if operations else []
    known = len(works) == len(operations)  # NCCL has one for all
    tensors = [*outgoing.values(), *incoming.values()]
    return [Begun(work, tensors, operations[index].peer if known else None) for index, work in enumerate(works)]


def finish(exchanges: list[Begun]) -> None:
    """Raises Unreachable."""
    for begun in exchanges:
        try:
            begun.work.wait()
        except RuntimeError as problem:
            raise Unreachable(begun.peer, problem) from problem


def _bytes(data: torch.Tensor) -> torch.Tensor:
    return data.view(torch.uint8)
