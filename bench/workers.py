"""One, two and four workers on this machine, and with a slow link between them: bytes on the wire, memory, disk, and time
beside the plan's.

python bench/workers.py --page docs/workers.md                                  all that is not yet in --results
python bench/workers.py --only 4-nodes-2 --results build/bench/workers.json     some rows, to go on with another time

The workers share this machine's processor and disk, so that times say what exchanging costs and not what workers gain. Each
has one thread. A slow link needs root, and iproute2: each node is a network namespace of its own, and what it sends is
limited by `tc`. A row takes a minute or two."""

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
SPLIT_FROM = 65536  # elements; smaller weights stay whole on every worker, and so do tables
OPTIONS = "--memory 3GiB --sequence-length 128 --accumulate 4 --commit-every 2 --activations recompute --json"
BEGIN, END = "<!-- begin: written by bench/workers.py -->", "<!-- end -->"
HEAD = (
    "| workers | nodes | told | `--zero` | s/step | planned | exchanging | planned | MiB from the node, a step | "
    "MiB from others | formula, both | peak MiB | disk MiB |",
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
Prefixes = list[list[str]]
"""For each worker, what stands before its command."""


@dataclass(frozen=True)
class Row:
    """So many workers, equally many on each of `nodes`, of which each sends no more than LINK; they are `told` to be on so
    many."""

    workers: int
    zero: int = 3
    nodes: int = 1
    told: int = 1

    @property
    def name(self) -> str:
        nodes = f"-nodes-{self.nodes}" if self.nodes > 1 else ""
        told = "-flat" if self.told > self.nodes else ""
        return f"{self.workers}{nodes}{told}" + ("-zero-2" if self.zero == 2 else "")


ROWS = (
    Row(1),
    Row(2, zero=2),
    Row(2),
    Row(4),
    Row(2, zero=2, nodes=2, told=2),
    Row(2, nodes=2, told=2),
    Row(4, nodes=2, told=4),
    Row(4, nodes=2, told=2),
)


@contextmanager
def slow_link(row: Row) -> Iterator[Prefixes]:
    """A namespace for each node, all on one bridge."""
    names = [f"outsize{node}" for node in range(row.nodes)]
    _ip("link add outsize-br type bridge")
    try:
        _ip("link set outsize-br up")
        for node, name in enumerate(names):
            _ip(f"netns add {name}")
            _ip(f"link add osz{node} type veth peer name eth0 netns {name}")
            _ip(f"link set osz{node} master outsize-br up")
            for line in (f"addr add 10.77.0.{node + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(f"-n {name} {line}")
            limit = f"tc qdisc add dev eth0 root tbf rate {LINK}mbit burst 256kb latency 100ms"
            subprocess.run(["ip", "netns", "exec", name, *limit.split()], check=True)
        each = row.workers // row.nodes
        yield [["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"] for name in names for _ in range(each)]
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
        with slow_link(row) if row.nodes > 1 else nullcontext([[]] * row.workers) as prefixes:
            _run(command, out, prefixes, row)
        return _found(out / "run", row)
    finally:
        shutil.rmtree(out)


def _run(command: list[str], folder: Path, prefixes: Prefixes, row: Row) -> None:
    """Start the workers as a launcher would."""
    here = row.workers // row.told
    address = "10.77.0.1" if row.nodes > 1 else "127.0.0.1"
    common = {"WORLD_SIZE": row.workers, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": address, "MASTER_PORT": 29517}
    running = []
    for rank, prefix in enumerate(prefixes):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank % here} if row.workers > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in own.items()}}
        with open(folder / f"log-{rank}", "w") as log:
            running.append(subprocess.Popen([*prefix, *command], env=environment, stdout=log, stderr=log))
    for rank, process in enumerate(running):
        if process.wait():
            sys.exit(f"worker {rank} failed: {(folder / f'log-{rank}').read_text()[-2000:]}")


