"""Workers who are there: processes that `torch.distributed` connects."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from outsize.distributed.arrangement import REMOTE, Arrangement
from outsize.distributed.collectives import Across, Begun, Messages, Unreachable, across, begin, exchange, finish
from outsize.distributed.group import Group, Several
from outsize.distributed.launch import CONTINUES
from outsize.distributed.meeting import meet
from outsize.distributed.watch import Watch
from outsize.errors import OptionError, OutsizeError, RunError
from outsize.machine.devices import queue_beside
from outsize.memory.transfer import Ticket, Transfers

AHEAD = 2  # a tag: messages that overtake others, or are overtaken; those of a pipeline have 0 and 1
TO_ANSWER = timedelta(minutes=30)  # for a worker that lives: the first one may be preparing data, or writing the model


class Workers(Several):
    """Several workers, connected by `torch.distributed`."""

    def __init__(
        self,
        rank: int,
        size: int,
        local: int,
        here: int,
        close: int,
        patience: float,
        afterwards: str,
        answer: timedelta,
    ) -> None:
        """`here` is how many there are on this machine, of which this is number `local`; the rest as `find_group` has it.
        Raises RunError when they do not all come."""
        self.here, self.leads = here, local == 0
        self._thread: Transfers | None = None  # has one thread, in which exchanges go on while this worker does
        self._last: Ticket | None = None  # of what that thread was given
        self._across: Across = ()
        self._patience = answer
        meeting, places = meet(rank, size, f"{rank - local} {here}")
        super().__init__(_arranged(rank, size, here, close, places))
        try:
            self._watch = Watch(meeting, rank, size, patience, afterwards)
            distributed.init_process_group("gloo", store=meeting, rank=rank, world_size=size, timeout=answer)
            commits = distributed.new_group(backend="gloo", timeout=answer)
            assert isinstance(commits, distributed.ProcessGroup), "every worker is a member"
            self._commits = commits
        except (RuntimeError, ValueError) as problem:
            raise RunError(
                f"Worker {rank} of {size} has met the others, but cannot exchange with them: {problem}. Let each connect "
                "to each; GLOO_SOCKET_IFNAME names the interface that does."
            ) from problem

    def meet_on(self, device: torch.device) -> None:
        self._across = across(device, AHEAD + 1, self._patience)

    def send(self, outgoing: Messages, incoming: Messages, tag: int = 0) -> None:
        self._wait(lambda: exchange(outgoing, incoming, tag, self._across))

    def begin(self, outgoing: Messages, tag: int = 0) -> Callable[[], None]:
        begun: list[Begun] = []
        self._wait(lambda: begun.extend(begin(outgoing, {}, tag, self._across)))
        return lambda: self._wait(lambda: finish(begun))

    def _aside(self, exchanges: list[tuple[Messages, Messages]]) -> Callable[[], None]:
        beside = queue_beside({data.device for sides in exchanges for side in sides for data in side.values()})

        def carry_out() -> None:
            started = self.clock.now()
            with beside:
                for outgoing, incoming in exchanges:
                    exchange(outgoing, incoming, AHEAD, self._across)
            self.clock.note("exchange", started)

        if self._thread is None:
            self._thread = Transfers(readers=0)
        ticket = self._last = self._thread.after_writes(carry_out)
        return lambda: self._wait(ticket.wait)

    def each(self, *numbers: float) -> list[tuple[float, ...]]:
        said = torch.tensor(numbers, dtype=torch.float64)
        heard = [torch.empty_like(said) for _ in range(self.size)]
        self._wait(lambda: distributed.all_gather(heard, said))
        self._count_numbers(said.nbytes)
        return [tuple(numbers.tolist()) for numbers in heard]

    def among(self, ranks: Sequence[int], *numbers: float) -> list[tuple[float, ...]]:
        said = torch.tensor(numbers, dtype=torch.float64)
        heard = {peer: torch.empty_like(said) for peer in ranks if peer != self.rank}
        self.send(dict.fromkeys(heard, said), heard)
        self._count_numbers(said.nbytes, ranks)
        return [tuple((said if peer == self.rank else heard[peer]).tolist()) for peer in ranks]

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
        for others in (self.leads, True):  # who has a folder of its own beside others here, last
            self.each(0)
            if others and not made():
                make()
        self.each(0)

    def folder(self, state: Path) -> Path:
        return state / f"worker-{self.rank}-of-{self.size}"

    def fail(self, problem: Exception) -> None:
        self._watch.fail(problem)

    def on_end(self, hear: Callable[[str], None]) -> None:
        self._watch.on_end = hear

    def leave(self) -> None:
        self._watch.close()
        if self._thread is not None and self._last is not None and self._last.done:
            self._thread.close()  # else it may wait for who never comes, until the process ends
        distributed.destroy_process_group()

    def close(self) -> None:
        self.each(0)
        self.leave()

    def _wait(self, exchange: Callable[[], object]) -> None:
        started = self.clock.now()
        try:
            exchange()
        except Unreachable as problem:
            raise self._watch.lost(problem.peer, problem) from problem
        except RuntimeError as problem:
            raise self._watch.lost(None, problem) from problem
        self.waiting_seconds += self.clock.note("wire", started)


def find_group(
    patience: float = 30.0, afterwards: str = CONTINUES, answer: timedelta = TO_ANSWER, close: int = 1
) -> Group:
    """The group that a launcher has put this process into by environment variables, or a worker alone. `patience`, in
    seconds, is for a worker that does not move, and `answer` for one that does and says nothing; `afterwards` is the end of
    the message when one is lost. Of `close` neighbours on a node the links are faster than between others there.

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
    if size == 1:
        return Group()
    return Workers(rank, size, local, here, close, patience, afterwards, answer)


def _arranged(rank: int, size: int, here: int, close: int, places: list[str]) -> Arrangement:
    """By node, if these have equally many workers, with successive ranks; else all links are taken for slow ones."""
    if places == [f"{peer // here * here} {here}" for peer in range(size)]:
        return Arrangement.of(rank, size, size // here, close)
    if close > 1:
        raise OptionError(
            f"Workers can be close in groups of {close} where all nodes have equally many of them, with successive ranks. "
            "Start them so, or leave out --close."
        )
    return Arrangement(rank, ((REMOTE, size),))
