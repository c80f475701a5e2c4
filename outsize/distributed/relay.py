"""How a step goes from worker to worker when each has other units of a model: hidden states from each to the next, round
in a ring; and from the first one, who alone knows what is to be done, orders to all others."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from outsize.distributed.collectives import Messages
from outsize.distributed.group import NUMBER, Group
from outsize.errors import RunError

Order = tuple[Any, ...]
"""What is to be done, and with what; plain values."""
HIDDEN = "activation"  # in the ledger


class Relay:
    """One worker: it has all units, so that nothing is passed on and nobody told."""

    rank, size = 0, 1

    def tell(self, *order: Any) -> None:
        """Have all other workers do the same; what others tell nobody hears but from the first."""

    def hear(self) -> Order:
        """What the first worker orders next."""
        raise AssertionError("nobody tells a worker alone what to do")

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Hidden states of the shape of `like` from the worker before."""
        return like

    def pass_on(self, hidden: torch.Tensor) -> None:
        """Hidden states for the worker after this one."""

    def confirm(self, well: bool) -> bool:
        """The first worker hears whether it went `well` for all, who call this too; what others hear is always yes."""
        return well

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within it nobody else takes part: what is passed on goes nowhere, and what is taken are some numbers."""
        yield


class Ring(Relay):
    """A worker of `group`. What goes over the wire is counted in the group's ledger."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self._group = group.rank, group.size, group
        self._rehearses = self._lost = False

    def tell(self, *order: Any) -> None:
        if self.rank or self._lost:  # of what the first still does when another is gone, nobody hears
            return
        said = torch.frombuffer(bytearray(pickle.dumps(order)), dtype=torch.uint8)
        length = torch.tensor([said.numel()])
        others = range(1, self.size)
        for message in (length, said):
            self._send(dict.fromkeys(others, message), NUMBER)

    def hear(self) -> Order:
        length = self._receive(0, torch.empty(1, dtype=torch.long), NUMBER)
        said = self._receive(0, torch.empty(int(length), dtype=torch.uint8), NUMBER)
        return pickle.loads(said.numpy().tobytes())

    def take(self, like: torch.Tensor) -> torch.Tensor:
        if self._rehearses:
            return torch.linspace(-1, 1, like.numel(), dtype=like.dtype, device=like.device).view(like.shape)
        return self._receive((self.rank - 1) % self.size, torch.empty_like(like).contiguous(), HIDDEN)

    def pass_on(self, hidden: torch.Tensor) -> None:
        if not self._rehearses:
            self._send({(self.rank + 1) % self.size: hidden.contiguous()}, HIDDEN)

    def confirm(self, well: bool) -> bool:
        said = torch.tensor([well], dtype=torch.uint8)
        if self.rank:
            self._send({0: said}, NUMBER)
            return True
        return all([well, *(bool(self._receive(other, said.clone(), NUMBER)) for other in range(1, self.size))])

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        self._rehearses = True
        try:
            yield
        finally:
            self._rehearses = False

    def _send(self, outgoing: dict[int, torch.Tensor], kind: str) -> None:
        self._exchange(outgoing, {})
        for peer, message in outgoing.items():
            self._group.ledger.move("host", self._group.arrangement.tier_of(peer), {kind: message.nbytes})

    def _receive(self, peer: int, into: torch.Tensor, kind: str) -> torch.Tensor:
        self._exchange({}, {peer: into})
        self._group.ledger.move(self._group.arrangement.tier_of(peer), "host", {kind: into.nbytes})
        return into

    def _exchange(self, outgoing: Messages, incoming: Messages) -> None:
        try:
            self._group.send(outgoing, incoming)
        except RunError:
            self._lost = True
            raise