def _found(run: Path, row: Row) -> dict[str, Any]:
    own = [
        run / "metrics.jsonl",
        *(run / f"state/worker-{rank}-of-{row.workers}/metrics.jsonl" for rank in range(1, row.workers)),
    ]
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in own]
    names = ("seconds", "wire_wait_seconds", "host_peak_bytes")
    medians = [
        {name: statistics.median(line.get(name, 0) for line in each[SKIPPED:]) for name in names} for each in lines
    ]
    found: dict[str, Any] = {name: max(each[name] for each in medians) for name in names}
    report = json.loads((run / "report.json").read_text())
    found["planned"] = {name: report["planned"][name] or 0 for name in ("seconds_per_step", "wire_wait_seconds")}
    found["moved"] = {
        tier: sum(report["moved"].get(f"from {tier}", {}).get(kind, 0) for kind in ("weight", "gradient"))
        for tier in ("peer", "remote")
    }
    found["loss"] = lines[0][-1]["loss"]
    found["wire"] = report["facts"].get("wire", "")
    found["disk_bytes"] = [path.stat().st_size for path in sorted((run / "state").rglob("blocks"))]
    return found


def formula(row: Row, place: Path) -> tuple[int, int]:
    """Bytes that the first worker receives in a step from its node, and from others. Of N nodes with H workers each: within
    the node (H-1)/H of the bytes, between nodes (N-1)/N of one H-th. Split weights are gathered for forward and backward,
    within the node if it has a copy; all others once, after their update, and the parts of copies too. Workers with several
    micro-batches add them up in fp32, an embedding its rows, and so does the node before its sum goes on."""
    from safetensors import safe_open

    with safe_open(place / "model" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    each, copies = row.workers // row.told, row.told > 1 and row.workers > row.told
    near, far = (each - 1) / each, (row.told - 1) / row.told / each
    within = between = 0.0
    for name, shape in shapes.items():
        elements = shape[0] * (shape[1] if len(shape) > 1 else 1)
        first = 4 if row.workers < 4 or "embed" in name else 2
        split = row.zero == 3 and elements > SPLIT_FROM and "embed" not in name and "lm_head" not in name
        within += near * elements * (2 * (2 if split else 1) + first)
        between += far * elements * (2 * (2 if split and not copies else 1) + (4 if each > 1 else first))
    return int(within), int(between)


def line(row: Row, found: dict[str, Any], place: Path) -> str:
    disks = ", ".join(f"{nbytes / 2**20:,.0f}" for nbytes in found["disk_bytes"])
    planned, moved = found["planned"], found["moved"]
    mib = [f"{nbytes / 2**20:,.2f}" for nbytes in (moved["peer"], moved["remote"], *formula(row, place))]
    cells = [
        row.workers, row.nodes, row.told, row.zero if row.workers > 1 else "",
        f"{found['seconds']:.2f}", f"{planned['seconds_per_step']:.2f}",
        f"{found['wire_wait_seconds']:.2f}", f"{planned['wire_wait_seconds']:.2f}",
        mib[0], mib[1], f"{mib[2]}, {mib[3]}", f"{found['host_peak_bytes'] / 2**20:,.0f}", disks,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE.name)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--results", type=Path, help="where measured rows are kept, not to be measured again")
    parser.add_argument("--page", type=Path, help="where to put the table of all rows, between its markers")
    given = parser.parse_args()
    place = given.folder.resolve() / given.shape.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    prepare(str(place), given.shape)
    results = given.results or place / "workers.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    for row in ROWS:
        if row.name not in known and (given.only is None or row.name in given.only):
            known[row.name] = measure(row, place)
            results.write_text(json.dumps(known, indent=1))
    table = "\n".join([*HEAD, *(line(row, known[row.name], place) for row in ROWS if row.name in known)])
    print(table)
    if given.page:
        before, rest = given.page.read_text().split(BEGIN)
        given.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
