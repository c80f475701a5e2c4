"""What others have published of large models on small machines, beside plans for the same: python bench/published.py

Each model is planned on the machine described in `outsize/machine/described/`, its step played under the simulated clock:
with what forward leaves for backward recomputed, and moved to the host's memory; and of the weights whose state lives
there as many updated there as make a step the fastest. Plans are kept in published.json in the
folder and not made again; docs/foresight.md gets the table.

python bench/published.py --minutes 7         a portion: after so long no further plan begins
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

from outsize.api import planning
from outsize.errors import BudgetError
from outsize.machine.find import find_machine
from outsize.machine.machine import Machine, Rate

HERE = Path(__file__).parent
BEGIN, END = "<!-- begin: written by bench/published.py -->", "<!-- end: written by bench/published.py -->"
VOCABULARY = 51200
WAYS = {"recompute": "recomputed", "move": "moved"}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """A GPT-2 of `layers` x `hidden`, `batch` x `tokens` on each device; `published` is what the paper says, and `seconds`
    a step of that if a parameter and token count 6 FLOP."""

    who: str
    machine: str
    layers: int
    hidden: int
    batch: int
    tokens: int
    published: str
    seconds: float | None = None

    @property
    def parameters(self) -> int:
        """Without embeddings."""
        return 12 * self.layers * self.hidden**2

    @property
    def name(self) -> str:
        return f"{self.who}, {self.parameters / 1e9:,.0f} B"


ROWS = [
    Row("ZeRO-Offload", "v100-32gb", 50, 4096, 10, 1024, "15.5 s (20.6)", 15.5),
    Row("ZeRO-Offload", "v100-32gb", 65, 4096, 4, 1024, "13 B is the largest"),
    Row("ZeRO-Infinity", "dgx-2", 50, 4096, 8, 1024, "below 12.4 s (16.5)", 12.4),
    Row("ZeRO-Infinity", "dgx-2", 125, 8192, 24, 1024, "below 371 s (495)", 371.0),
    Row("ZeRO-Infinity", "dgx-2", 128, 25600, 7, 1024, "1 T is the largest"),
    Row("Fuyou", "rtx-4090-12-ssd", 40, 5120, 32, 1024, "16.4 s (21.8)", 16.4),
    Row("Fuyou", "rtx-4090-12-ssd", 96, 12288, 8, 1024, "175 B is the largest"),
]


def in_half_precision(machine: Machine) -> Machine:
    """With the better of both 16-bit rates for bf16: a V100 trains in fp16, which moves the same bytes."""

    def better(rates: dict[str, Rate]) -> dict[str, Rate]:
        return rates | {"bf16": max(rates["bf16"], rates.get("fp16", rates["bf16"]), key=lambda rate: rate.best)}

    processors = (replace(each, matmul=tuple(better(dict(each.matmul)).items())) for each in machine.processors)
    return replace(machine, processors=tuple(processors))


def write_model(row: Row, folder: Path) -> Path:
    """A folder with the model's config.json, and no weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "gpt2",
        n_layer=row.layers,
        n_embd=row.hidden,
        n_head=row.hidden // 128,
        n_positions=row.tokens,
        vocab_size=VOCABULARY,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function in one kernel, as the papers have it
        dtype="bfloat16",
    )
    config.architectures = ["GPT2LMHeadModel"]
    place = folder / f"{row.layers}x{row.hidden}"
    config.save_pretrained(place)
    return place


def plan(row: Row, way: str, folder: Path) -> dict[str, Any]:
    """What the plan foretells of each device, or what it lacks; bytes and seconds."""
    machine, started = in_half_precision(find_machine(row.machine)), monotonic()
    workers = machine.compute.count
    made = planning(
        str(write_model(row, folder)),
        machine=machine,
        workers=workers,
        batch_size=row.batch * workers,
        sequence_length=row.tokens,
        activations=way,
    )
    try:
        chosen = made(None)
    except BudgetError as problem:
        return {"refused": str(problem), "planned_in": monotonic() - started}
    found = chosen.predicted
    assert found is not None
    keys = ("seconds_per_step", "compute_seconds", "update_seconds", "read_wait_seconds", "write_wait_seconds")
    keys += ("wire_wait_seconds", "device_peak_bytes", "host_peak_bytes", "disk_bytes")
    updates = {"host_updates": len(chosen.host_updates), "host_states": len(chosen.host_states)}
    return (
        {key: getattr(found, key) for key in keys} | updates | {"workers": workers, "planned_in": monotonic() - started}
    )


def line(row: Row, way: str, found: dict[str, Any]) -> str:
    what = [row.who, f"`{row.machine}`", f"{row.parameters / 1e9:,.0f} B, {row.batch} x {row.tokens}", WAYS[way]]
    if "refused" in found:
        cells = ["refused: " + found["refused"].split(": ")[0], *[""] * 7, row.published, ""]
    else:
        waits = sum(found[f"{cause}_wait_seconds"] for cause in ("read", "write", "wire"))
        times = (found["seconds_per_step"], found["compute_seconds"], found["update_seconds"], waits)
        sizes = (
            found["device_peak_bytes"],
            found["host_peak_bytes"] * found["workers"],
            found["disk_bytes"] * found["workers"],
        )
        ratio = f"{found['seconds_per_step'] / row.seconds:.2f}" if row.seconds else ""
        cells = [
            *(f"{seconds:.1f}" for seconds in times),
            f"{found['host_updates']} of {found['host_states']}",
            *(f"{nbytes / GIB:,.0f} GiB" for nbytes in sizes),
            row.published,
            ratio,
        ]
    return "| " + " | ".join([*what, *cells, f"{found['planned_in']:.0f} s"]) + " |"


def table(known: dict[str, dict[str, Any]]) -> str:
    head = (
        "| who | machine | model, batch x sequence of a device | activations | s/step | compute | update | waiting "
        "| updated on the host | device's peak | host | disk | published | planned / published | planned in |"
    )
    done = ((row, way, known.get(f"{row.name}, {way}")) for row in ROWS for way in WAYS)
    lines: Iterable[str] = (line(row, way, found) for row, way, found in done if found is not None)
    return "\n".join([head, "|---|---|---|---|" + "---:|" * 8 + "---|---:|---:|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="after so long no further plan begins")
    parser.add_argument("--folder", type=Path, default=Path("build/published"), help="where models and plans are kept")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept, until = arguments.folder / "published.json", monotonic() + 60 * arguments.minutes
    known = json.loads(kept.read_text()) if kept.exists() else {}
    for row in ROWS:
        for way in WAYS:
            name = f"{row.name}, {way}"
            if name not in known and monotonic() < until:
                known[name] = plan(row, way, arguments.folder)
                kept.write_text(json.dumps(known))
                print(line(row, way, known[name]), flush=True)
    page = arguments.docs / "foresight.md"
    before, rest = page.read_text().split(BEGIN)
    head = f"`python bench/published.py`, {date.today()}. {len(known)} of {len(ROWS) * len(WAYS)} plans are done.\n\n"
    page.write_text(f"{before}{BEGIN}\n{head}{table(known)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
