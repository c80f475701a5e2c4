"""Who is gone is noticed although no exchange says so."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest
from torch._C._distributed_c10d import TCPStore

from outsize.distributed.watch import Watch, _machine

WORKER = """
import sys, time
from torch._C._distributed_c10d import TCPStore
from outsize.distributed.watch import Watch

rank, port, ending = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
meeting = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
watch = Watch(meeting, rank, 2, patience=60)
if rank == 0:
    meeting.wait(["over"])
    print("met", flush=True)
    time.sleep(4)  # as in an exchange that nobody answers
    print("still there")
else:
    time.sleep(2)  # a look or two
    if ending == "leaves":
        watch.close()
    meeting.set("over", "")
    time.sleep(60 * (ending == "killed"))
"""


@pytest.mark.parametrize("ending", ["killed", "leaves"])
def test_whose_process_has_ended_is_lost_unless_it_left(ending: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    first, other = (
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), ending],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    )  # fmt: skip
    try:
        assert first.stdout is not None and first.stdout.readline() == "met\n"
        if ending == "killed":
            other.kill()
            assert other.wait(60) == -signal.SIGKILL
        else:
            assert other.wait(60) == 0, other.communicate()
        said, wrong = first.communicate(timeout=60)
    finally:
        first.kill()
        other.kill()
    if ending == "killed":
        assert first.returncode == 1 and "Worker 1 is lost, and worker 0 stops: its process has ended." in wrong
    else:
        assert first.returncode == 0 and said == "still there\n"


@pytest.mark.parametrize("seen", ["its process", "the exchange"])
def test_who_has_not_noticed_yet_is_not_taken_for_lost(seen: str) -> None:
    """Worker 0 lives and computes: it says nothing in the second in which worker 2 looks for who is lost, as 1 does."""
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = Watch(meeting, 2, 3, patience=60)
    watch._closing.set()  # of what its thread would find this is not about
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        if seen == "its process":
            meeting.set("process 1", f"{_machine()} {victim.pid}")
            assert not watch._has_died(1)
    finally:
        victim.kill()
        victim.wait(60)
    problem = watch.lost(1 if seen == "the exchange" else None, RuntimeError("Connection closed by peer"))
    assert str(problem).startswith("Worker 1 is lost, and worker 2 stops: Connection closed by peer")
