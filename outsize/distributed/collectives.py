"""How bytes get from worker to worker. Each pair exchanges directly what the one has and the other needs, so that shares
may be of any size, nothing is sent twice, and sums are taken in the order of the workers whatever the network does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

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


Messages = Mapping[int, torch.Tensor]
"""To workers, or from them."""
Across = Sequence[distributed.ProcessGroup]
"""By tag, the groups for what lies on devices: NCCL knows no tags."""


def across(device: torch.device, tags: int, patience: timedelta) -> Across:
    """None for the host. All workers call this alike, and all groups connect, since what comes first need not be of all. What
    NCCL takes of a device for itself nobody counts. Untested on GPUs: none was at hand."""
    if device.type != "cuda":
        return ()
    groups = [distributed.new_group(backend="nccl", timeout=patience) for _ in range(tags)]
    for group in groups:
        distributed.all_reduce(torch.zeros(1, device=device), group=group)
    return [group for group in groups if isinstance(group, distributed.ProcessGroup)]


def exchange(outgoing: Messages, incoming: Messages, tag: int = 0, groups: Across = ()) -> None:
    """Send to workers, and receive from them: bytes, whatever they mean. Raises Unreachable."""
    finish(begin(outgoing, incoming, tag, groups))


def begin(outgoing: Messages, incoming: Messages, tag: int = 0, groups: Across = ()) -> list[Begun]:
    """As `exchange`, which ends with `finish`: until then the tensors must stay, and what is sent must not change. What is
    sent under a `tag` is received under it, in order. What lies on devices is exchanged in the order of their queues."""
    # Gloo sends to who has said that it waits, and says so on the connection that its own bytes take: said after them, it
    # comes when they are through, and only then the other's set out. Whoever is a moment late would halve the link.
    pairs = [(distributed.irecv, *message) for message in incoming.items()]
    pairs += [(distributed.isend, *message) for message in outgoing.items()]
    group = groups[tag] if any(data.is_cuda for _, _, data in pairs) else None
    operations = [P2POp(way, _bytes(data), peer, group, tag) for way, peer, data in pairs if data.numel()]
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
