"""Several workers on this machine: torch's elastic launcher starts this very command once for each."""

from __future__ import annotations

import logging
import os
import signal
import sys

from outsize.errors import RunError

RESTARTS = 3  # after a worker was killed
CONTINUES = "The same command continues at the last step that all have committed."


def is_worker() -> bool:
    """A launcher has started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def launch(workers: int, restarts: int = RESTARTS, afterwards: str = CONTINUES, ending: int = 5) -> None:
    """Run this process's own command line as so many workers, and return when all are done. When one is killed, all begin
    again, so many times. Workers who are told to end have `ending` seconds for that.

    Raises RunError naming a worker that is killed once too often, and what to do `afterwards`; ends with the exit code of
    one that has said itself what is wrong."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is said by us, once
    signal.signal(signal.SIGINT, lambda number, frame: None)  # Ctrl-C is for the workers, who commit their step
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    for left in reversed(range(restarts + 1)):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id="outsize",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            shutdown_timeout=ending,
            signals_to_handle="SIGTERM,SIGHUP,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # or a folder would stay behind
        )
        try:
            elastic_launch(config, sys.executable)("-m", "outsize", *sys.argv[1:])
            return
        except SignalException as told:
            sys.exit(128 + told.sigval)  # the workers have ended already, each with its message
        except ChildFailedError as failed:
            killed = _killed(failed, left, afterwards)
            print(f"outsize: {killed} All begin again.", file=sys.stderr, flush=True)


def _killed(failed: Exception, left: int, afterwards: str) -> str:
    """What to say of the worker that was killed, if another attempt is left."""
    codes: dict[int, int] = {rank: failure.exitcode for rank, failure in failed.failures.items()}  # pyright: ignore
    # Signals are negative; SIGTERM is the launcher's own, to the others when one has failed, which may exit with 143.
    rank = next((rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM), None)
    if rank is None:
        sys.exit(min([code for code in codes.values() if code > 0], default=1))
    said = f"Worker {rank} was ended by {signal.Signals(-codes[rank]).name}."
    if not left:
        raise RunError(f"{said} {afterwards}") from failed
    return said
