"""Who takes part in a run. One worker is a group too: it has every share, and what it would tell others it tells nobody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from outsize.distributed.arrangement import ALONE, REMOTE, Arrangement
from outsize.distributed.collectives import Messages
from outsize.distributed.shares import Shares, cut_shares, sole_share
from outsize.distributed.wire import NO_WIRE, Wire
from outsize.errors import RunError
from outsize.memory.clock import Clock
from outsize.memory.ledger import Ledger

NUMBER = "number"  # in the ledger: counts, losses and norms that workers tell each other


class Group:
    """One worker. `ledger` counts what comes and goes over the wire, `waiting_seconds` how long this worker waited for it,
    and `clock` notes when."""

    here = 1  # workers on this machine
    leads = True  # is the first of them

    def __init__(self, arrangement: Arrangement = ALONE) -> None:
        self.arrangement = arrangement
        self.rank, self.size = arrangement.rank, arrangement.size
        self.ledger, self.clock = Ledger(), Clock()
        self.waiting_seconds = 0.0
        self._owned = [0] * self.size  # elements of undivided tensors, by worker
        self._cut: dict[tuple[int, tuple[int, ...]], Shares] = {}

    def shares(self, numel: int, parts: tuple[int, ...] = ()) -> Shares:
        """Who updates which elements of a flat tensor, in proportion to the workers' `parts`; of none, equally many."""
        if (numel, parts) not in self._cut:
            self._cut[numel, parts] = cut_shares(numel, self.arrangement, parts)
        return self._cut[numel, parts]

    def undivided(self, numel: int, parts: tuple[int, ...] = ()) -> Shares:
        """As `shares`, of a tensor that one worker must update as a whole: whoever will have the fewest elements of such, for
        its part."""
        owner = min(range(self.size), key=lambda rank: (self._owned[rank] + numel) / (parts[rank] if parts else 1))
        self._owned[owner] += numel
        return sole_share(numel, owner, self.arrangement)

    def gather(self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None) -> None:
        """Make `part` (1-D), which is of this worker's elements at stage `last` (None: of all), current in all of them; its
        elements at stage `first` are."""

    def begin_gather(
        self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None
    ) -> Callable[[], None]:
        """As `gather`, while this worker goes on; what is returned waits until it is done. Till then nobody may touch `part`.
        All workers begin the same ones in the same order, and in that order they are gathered."""
        return lambda: None

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        """The own share of the sum over all workers of `gradient` (1-D, any float dtype): fp32, in the order of the
        workers, those with the fastest links first; of a single worker, the gradient as it is. Good until the next call."""
        return gradient

    def meet_on(self, device: torch.device) -> None:
        """Connect where the model computes; every worker calls this, before anything else is exchanged from there."""

    def row(self, size: int) -> Group:
        """The so many neighbours among whom this worker is."""
        return self

    def column(self, size: int) -> Group:
        """Those who have this worker's place in their rows, each of that size."""
        return self

    @property
    def nodes(self) -> int:
        """On how many there are equally many workers."""
        return self.arrangement.nodes

    def send(self, outgoing: Messages, incoming: Messages, tag: int = 0) -> None:
        """Exchange bytes: worker -> tensor to send, and worker -> tensor to fill. What goes from one worker to another comes
        in order, that of each `tag` for itself."""

    def begin(self, outgoing: Messages, tag: int = 0) -> Callable[[], None]:
        """Send while this worker goes on; what is returned waits until all has gone. Till then nobody may change it."""
        return dict(outgoing).clear  # till then it takes memory

    def take(self, peer: int, into: torch.Tensor, kind: str, tag: int = 0) -> torch.Tensor:
        """Fill a tensor with what that worker has for this one. `kind`: in the ledger."""
        return into

    def pass_on(self, peer: int, data: torch.Tensor, kind: str, tag: int = 0) -> Callable[[], None]:
        """The other side of `take`, as `begin`."""
        return self.begin({peer: data}, tag)

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        """What every worker says here, in their order."""
        return [numbers]

    def among(self, ranks: Sequence[int], *numbers: float) -> list[tuple[float, ...]]:
        """As `each`, of the workers of these `ranks`, who all call this."""
        return [numbers]

    def tell(self, value: Any) -> list[Any]:
        """As `each`, of anything that can be pickled; for the beginning of a run."""
        return [value]

    def first(self, make: Callable[[], Any]) -> Any:
        """What the first worker makes, pickled for the others; what it cannot make, none of them can."""
        return make()

    def agree(self, said: Mapping[str, Any]) -> None:
        """Raises RunError, on every worker, naming the first who says something else than worker 0, and what."""
        everyone = self.tell(dict(said))
        for what, expected in everyone[0].items():
            for rank, other in enumerate(everyone):
                if other[what] != expected:
                    raise RunError(
                        f"Worker {rank} has another {what} than worker 0: {other[what]}, not {expected}. All workers "
                        "must be given the same."
                    )

    def all_have(self) -> None:
        """Return when every worker has come as far with what another thread does: its commits."""

    def once(self, make: Callable[[], object], made: Callable[[], bool]) -> None:
        """Have the first worker do what is to be done once; and where that cannot be seen, because machines have folders
        of their own, the first worker there."""
        make()

    def folder(self, state: Path) -> Path:
        """Where in a run's folder `state` this worker has its own."""
        return state

    def fail(self, problem: Exception) -> None:
        """This worker stops because of `problem`: so will the others, each with its message."""

    def on_end(self, hear: Callable[[str], None]) -> None:
        """Have `hear`, in another thread, be told why this process ends because of another worker, a second before."""

    def leave(self) -> None:
        """Whatever others still do, they need nothing of this worker."""

    def close(self) -> None:
        """Nobody will be asked any more; return when nobody needs to."""


