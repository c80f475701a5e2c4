"""Several workers on this machine: this very command, started once for each."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen

from outsize.errors import RunError

RESTARTS = 3  # after a worker was killed
CONTINUES = "The same command continues at the last step that all have committed."
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BY_THEMSELVES = 5.0  # seconds for the others when one has failed: each finds that out, and says who
LOOK_EVERY = 0.05  # seconds
LISTENING = "OUTSIZE_LISTENING"  # the first worker finds the socket of the meeting point here, which is bound already
SIGNAL_OF_DEATH = 1  # PR_SET_PDEATHSIG of prctl


def is_worker() -> bool:
    """A launcher has started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def says_for_all() -> bool:
    """What every worker of this machine would say, one says: this one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def launch(workers: int, restarts: int = RESTARTS, afterwards: str = CONTINUES, ending: float = 5.0) -> None:
    """Run this process's own command line as so many workers, and return when all are done. When one is killed, all begin
    again, so many times. Signals are passed on: after Ctrl-C workers have as long as they need, else `ending` seconds.

    Raises RunError naming a worker that is killed once too often, and what to do `afterwards`; ends with the exit code of
    one that has said itself what is wrong, or that of the signal that has ended all."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    with _hearing() as heard:
        for left in reversed(range(restarts + 1)):
            failed = _Attempt(workers, heard, ending).run()
            if not failed:
                return
            if heard:
                sys.exit(128 + heard[0])  # each worker has said what that means
            rank, code = next(iter(failed.items()))
            if code > 0:
                sys.exit(code)
            killed = f"Worker {rank} was ended by {signal.Signals(-code).name}."
            if not left:
                raise RunError(f"{killed} {afterwards}")
            print(f"outsize: {killed} All begin again.", file=sys.stderr, flush=True)


@contextmanager
def _hearing() -> Iterator[list[signal.Signals]]:
    """Yields the signals that come, in order; not those that this process was told to ignore, as `nohup` does."""
    heard: list[signal.Signals] = []
    wanted = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _: heard.append(signal.Signals(n))) for number in wanted}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Attempt:
    """So many workers, in sessions of their own: a terminal's Ctrl-C, too, reaches them through this process alone."""

    def __init__(self, workers: int, heard: list[signal.Signals], ending: float) -> None:
        self._heard, self._ending = heard, ending
        self._passed_on, self._orders, self._due = 0, [signal.SIGTERM, signal.SIGKILL], math.inf
        self._failed: dict[int, int] = {}
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self._processes = [_start(rank, workers, listening) for rank in range(workers)]

    def run(self) -> dict[int, int]:
        """Exit codes of those that failed, the first one first."""
        try:
            while self._look():
                time.sleep(LOOK_EVERY)
        finally:
            self._tell(signal.SIGKILL)
        return self._failed

    def _look(self) -> bool:
        """Note who has ended, and tell the others what they are to know. False: all have ended."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        failed = {rank: code for rank, code in codes.items() if code and rank not in self._failed}
        self._failed |= dict(sorted(failed.items(), key=lambda found: found[1]))  # who was killed is the cause
        if failed:
            self._end_within(BY_THEMSELVES)
        for number in self._heard[self._passed_on :]:
            self._passed_on += 1
            self._tell(number)
            if number != signal.SIGINT:
                self._end_within(self._ending)
        if time.monotonic() > self._due:
            self._tell(self._orders.pop(0))
            self._due = time.monotonic() + self._ending if self._orders else math.inf
        return None in codes.values()

    def _end_within(self, seconds: float) -> None:
        self._due = min(self._due, time.monotonic() + seconds)

    def _tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


def _start(rank: int, workers: int, listening: socket.socket) -> Popen[bytes]:
    host, port = listening.getsockname()
    own = {"RANK": rank, "WORLD_SIZE": workers, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": workers}
    own |= {"MASTER_ADDR": host, "MASTER_PORT": port, LISTENING: listening.fileno()}
    return Popen(
        [sys.executable, "-m", "outsize", *sys.argv[1:]],
        env=os.environ | {name: str(value) for name, value in own.items()},
        pass_fds=[listening.fileno()] if rank == 0 else [],
        preexec_fn=_end_with_launcher,
        start_new_session=True,
    )


def _end_with_launcher() -> None:
    """However that ends: it may have no time to pass anything on. Only Linux can promise that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SIGNAL_OF_DEATH, signal.SIGTERM)
