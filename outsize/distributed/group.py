"""Who takes part in a run. One worker is a group too: it has every share, and what it would tell others it tells nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from outsize.distributed.arrangement import ALONE, REMOTE, Arrangement
from outsize.distributed.collectives import Unreachable, exchange
from outsize.distributed.shares import Shares, even_shares, sole_share
from outsize.distributed.watch import Watch
from outsize.distributed.wire import NO_WIRE, Wire
from outsize.errors import OptionError, OutsizeError, RunError
from outsize.memory.clock import Clock
from outsize.memory.ledger import Ledger

TO_MEET = timedelta(seconds=30)  # for all workers to have come
TO_ANSWER = timedelta(minutes=30)  # for a worker that lives: the first one may be preparing data, or writing the model
Messages = Mapping[int, torch.Tensor]
"""To workers, or from them."""
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
        self._even: dict[int, Shares] = {}

    def shares(self, numel: int) -> Shares:
        """Who updates which elements of a flat tensor."""
        if numel not in self._even:
            self._even[numel] = even_shares(numel, self.arrangement)
        return self._even[numel]

    def undivided(self, numel: int) -> Shares:
        """As `shares`, of a tensor that one worker must update as a whole: whoever has the fewest elements of such."""
        owner = self._owned.index(min(self._owned))
        self._owned[owner] += numel
        return sole_share(numel, owner, self.arrangement)

    def gather(self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None) -> None:
        """Make `part` (1-D), which is of this worker's elements at stage `last` (None: of all), current in all of them; its
        elements at stage `first` are."""

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        """The own share of the sum over all workers of `gradient` (1-D, any float dtype): fp32, in the order of the
        workers, those with the fastest links first; of a single worker, the gradient as it is. Good until the next call."""
        return gradient

    @property
    def nodes(self) -> int:
        """On how many there are equally many workers."""
        return self.arrangement.nodes

    def send(self, outgoing: Messages, incoming: Messages) -> None:
        """Exchange bytes: worker -> tensor to send, and worker -> tensor to fill."""

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        """What every worker says here, in their order."""
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

    def close(self) -> None:
        """Nobody will be asked any more."""


class Several(Group):
    """What several workers send each other. How it gets there is for those who know: `Workers`, or `Imagined`."""

    def __init__(self, arrangement: Arrangement) -> None:
        super().__init__(arrangement)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def gather(self, part: torch.Tensor, shares: Shares, first: int = 0, last: int | None = None) -> None:
        last = len(self.arrangement.levels) if last is None else last
        start = shares.at(last).start
        for stage in range(first, last):
            parts = [part[span.start - start : span.stop - start] for span in shares.stages[stage]]
            level = self._level(stage)
            others = self.arrangement.others(level)
            self._exchange(level, "weight", dict.fromkeys(others, parts[self.rank]), {o: parts[o] for o in others})

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        total, start = gradient, 0
        for stage in reversed(range(len(self.arrangement.levels))):
            level = self._level(stage)
            versions = self._versions(level, shares.stages[stage], total, start)
            total, start = versions[0].to(torch.float32, copy=True), shares.at(stage).start
            for version in versions[1:]:
                total.add_(version)
        return total

    def _versions(
        self, level: int, spans: tuple[range, ...], total: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, ...]:
        """Of this worker's of the `spans`, in the order of the workers; each has added up `total`, from the element `start`
        on."""
        parts = {
            peer: total[spans[peer].start - start : spans[peer].stop - start] for peer in self.arrangement.circle(level)
        }
        own, others = parts.pop(self.rank), self.arrangement.others(level)
        received = self._buffer(total.dtype, len(others) * own.numel()).view(len(others), own.numel())
        found = dict(zip(others, received, strict=True))
        self._exchange(level, "gradient", parts, found)
        found[self.rank] = own
        return tuple(found[peer] for peer in self.arrangement.circle(level))

    def _level(self, stage: int) -> int:
        """Of the links over which workers exchange after `stage`."""
        return len(self.arrangement.levels) - 1 - stage

    def _exchange(self, level: int, kind: str, outgoing: Messages, incoming: Messages) -> None:
        self.send(outgoing, incoming)
        self._count(self.arrangement.tier(level), kind, _nbytes(outgoing), _nbytes(incoming))

    def _buffer(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        if self._scratch.numel() < nbytes:
            self._scratch = self._allocate(nbytes)
        return self._scratch[:nbytes].view(dtype)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def _count(self, tier: str, kind: str, sent: int, received: int) -> None:
        self.ledger.move("host", tier, {kind: sent})
        self.ledger.move(tier, "host", {kind: received})

    def _count_numbers(self, nbytes: int) -> None:
        """So many were told to everyone."""
        for level in range(len(self.arrangement.levels)):
            told = self.arrangement.beyond(level) * nbytes
            self._count(self.arrangement.tier(level), NUMBER, told, told)


class Workers(Several):
    """Several workers, connected by `torch.distributed`."""

    def __init__(self, rank: int, size: int, local: int, here: int, patience: float) -> None:
        """`here` is how many there are on this machine, of which this is number `local`; `patience` for one that does not
        move, in seconds. Raises RunError when they do not all come."""
        self.here, self.leads = here, local == 0
        try:
            meeting, _, _ = next(rendezvous("env://", rank, size, timeout=TO_MEET))
            super().__init__(_arranged(meeting, rank, size, local, here))
            self._watch = Watch(meeting, rank, size, patience)
            distributed.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=TO_ANSWER)
            commits = distributed.new_group(backend="gloo", timeout=TO_ANSWER)
            assert isinstance(commits, distributed.ProcessGroup), "every worker is a member"
            self._commits = commits
        except (RuntimeError, ValueError) as problem:
            raise RunError(
                f"Worker {rank} of {size} cannot reach the meeting point {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')}: {problem}"
            ) from problem

    def send(self, outgoing: Messages, incoming: Messages) -> None:
        self._wait(lambda: exchange(outgoing, incoming))

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        said = torch.tensor(numbers, dtype=torch.float64)
        heard = [torch.empty_like(said) for _ in range(self.size)]
        self._wait(lambda: distributed.all_gather(heard, said))
        self._count_numbers(said.nbytes)
        return [tuple(numbers.tolist()) for numbers in heard]

    def tell(self, value: Any) -> list[Any]:
        heard: list[Any] = [None] * self.size
        self._wait(lambda: distributed.all_gather_object(heard, value))
        return heard

    def first(self, make: Callable[[], Any]) -> Any:
        made: list[Any] = [None]
        if self.rank == 0:
            try:
                made = [make()]
            except OutsizeError as problem:
                made = [problem]
        self._wait(lambda: distributed.broadcast_object_list(made, 0))
        if isinstance(made[0], OutsizeError):
            raise made[0]
        return made[0]

    def all_have(self) -> None:
        try:
            distributed.barrier(group=self._commits)
        except RuntimeError as problem:
            raise self._watch.lost(None, problem) from problem

    def once(self, make: Callable[[], object], made: Callable[[], bool]) -> None:
        if self.rank == 0:
            make()
        self.each(0)
        if self.leads and not made():
            make()
        self.each(0)

    def folder(self, state: Path) -> Path:
        return state / f"worker-{self.rank}-of-{self.size}"

    def fail(self, problem: Exception) -> None:
        self._watch.fail(problem)

    def close(self) -> None:
        self.each(0)
        self._watch.close()
        distributed.destroy_process_group()

    def _wait(self, exchange: Callable[[], object]) -> None:
        started = self.clock.now()
        try:
            exchange()
        except Unreachable as problem:
            raise self._watch.lost(problem.peer, problem) from problem
        except RuntimeError as problem:
            raise self._watch.lost(None, problem) from problem
        self.waiting_seconds += self.clock.note("wire", started)


class Imagined(Several):
    """What the planner knows of several workers: this one's part, in which the others send nothing. `tell(tier, kind, sent,
    received, seconds)` hears of each exchange over a `wire`; `allocate` gives 1-D uint8 tensors."""

    def __init__(
        self,
        arrangement: Arrangement,
        wire: Wire = NO_WIRE,
        tell: Callable[[str, str, int, int, float], None] = lambda *_: None,
        allocate: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        super().__init__(arrangement)
        self._wire, self._tell, self._given = wire, tell, allocate

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        self._count_numbers(8 * len(numbers))
        return [numbers] * self.size

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return super()._allocate(nbytes) if self._given is None else self._given(nbytes)

    def _count(self, tier: str, kind: str, sent: int, received: int) -> None:
        super()._count(tier, kind, sent, received)
        seconds = self._wire[tier].seconds(sent, received) if tier in self._wire else 0.0
        self._tell(tier, kind, sent, received, seconds)


def _nbytes(messages: Messages) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in messages.values())


def find_group(patience: float = 30.0) -> Group:
    """The group that torch's launcher has put this process into by environment variables, or a worker alone.

    Raises OptionError when these are incomplete, RunError when the others cannot be reached."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Group()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise OptionError(
            f"This process is to be a worker, but {', '.join(missing)} is not set. Start it with torchrun, or give "
            "--workers."
        )
    rank, size, local, here = (int(os.environ[name]) for name in names[:4])
    return Workers(rank, size, local, here, patience) if size > 1 else Group()


def _arranged(meeting: Store, rank: int, size: int, local: int, here: int) -> Arrangement:
    """By node, if these have equally many workers, with successive ranks; else all links are taken for slow ones."""
    meeting.set(f"node of {rank}", f"{rank - local} {here}")
    said = [meeting.get(f"node of {peer}").decode() for peer in range(size)]
    if said == [f"{peer // here * here} {here}" for peer in range(size)]:
        return Arrangement.of(rank, size, size // here)
    return Arrangement(rank, ((REMOTE, size),))
