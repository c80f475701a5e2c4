"""Where workers meet: keys and values at an address that all were given, and who has not come there."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from outsize.distributed.launch import LISTENING
from outsize.distributed.watch import NOTICE
from outsize.errors import RunError

TO_MEET = 30.0  # seconds for all workers to have come
AGAIN = 0.1  # seconds until one looks again
MISSING = "missing"


def meet(rank: int, size: int, place: str) -> tuple[Store, list[str]]:
    """The meeting point, and what every worker of `size` says of its `place`. Raises RunError when it cannot be reached, or
    with the names of those who have not come."""
    end = time.monotonic() + TO_MEET
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if rank:
            _reach(host, int(port), end)
        meeting = _open(rank, host, int(port), timedelta(seconds=TO_MEET))
        return meeting, _everyone(meeting, rank, size, place, end)
    except (RuntimeError, ValueError, OSError, OverflowError) as problem:
        raise RunError(
            f"Worker {rank} of {size} cannot reach the meeting point {host}:{port}: {problem}. Give all workers the address "
            "of the first, and open that port to them."
        ) from problem


def _open(rank: int, host: str, port: int, timeout: timedelta) -> Store:
    """It waits for nobody. What an attempt before left at a meeting point that outlives it is not seen."""
    if rank == 0 and LISTENING in os.environ:
        bound = int(os.environ[LISTENING])
        meeting = TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=bound)
    else:
        meeting, _, _ = next(rendezvous("env://", rank, 1, timeout=timeout))
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", meeting)


def _reach(host: str, port: int, end: float) -> None:
    """Wait for somebody to listen there. Raises OSError."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(end - time.monotonic(), AGAIN)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(AGAIN)


def _everyone(meeting: Store, rank: int, size: int, place: str, end: float) -> list[str]:
    meeting.set(_place(rank), place)
    waiting = list(range(size))
    while True:
        while waiting and meeting.check([_place(waiting[0])]):
            waiting.pop(0)
        if meeting.check([MISSING]):
            raise RunError(meeting.get(MISSING).decode())
        if not waiting:
            return [meeting.get(_place(peer)).decode() for peer in range(size)]
        if time.monotonic() > end:
            lacking = [peer for peer in waiting if not meeting.check([_place(peer)])]
            meeting.set(MISSING, said := _missing(lacking, size))
            time.sleep(NOTICE)  # with the first worker the meeting point ends: let the others read
            raise RunError(said)
        time.sleep(AGAIN)


def _missing(lacking: list[int], size: int) -> str:
    who = f"Worker {lacking[0]}" if len(lacking) == 1 else f"Workers {', '.join(map(str, lacking))}"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"{who} of {size} did not come to the meeting point {address} within {TO_MEET:g} seconds. What it says itself tells "
        "why; if it says nothing, it was not started."
    )


def _place(rank: int) -> str:
    return f"place of {rank}"
