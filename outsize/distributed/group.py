"""Who takes part in a run. One worker is a group too: it has every share, and what it would tell others it tells nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from outsize.distributed.collectives import Unreachable, gather, scatter
from outsize.distributed.shares import Shares, even_shares, sole_share
from outsize.distributed.watch import Watch
from outsize.errors import OptionError, OutsizeError, RunError
from outsize.memory.ledger import Ledger

PEER = "peer"  # the tier of what other workers hold; the wire is the link between it and memory here
TO_MEET = timedelta(seconds=30)  # for all workers to have come
TO_ANSWER = timedelta(minutes=30)  # for a worker that lives: the first one may be preparing data, or writing the model
NUMBER = "number"  # in the ledger: counts, losses and norms that workers tell each other


class Group:
    """One worker; or one of `size` that the planner imagines, who exchanges nothing. `ledger` counts what comes and goes
    over the wire, `waiting_seconds` how long this worker waited for it."""

    here = 1  # workers on this machine
    leads = True  # is the first of them

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.ledger = Ledger()
        self.waiting_seconds = 0.0
        self._owned = [0] * size  # elements of undivided tensors, by worker

    def shares(self, numel: int) -> Shares:
        """Who updates which elements of a flat tensor."""
        return even_shares(numel, self.rank, self.size)

    def undivided(self, numel: int) -> Shares:
        """As `shares`, of a tensor that one worker must update as a whole: whoever has the fewest elements of such."""
        owner = self._owned.index(min(self._owned))
        self._owned[owner] += numel
        return sole_share(numel, owner, self.rank, self.size)

    def gather(self, whole: torch.Tensor, shares: Shares) -> None:
        """Make `whole` (1-D), of which the own share is current, current in all of them."""

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        """The own share of the sum over all workers of `gradient` (1-D, any float dtype): fp32, in the order of the
        workers; of a single worker, the gradient as it is. Good until the next call."""
        return gradient

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


class Workers(Group):
    """Several workers, connected by `torch.distributed`."""

    def __init__(self, rank: int, size: int, here: int, leads: bool, patience: float) -> None:
        """`here` is how many there are on this machine, of which one `leads`; `patience` for one that does not move, in
        seconds. Raises RunError when they do not all come."""
        super().__init__(rank, size)
        self.here, self.leads = here, leads
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        try:
            meeting, _, _ = next(rendezvous("env://", rank, size, timeout=TO_MEET))
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

    def gather(self, whole: torch.Tensor, shares: Shares) -> None:
        self._wait(lambda: gather(whole, shares))
        own, size = len(shares.own), whole.element_size()
        self._count("weight", (self.size - 1) * own * size, (whole.numel() - own) * size)

    def reduce(self, gradient: torch.Tensor, shares: Shares) -> torch.Tensor:
        own = shares.own
        received = self._buffer(gradient.dtype, (self.size - 1) * len(own)).view(self.size - 1, len(own))
        self._wait(lambda: scatter(gradient, shares, received))
        size = gradient.element_size()
        self._count("gradient", (gradient.numel() - len(own)) * size, received.numel() * size)
        versions = [*received[: self.rank], gradient[own.start : own.stop], *received[self.rank :]]
        total = versions[0].to(torch.float32, copy=True)
        for version in versions[1:]:
            total.add_(version)
        return total

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        said = torch.tensor(numbers, dtype=torch.float64)
        heard = [torch.empty_like(said) for _ in range(self.size)]
        self._wait(lambda: distributed.all_gather(heard, said))
        self._count(NUMBER, (self.size - 1) * said.nbytes, (self.size - 1) * said.nbytes)
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
        started = perf_counter()
        try:
            exchange()
        except Unreachable as problem:
            raise self._watch.lost(problem.peer, problem) from problem
        except RuntimeError as problem:
            raise self._watch.lost(None, problem) from problem
        self.waiting_seconds += perf_counter() - started

    def _buffer(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        buffer = self._scratch.get(dtype)
        if buffer is None or buffer.numel() < numel:
            buffer = self._scratch[dtype] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]

    def _count(self, kind: str, sent: int, received: int) -> None:
        self.ledger.move("host", PEER, {kind: sent})
        self.ledger.move(PEER, "host", {kind: received})


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
    return Workers(rank, size, here, local == 0, patience) if size > 1 else Group()
