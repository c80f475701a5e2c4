"""Which heap of the C library a thread allocates from, in a process as the command line sets it up."""

import subprocess
import sys

import pytest

from outsize.machine.allocator import Heap

pytestmark = pytest.mark.skipif(Heap.find() is None, reason="this C library has one heap for all")

COMPUTING_AND_OTHERS = """
import threading
from outsize.machine.allocator import limit_heaps
limit_heaps()
from outsize.machine.threads import in_first_heap, start_computing

def many(start):
    found, release, threads = [], threading.Event(), []
    for number in range(5):
        asked = threading.Event()
        def work():
            found.append(in_first_heap())
            asked.set()
            release.wait()
        threads.append(start(work))
        asked.wait()
    release.set()
    for thread in threads:
        thread.join()
    return found

def ordinary(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread

assert in_first_heap()
others = many(ordinary)
computing = many(lambda work: start_computing(work, "computing"))
print(others, computing, threading.active_count())
"""


def test_threads_that_compute_share_the_first_heap_and_others_have_their_own() -> None:
    """However many threads there were before, and nobody who was tried is left."""
    found = subprocess.run([sys.executable, "-c", COMPUTING_AND_OTHERS], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == f"{[False] * 5} {[True] * 5} 1"
