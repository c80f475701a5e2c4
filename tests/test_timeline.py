"""A step on a time axis: spans from what was noted, a picture and a trace of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outsize.errors import StorageError
from outsize.plan import Plan, Predicted
from outsize.planner.pictures import draw_comparison, draw_step, write_trace
from outsize.train.timeline import timeline, without

STEP = (("compute", 0.0, 2.0), ("read", 0.5, 1.0), ("update", 2.0, 2.5))


def foretold(memory: int) -> Plan:
    predicted = Predicted(memory, 0, 0, 0, 0, 2.5, 100.0, 2.0, 0.5, memory=(("all", memory),), timeline=STEP)
    return Plan("mixed", 1 << 20, memory_bytes=memory, predicted=predicted)


def test_a_step_waits_updates_or_computes() -> None:
    noted = [
        ("update", 9.0, 10.5),
        ("waiting", 11.0, 12.0),
        ("update", 11.5, 13.0),
        ("read", 10.0, 11.5),
        ("read", 1, 2),
    ]
    found = timeline(noted, 10.0, 15.0)
    lanes = {lane: [span[1:] for span in found if span[0] == lane] for lane, _, _ in found}
    assert lanes == {
        "read": [(0.0, 1.5)],
        "waiting": [(1.0, 2.0)],
        "update": [(0.0, 0.5), (2.0, 3.0)],
        "compute": [(0.5, 1.0), (3.0, 5.0)],
    }
    assert sum(end - begin for lane, begin, end in found if lane != "read") == 5.0


def test_what_lies_in_others_is_taken_out() -> None:
    assert without([(0.0, 10.0)], [(8.0, 12.0), (1.0, 2.0), (1.5, 3.0)]) == [(0.0, 1.0), (3.0, 8.0)]
    assert without([(1.0, 2.0), (4.0, 5.0)], [(0.0, 4.5)]) == [(4.5, 5.0)]
    assert without([(1.0, 2.0)], []) == [(1.0, 2.0)]


def test_a_trace_says_what_happened_when_in_microseconds(tmp_path: Path) -> None:
    write_trace({"predicted": STEP, "measured": STEP[:1]}, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [(e["pid"], threads[e["pid"], e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        (1, "compute", 0.0, 2e6),
        (1, "read", 0.5e6, 0.5e6),
        (1, "update", 2e6, 0.5e6),
        (2, "compute", 0.0, 2e6),
    ]
    with pytest.raises(StorageError, match=r"trace\.json cannot be written"):
        write_trace({}, tmp_path / "missing" / "trace.json")


def test_pictures_are_drawn(tmp_path: Path) -> None:
    plans = [foretold(size << 30) for size in (1, 2)]
    draw_step({"predicted": STEP, "measured": ()}, plans[0], tmp_path / "step.png")
    draw_comparison(plans, tmp_path / "sizes.png")
    for name in ("step.png", "sizes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
