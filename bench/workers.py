"""One, two and four workers on this machine: bytes on the wire, memory, disk, time; and two with a slow link in between.

python bench/workers.py --page docs/workers.md      some 8 minutes; the slow link needs root, and iproute2
python bench/workers.py --only 2 slow               some of the rows

The workers share this machine's processor and disk, so that times say what exchanging costs and not what workers gain.
Each has one thread. Over the slow link each is in a network namespace of its own, and what it sends is limited by `tc`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapes import SHAPES, stack
from streamed import prepare

SHAPE = stack(4)  # 55 M parameters
STEPS, SKIPPED = 6, 2
LINK = 250  # Mbit/s
OPTIONS = "--memory 3GiB --sequence-length 128 --accumulate 4 --commit-every 2 --activations recompute --json"
BEGIN, END = "<!-- begin: written by bench/workers.py -->", "<!-- end -->"
HEAD = (
    "| workers | link | `--zero` | s/step | of it exchanging | MiB received, a step | by the formula | peak MiB | disk MiB |",
    "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
)
Prefixes = list[list[str]]
"""For each worker, what stands before its command."""


@dataclass(frozen=True)
class Row:
    workers: int
    zero: int
    slow: bool = False

    @property
    def name(self) -> str:
        return "slow" if self.slow else str(self.workers)


ROWS = (Row(1, 3), Row(2, 2), Row(2, 3), Row(4, 3), Row(2, 2, slow=True), Row(2, 3, slow=True))


@contextmanager
def slow_link(workers: int) -> Iterator[Prefixes]:
    """A namespace for each worker, all on one bridge."""
    names = [f"outsize{rank}" for rank in range(workers)]
    _ip("link add outsize-br type bridge")
    try:
        _ip("link set outsize-br up")
        for rank, name in enumerate(names):
            _ip(f"netns add {name}")
            _ip(f"link add osz{rank} type veth peer name eth0 netns {name}")
            _ip(f"link set osz{rank} master outsize-br up")
            for line in (f"addr add 10.77.0.{rank + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(f"-n {name} {line}")
            limit = f"tc qdisc add dev eth0 root tbf rate {LINK}mbit burst 256kb latency 100ms"
            subprocess.run(["ip", "netns", "exec", name, *limit.split()], check=True)
        yield [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)
        _ip("link delete outsize-br")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def measure(row: Row, place: Path) -> dict[str, Any]:
    """Medians of the warm steps, of the worker that has most; and what the state of each takes on disk."""
    out = place / "workers"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command = [sys.executable, "-m", "outsize", "train", "--model", f"{place}/model", "--data", f"{place}/text.txt"]
    command += ["--out", str(out / "run"), "--steps", str(STEPS), "--zero", str(row.zero), *OPTIONS.split()]
    try:
        with slow_link(row.workers) if row.slow else nullcontext([[]] * row.workers) as prefixes:
            _run(command, out, prefixes, "10.77.0.1" if row.slow else "127.0.0.1")
        return _found(out / "run", row.workers)
    finally:
        shutil.rmtree(out)


def _run(command: list[str], folder: Path, prefixes: Prefixes, address: str) -> None:
    """Start the workers as a launcher would."""
    size = len(prefixes)
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": 29517}
    running = []
    for rank, prefix in enumerate(prefixes):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank} if size > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in own.items()}}
        with open(folder / f"log-{rank}", "w") as log:
            running.append(subprocess.Popen([*prefix, *command], env=environment, stdout=log, stderr=log))
    for rank, process in enumerate(running):
        if process.wait():
            sys.exit(f"worker {rank} failed: {(folder / f'log-{rank}').read_text()[-2000:]}")


def _found(run: Path, workers: int) -> dict[str, Any]:
    own = [
        run / "metrics.jsonl",
        *(run / f"state/worker-{rank}-of-{workers}/metrics.jsonl" for rank in range(1, workers)),
    ]
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in own]
    names = ("seconds", "wire_wait_seconds", "wire_bytes", "host_peak_bytes")
    medians = [
        {name: statistics.median(line.get(name, 0) for line in each[SKIPPED:]) for name in names} for each in lines
    ]
    found: dict[str, Any] = {name: max(each[name] for each in medians) for name in names}
    found["loss"] = lines[0][-1]["loss"]
    found["disk_bytes"] = [path.stat().st_size for path in sorted((run / "state").rglob("blocks"))]
    return found


def formula(row: Row, place: Path) -> int:
    """Bytes that a worker receives in a step: weights of up to 65,536 elements and tables are gathered once; of the rest at
    level 3 for forward and backward. Each worker adds up its micro-batches in fp32 when it has several."""
    from safetensors import safe_open

    with safe_open(place / "model" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    others = (row.workers - 1) / row.workers
    total = 0.0
    for name, shape in shapes.items():
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        split = row.zero == 3 and elements > 65536 and "embed" not in name and "lm_head" not in name
        total += others * elements * (2 * (2 if split else 1) + (4 if row.workers < 4 else 2))
    return int(total)


def line(row: Row, found: dict[str, Any], place: Path) -> str:
    disks = ", ".join(f"{nbytes / 2**20:,.0f}" for nbytes in found["disk_bytes"])
    received = f"{found['wire_bytes'] / 2**20:,.2f} | {formula(row, place) / 2**20:,.2f}" if row.workers > 1 else "|"
    link = f"{LINK} Mbit/s" if row.slow else "loopback" if row.workers > 1 else ""
    return (
        f"| {row.workers} | {link} | {row.zero if row.workers > 1 else ''} | {found['seconds']:.2f} | "
        f"{found['wire_wait_seconds']:.2f} | {received} | {found['host_peak_bytes'] / 2**20:,.0f} | {disks} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE.name)
    parser.add_argument("--only", nargs="+", choices=sorted({row.name for row in ROWS}))
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--page", type=Path, help="where to put the table, between its markers")
    given = parser.parse_args()
    place = given.folder.resolve() / given.shape.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    prepare(str(place), given.shape)
    lines = list(HEAD)
    print(*lines, sep="\n", flush=True)
    for row in [row for row in ROWS if given.only is None or row.name in given.only]:
        lines.append(line(row, measure(row, place), place))
        print(lines[-1], flush=True)
    if given.page:
        before, rest = given.page.read_text().split(BEGIN)
        table = "\n".join(lines)
        given.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
