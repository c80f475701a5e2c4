"""One, two and four workers on this machine: bytes on the wire, memory, time; and with a slow network in between.

python bench/workers.py --model MODEL --data TEXT                          over this machine's loopback
python bench/workers.py --model MODEL --data TEXT --link 200mbit --delay 1ms    each worker in a network namespace (root)

The workers share this machine's processor and disk, so that times say what exchanging costs and not what workers gain."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = ("loss", "seconds", "wire_wait_seconds", "wire_bytes", "bytes_read", "bytes_written", "host_peak_bytes")


def run(command: list[str], folder: Path, workers: int, inside: list[list[str]], address: str) -> None:
    """Start the workers as a launcher would, each behind its prefix of a command line."""
    common = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": address, "MASTER_PORT": 29517}
    running = []
    for rank in range(workers):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank} if workers > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in own.items()}}
        log = open(folder / f"log-{rank}", "w")  # noqa: SIM115 - the process has it
        running.append(subprocess.Popen([*inside[rank], *command], env=environment, stdout=log, stderr=log))
    for rank, process in enumerate(running):
        if process.wait():
            sys.exit(f"worker {rank} failed: {(folder / f'log-{rank}').read_text()[-2000:]}")


@contextmanager
def network(workers: int, link: str, delay: str) -> Iterator[list[list[str]]]:
    """A namespace for each worker, all on one bridge; what each sends is limited to `link` and comes `delay` later."""
    names = [f"outsize{rank}" for rank in range(workers)]
    ip("link", "add", "outsize-br", "type", "bridge")
    try:
        ip("link", "set", "outsize-br", "up")
        for rank, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"osz{rank}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"osz{rank}", "master", "outsize-br", "up")
            for line in (f"addr add 10.77.0.{rank + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                ip("-n", name, *line.split())
            shape = [
                "tc",
                "qdisc",
                "add",
                "dev",
                "eth0",
                "root",
                "netem",
                "rate",
                link,
                "delay",
                delay,
                "limit",
                "100000",
            ]
            subprocess.run(["ip", "netns", "exec", name, *shape], check=True)
        yield [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)
        ip("link", "delete", "outsize-br")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def measured(out: Path, workers: int) -> dict[str, Any]:
    """Medians of the warm steps of the first worker, and what the state of each takes on disk."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
    found = {name: statistics.median(line.get(name, 0) for line in lines) for name in COLUMNS}
    found["loss"] = lines[-1]["loss"]
    found["disk_bytes"] = [path.stat().st_size for path in sorted((out / "state").rglob("blocks"))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--steps", default="8")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--zero", nargs="+", default=["2", "3"])
    parser.add_argument("--link")
    parser.add_argument("--delay", default="0ms")
    given = parser.parse_args()
    print("workers | zero | s a step | of it waiting | MiB from others | MiB peak | MiB on each disk | loss")
    for workers in given.workers:
        for zero in given.zero if workers > 1 else given.zero[-1:]:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "run"
                command = [sys.executable, "-m", "outsize", "train", "--model", given.model, "--data", given.data]
                command += [
                    "--memory",
                    given.memory,
                    "--steps",
                    given.steps,
                    "--out",
                    str(out),
                    "--zero",
                    zero,
                    "--json",
                ]
                command += ["--sequence-length", "128", "--accumulate", "4", "--commit-every", "4"]
                if given.link is None or workers == 1:
                    run(command, Path(scratch), workers, [[]] * workers, "127.0.0.1")
                else:
                    with network(workers, given.link, given.delay) as inside:
                        run(command, Path(scratch), workers, inside, "10.77.0.1")
                said = measured(out, workers)
                shutil.rmtree(out)
            disks = ", ".join(f"{nbytes / 2**20:.1f}" for nbytes in said["disk_bytes"])
            print(
                f"{workers} | {zero} | {said['seconds']:.3f} | {said['wire_wait_seconds']:.3f} | "
                f"{said['wire_bytes'] / 2**20:.2f} | {said['host_peak_bytes'] / 2**20:.0f} | {disks} | {said['loss']:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
