"""Several workers on this machine: torch's elastic launcher starts this very command once for each."""

from __future__ import annotations

import logging
import os
import signal
import sys

from outsize.errors import RunError


def is_worker() -> bool:
    """A launcher has started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def launch(workers: int) -> None:
    """Run this process's own command line as so many workers, and return when all are done.

    Raises RunError naming the worker that failed first."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is said by us, once
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id="outsize",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=5,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "outsize", *sys.argv[1:])
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        raise RunError(_say(rank, failure.exitcode)) from failed


def _say(rank: int, code: int) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"Worker {rank} {how}. The same command continues at the last step that all have committed."