class Several(Group):
    """What several workers send each other. How it gets there is for those who know: `Workers`, or `Imagined`."""

    def __init__(self, arrangement: Arrangement) -> None:
        super().__init__(arrangement)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def gather(self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None) -> None:
        for level, outgoing, incoming in self._gathers(part, shares, first, last):
            self._exchange(level, "weight", outgoing, incoming)

    def begin_gather(
        self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None
    ) -> Callable[[], None]:
        exchanges = list(self._gathers(part, shares, first, last))
        for level, outgoing, incoming in exchanges:
            self._count(self.arrangement.tier(level), "weight", _nbytes(outgoing), _nbytes(incoming))
        return self._aside([(outgoing, incoming) for _, outgoing, incoming in exchanges])

    def _gathers(
        self, part: torch.Tensor, shares: Shares, first: int, last: int | None
    ) -> Iterator[tuple[int, Messages, Messages]]:
        """What must be exchanged over which level of links, one after the other."""
        last = len(self.arrangement.levels) if last is None else last
        start = shares.at(last).start
        for stage in range(first, last):
            level = self._level(stage)
            parts = self._parts(level, shares.stages[stage], part, start)
            own = parts.pop(self.rank, None)
            yield level, {} if own is None else dict.fromkeys(self.arrangement.others(level), own), parts

    def _aside(self, exchanges: list[tuple[Messages, Messages]]) -> Callable[[], None]:
        """Exchange one after the other, after all that went this way before; what is returned waits for it. Whoever has no
        way aside does it now."""
        for outgoing, incoming in exchanges:
            self.send(outgoing, incoming)
        return lambda: None

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        total, start = gradient, 0
        for stage in reversed(range(len(self.arrangement.levels))):
            level = self._level(stage)
            versions = self._versions(level, shares.stages[stage], total, start)
            total, start = versions[0].to(torch.float32, copy=True), shares.at(stage).start
            for version in versions[1:]:
                total.add_(version)
        return total

    def row(self, size: int) -> Group:
        first = self.rank // size * size
        return self if size == self.size else Some(self, range(first, first + size), self.arrangement.among(size))

    def column(self, size: int) -> Group:
        ranks = range(self.rank % size, self.size, size)
        return self if size == 1 else Some(self, ranks, Arrangement(self.rank // size, ((REMOTE, len(ranks)),)))

    def take(self, peer: int, into: torch.Tensor, kind: str, tag: int = 0) -> torch.Tensor:
        self.send({}, {peer: into}, tag)
        self._count(self.arrangement.tier_of(peer), kind, 0, into.nbytes)
        return into

    def pass_on(self, peer: int, data: torch.Tensor, kind: str, tag: int = 0) -> Callable[[], None]:
        self._count(self.arrangement.tier_of(peer), kind, data.nbytes, 0)
        return self.begin({peer: data}, tag)

    def _versions(
        self, level: int, spans: tuple[range, ...], total: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, ...]:
        """Of this worker's of the `spans`, in the order of the workers; each has added up `total`, from the element `start`
        on."""
        parts = self._parts(level, spans, total, start)
        own = parts.pop(self.rank, total[:0])
        others = self.arrangement.others(level) if own.numel() else []
        received = self._buffer(total, len(others) * own.numel()).view(len(others), own.numel())
        found = dict(zip(others, received, strict=True))
        self._exchange(level, "gradient", parts, found)
        found[self.rank] = own
        return tuple(found[peer] for peer in self.arrangement.circle(level) if peer in found)

    def _parts(self, level: int, spans: tuple[range, ...], whole: torch.Tensor, start: int) -> dict[int, torch.Tensor]:
        """By worker of the circle over links of `level`, what its span has of `whole`, whose first element is number `start`;
        none for an empty span."""
        circle = self.arrangement.circle(level)
        return {peer: whole[spans[peer].start - start : spans[peer].stop - start] for peer in circle if spans[peer]}

    def _level(self, stage: int) -> int:
        """Of the links over which workers exchange after `stage`."""
        return len(self.arrangement.levels) - 1 - stage

    def _exchange(self, level: int, kind: str, outgoing: Messages, incoming: Messages) -> None:
        self.send(outgoing, incoming)
        self._count(self.arrangement.tier(level), kind, _nbytes(outgoing), _nbytes(incoming))

    def _buffer(self, like: torch.Tensor, numel: int) -> torch.Tensor:
        """Of so many elements, where `like` is."""
        nbytes = numel * like.element_size()
        if self._scratch.numel() < nbytes or self._scratch.device != like.device:
            self._scratch = self._allocate(nbytes, like.device)
        return self._scratch[:nbytes].view(like.dtype)

    def _allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _count(self, tier: str, kind: str, sent: int, received: int) -> None:
        self.ledger.move("host", tier, {kind: sent})
        self.ledger.move(tier, "host", {kind: received})

    def _count_numbers(self, nbytes: int, ranks: Sequence[int] | None = None) -> None:
        """So many were told to those of these `ranks`, or to everyone."""
        tiers = (self.arrangement.tier_of(p) for p in ranks or range(self.size) if p != self.rank)
        for tier, others in Counter(tiers).items():
            self._count(tier, NUMBER, others * nbytes, others * nbytes)


class Some(Several):
    """Those of `whole` who have these `ranks` there, numbered in that order. What they send each other goes through `whole`,
    whose ledger counts it."""

    def __init__(self, whole: Several, ranks: range, arrangement: Arrangement) -> None:
        super().__init__(arrangement)
        self.ledger, self.clock = whole.ledger, whole.clock
        self._whole, self._ranks = whole, ranks

    def send(self, outgoing: Messages, incoming: Messages, tag: int = 0) -> None:
        self._whole.send(self._there(outgoing), self._there(incoming), tag)

    def begin(self, outgoing: Messages, tag: int = 0) -> Callable[[], None]:
        return self._whole.begin(self._there(outgoing), tag)

    def take(self, peer: int, into: torch.Tensor, kind: str, tag: int = 0) -> torch.Tensor:
        return self._whole.take(self._ranks[peer], into, kind, tag)

    def pass_on(self, peer: int, data: torch.Tensor, kind: str, tag: int = 0) -> Callable[[], None]:
        return self._whole.pass_on(self._ranks[peer], data, kind, tag)

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        return self._whole.among(self._ranks, *numbers)

    def _aside(self, exchanges: list[tuple[Messages, Messages]]) -> Callable[[], None]:
        return self._whole._aside([(self._there(outgoing), self._there(incoming)) for outgoing, incoming in exchanges])

    def _there(self, messages: Messages) -> Messages:
        return {self._ranks[peer]: tensor for peer, tensor in messages.items()}

    def _allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return self._whole._allocate(nbytes, device)

    def _count(self, tier: str, kind: str, sent: int, received: int) -> None:
        self._whole._count(tier, kind, sent, received)


class Imagined(Several):
    """What the planner knows of several workers: this one's part, in which the others send nothing. `tell(tier, kind, sent,
    received, seconds, busy)` hears of each exchange over a `wire`; `allocate` gives 1-D uint8 tensors."""

    def __init__(
        self,
        arrangement: Arrangement,
        wire: Wire = NO_WIRE,
        tell: Callable[[str, str, int, int, float, float], None] = lambda *_: None,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(arrangement)
        self._wire, self._tell, self._given = wire, tell, allocate

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        self._count_numbers(8 * len(numbers))
        return [numbers] * self.size

    def among(self, ranks: Sequence[int], *numbers: float) -> list[tuple[float, ...]]:
        self._count_numbers(8 * len(numbers), ranks)
        return [numbers] * len(ranks)

    def _allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return super()._allocate(nbytes, device) if self._given is None else self._given(nbytes)

    def _count(self, tier: str, kind: str, sent: int, received: int) -> None:
        super()._count(tier, kind, sent, received)
        link = self._wire.get(tier)
        seconds, busy = (0.0, 0.0) if link is None else (link.seconds(sent, received), link.busy)
        self._tell(tier, kind, sent, received, seconds, busy)


def _nbytes(messages: Messages) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in messages.values())
