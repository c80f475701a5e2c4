"""Weak scaling, as planned: Llama-shaped models on 8 x H200 and on nodes of 8, the same batch on each device: `make scaling`.

No GPU was at hand: each row is a plan for `outsize/machine/described/h200-x8-64.toml`, played under the simulated clock.
Plans are kept in scaling.json in the folder and not made again; docs/foresight.md gets the table, docs/scaling.png the
picture.

python bench/scaling.py --minutes 7         a portion: after so long no further plan begins
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from time import monotonic
from typing import Any

from outsize.api import planning
from outsize.machine.find import find_machine
from outsize.plan import Plan

HERE = Path(__file__).parent
BEGIN, END = "<!-- begin: written by bench/scaling.py -->", "<!-- end: written by bench/scaling.py -->"
MACHINE = "h200-x8-64"
TOKENS = 4096  # in a sequence, of which each device has one in a step
SHAPES = {
    "8 B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70 B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""As Llama 3's config.json has them, with 8 heads of keys and values and a vocabulary of 128,256."""
SIZES = [(1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8), (16, 8), (64, 8)]
"""(nodes, devices of each)."""


@dataclass(frozen=True)
class Row:
    """What a plan says of one device, and how long it took to be made. Bytes of a step."""

    model: str
    nodes: int
    devices: int
    seconds: float
    tokens_per_second: float
    peer: int
    remote: int
    host: int
    disk: int
    device_peak: int
    host_peak: int
    activations: str
    planned_in: float

    @classmethod
    def of(cls, model: str, nodes: int, each: int, plan: Plan, planned_in: float) -> Row:
        predicted, devices = plan.predicted, nodes * each
        assert predicted is not None and predicted.seconds_per_step and predicted.tokens_per_second

        def between(*ends: str) -> int:
            return sum(nbytes for source, target, _, nbytes in predicted.moved if {source, target} == set(ends))

        ways = {how.saved for _, how in plan.activations}
        return cls(
            *(model, nodes, devices, predicted.seconds_per_step, TOKENS / predicted.seconds_per_step),
            *(between("device", "peer"), between("device", "remote"), between("device", "host")),
            predicted.bytes_read + predicted.bytes_written,
            *(predicted.device_peak_bytes, predicted.host_peak_bytes),
            "kept" if ways == {"all"} else "attention kept" if ways == {"attention"} else "recomputed",
            planned_in,
        )


def write_model(model: str, folder: Path) -> Path:
    """A folder with the model's config.json, and no weights."""
    from transformers import AutoConfig

    more: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
    config = AutoConfig.for_model("llama", **SHAPES[model], **more, max_position_embeddings=8192, rope_theta=500000.0)
    config.architectures = ["LlamaForCausalLM"]
    place = folder / model.replace(" ", "")
    config.save_pretrained(place)
    return place


def plan(model: str, nodes: int, each: int, folder: Path) -> Row:
    machine = find_machine(MACHINE)
    machine = replace(machine, nodes=replace(machine.nodes, count=nodes))
    workers, started = nodes * each, monotonic()
    made = planning(
        str(write_model(model, folder)), machine=machine, workers=workers, batch_size=workers, sequence_length=TOKENS
    )
    return Row.of(model, nodes, each, made(None), monotonic() - started)


def table(rows: Sequence[Row]) -> str:
    head = (
        "| model | devices | s/step | tokens/s a device | of one node's | from and to peers | other nodes | host's memory "
        "| disk | device's peak | host's, a worker | activations | planned in |"
    )
    return "\n".join([head, "|---|" + "---:|" * 10 + "---|---:|", *(_line(row, rows) for row in rows)])


def _line(row: Row, rows: Sequence[Row]) -> str:
    base = next((one for one in rows if one.model == row.model and (one.nodes, one.devices) == (1, 8)), None)
    devices = f"{row.nodes} x 8" if row.nodes > 1 else str(row.devices)
    cells = [
        *(row.model, devices, f"{row.seconds:.2f}", f"{row.tokens_per_second:,.0f}"),
        "" if base is None else f"{row.tokens_per_second / base.tokens_per_second:.0%}",
        *(f"{nbytes / 1e9:,.1f} GB" for nbytes in (row.peer, row.remote, row.host, row.disk)),
        *(f"{nbytes / 2**30:,.1f} GiB" for nbytes in (row.device_peak, row.host_peak)),
        row.activations,
        f"{row.planned_in:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Tokens a second of each device against how many there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (model, colour), marker in zip((("8 B", "#2a6f97"), ("70 B", "#c8553d")), "os", strict=True):
        own = [row for row in rows if row.model == model]
        rates = [row.tokens_per_second for row in own]
        axes.plot([row.devices for row in own], rates, marker=marker, color=colour, label=f"Llama-shaped {model}")
        for row in own:
            axes.annotate(
                f"{row.tokens_per_second:,.0f}",
                (row.devices, row.tokens_per_second),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=colour,
            )
    axes.axvline(8, color="grey", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate("one node", (8, 0), xytext=(4, 4), textcoords="offset points", fontsize=8, color="grey")
    axes.set_xscale("log", base=2)
    axes.set_xticks(devices := sorted({row.devices for row in rows}), [str(count) for count in devices])
    axes.set_ylim(bottom=0)
    axes.margins(y=0.15)
    axes.set_xlabel("H200 devices, each with one sequence of 4096 tokens in a step")
    axes.set_ylabel("tokens/s of each device")
    axes.set_title("Weak scaling, as planned (not measured)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="after so long no further plan begins")
    parser.add_argument("--folder", type=Path, default=Path("build/scaling"), help="where models and plans are kept")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept, until = arguments.folder / "scaling.json", monotonic() + 60 * arguments.minutes
    known = json.loads(kept.read_text()) if kept.exists() else {}
    for model in SHAPES:
        for nodes, each in SIZES:
            name = f"{model}, {nodes} x {each}"
            if name not in known and monotonic() < until:
                row = plan(model, nodes, each, arguments.folder)
                known[name] = vars(row)
                kept.write_text(json.dumps(known))
                print(name, row, flush=True)
    rows = [Row(**found) for model in SHAPES for n, m in SIZES if (found := known.get(f"{model}, {n} x {m}"))]
    page = arguments.docs / "foresight.md"
    before, rest = page.read_text().split(BEGIN)
    done = f"{len(rows)} of {len(SHAPES) * len(SIZES)} plans are done"
    head = f"`python bench/scaling.py`, {date.today()}, plans for `{MACHINE}`. {done}.\n\n"
    page.write_text(f"{before}{BEGIN}\n{head}{table(rows)}\n{END}{rest.split(END)[1]}")
    draw(rows, arguments.docs / "scaling.png")


if __name__ == "__main__":
    main()
