"""What a run writes: lines that survive a kill, a report that adds up, pictures that show it."""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from PIL import Image

from outsize.errors import RunError, StorageError
from outsize.train import pictures
from outsize.train.report import (
    Metrics,
    StepLine,
    format_duration,
    held_by_tier,
    measured,
    moved_a_step,
    read_metrics,
    write_report,
)

HERE = Path(__file__).parent
MIB = 2**20
LINE = StepLine(
    step=1,
    loss=3.5,
    lr=5e-5,
    gradient_norm=None,
    seconds=2.0,
    tokens=1024,
    bytes_read=300 * MIB,
    bytes_written=200 * MIB,
    host_peak_bytes=900 * MIB,
    device_peak_bytes=0,
    read_wait_seconds=0.5,
    write_wait_seconds=0.25,
    update_seconds=0.125,
)


def line(step: int, **changes) -> StepLine:
    return replace(LINE, step=step, loss=4 - step / 100, **changes)


def write(path: Path, steps: range, done: int = 0) -> None:
    metrics = Metrics(path, done)
    for step in steps:
        metrics.append(line(step))
    metrics.close()


# -- metrics.jsonl


def test_a_line_is_what_was_measured(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(line(1, gradient_norm=1.5))
    metrics.append(line(2))
    metrics.append_evaluation(2, 3.25)
    first, second, evaluation = read_metrics(metrics.path)  # nothing waits in a buffer
    metrics.close()
    assert first["gradient_norm"] == 1.5 and "gradient_norm" not in second
    assert second["tokens_per_second"] == 512 and second["loss"] == 3.98
    assert evaluation == {"step": 2, "eval_loss": 3.25}


def test_numbers_that_are_not_finite_are_null_since_json_has_none(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.append(line(1, gradient_norm=float("inf")))
    metrics.append_evaluation(1, float("nan"))
    metrics.close()
    assert [found.get("gradient_norm", found.get("eval_loss")) for found in read_metrics(metrics.path)] == [None] * 2


@given(steps=st.integers(0, 6), evaluate=st.booleans(), cut=st.integers(0, 400), resume=st.integers(0, 8))
def test_a_file_cut_anywhere_resumes_anywhere(tmp_path_factory, steps, evaluate, cut, resume):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, steps + 1):
        metrics.append(line(step))
        if evaluate:
            metrics.append_evaluation(step, 3.0)
    metrics.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])

    survived = [json.loads(text) for text in path.read_bytes().split(b"\n") if text.endswith(b"}")]
    assert read_metrics(path) == survived
    write(path, range(resume + 1, resume + 3), done=resume)
    kept = [found for found in survived if found["step"] <= resume]
    again = [json.loads(line(step).to_json()) for step in (resume + 1, resume + 2)]
    assert [json.loads(text) for text in path.read_text().splitlines()] == kept + again
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_a_kill_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(0))
    program = f"""
from pathlib import Path
from test_report import Metrics, line
metrics, step = Metrics(Path({str(path)!r})), 0
while True:
    metrics.append(line(step))
    step += 1
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=HERE)
    assert process.stdout is not None
    written = [int(process.stdout.readline()) for _ in range(100)][-1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = [record["step"] for record in read_metrics(path)]
    assert len(found) >= written and found == list(range(len(found)))


def test_damage_before_the_last_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    lines = path.read_text().splitlines(keepends=True)
    for damage in ("not json\n", "12\n", '{"loss": 1.0}\n', "\0\0\0\n"):
        path.write_text(lines[0] + damage + lines[2])
        with pytest.raises(RunError, match="line 2 is damaged"):
            read_metrics(path)
        with pytest.raises(RunError, match="line 2 is damaged"):
            Metrics(path, done=3)
        assert path.read_text() == lines[0] + damage + lines[2]
        assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_full_disk_is_said_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.append(line(0))
    size = path.stat().st_size
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # room for the beginning of a line
    try:
        with pytest.raises(StorageError, match=r"metrics.jsonl cannot be written"):
            metrics.append(line(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.stat().st_size == size
    metrics.append(line(1))
    metrics.close()
    assert [found["step"] for found in read_metrics(path)] == [0, 1]


# -- report.json and report.md


def test_measured_leaves_out_the_warm_up_but_not_its_peaks():
    seconds = [90.0, 80.0, 2.0, 4.0, 9.0]
    lines = [json.loads(line(step, seconds=taken).to_json()) for step, taken in enumerate(seconds)]
    lines[0]["host_peak_bytes"] = 1000 * MIB
    found = measured([*lines, {"step": 4, "eval_loss": 3.0}])
    assert found["seconds_per_step"] == 4 and found["tokens_per_second"] == 256
    assert found["mean_seconds_per_step"] == 5 and found["compute_seconds"] == 5 - 0.875
    assert found["host_peak_bytes"] == 1000 * MIB and found["bytes_read"] == 300 * MIB
    assert found["steps"] == 5 and found["total_seconds"] == sum(seconds) and found["total_tokens"] == 5120
    assert found["total_bytes_written"] == 1000 * MIB
    assert (found["first_loss"], found["last_loss"], found["eval_loss"]) == (4, 3.96, 3)


def test_a_run_shorter_than_the_warm_up_is_measured_whole():
    assert measured([json.loads(line(0).to_json())])["seconds_per_step"] == 2


def test_a_run_without_steps_measured_nothing(tmp_path):
    found = measured([])
    assert found["steps"] == 0 and found["seconds_per_step"] is None and found["host_peak_bytes"] is None
    write_report(tmp_path, {}, found, {})
    assert "No step was run" in (tmp_path / "report.md").read_text()


def test_the_ledger_as_the_report_has_it():
    held = Counter({("disk", "weight"): 5, ("host", "weight"): 2, ("disk", "moment"): 7, ("host", "gradient"): 0})
    assert held_by_tier(held) == {"disk": {"moment": 7, "weight": 5}, "host": {"weight": 2}}
    moved = Counter(
        {("disk", "host", "weight"): 40, ("disk", "device", "weight"): 20, ("host", "disk", "moment"): 10}
        | {("host", "device", "weight"): 99, ("remote", "host", "weight"): 70, ("host", "peer", "number"): 80}
    )
    assert moved_a_step(moved, 10) == {
        "read": {"weight": 6},
        "written": {"moment": 1},
        "from remote": {"weight": 7},
        "to peer": {"number": 8},
        "to the device": {"weight": 9},
    }


def a_report(directory: Path, **changes) -> dict:
    found = measured(json.loads(line(step).to_json()) for step in range(9)) | {"disk_bytes": 1500 * MIB}
    planned = {
        "host_peak_bytes": 1000 * MIB,
        "device_peak_bytes": 0,
        "bytes_read": 200 * MIB,
        "compute_seconds": 1,
    }
    extra = {
        "memory_bytes": 1024 * MIB,
        "held": {"disk": {"expert": 100 * MIB, "moment": 300 * MIB}, "host": {"weight": 50 * MIB}},
        "moved": {"read": {"weight": 300 * MIB}, "written": {"weight": 200 * MIB}},
    }
    write_report(directory, planned, found, {"model": "a|b", "units": "3"}, **(extra | changes))
    return json.loads((directory / "report.json").read_text())


def rows(page: str) -> dict[str, list[str]]:
    """The cells of every table by their first one."""
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in page.splitlines() if row.startswith("|")]
    return {first: rest for first, *rest in cells}


def test_planned_and_measured_have_the_same_keys(tmp_path):
    report = a_report(tmp_path)
    assert report["planned"].keys() == report["measured"].keys()
    asked = {"host_peak_bytes", "device_peak_bytes", "bytes_read", "bytes_written", "seconds_per_step"}
    assert asked <= report["planned"].keys()
    assert report["planned"]["seconds_per_step"] is None and report["measured"]["seconds_per_step"] == 2
    assert report["memory_bytes"] == 1024 * MIB and report["facts"] == {"model": "a|b", "units": "3"}
    assert sorted(os.listdir(tmp_path)) == ["report.json", "report.md"]


def test_the_page_compares_and_adds_up(tmp_path):
    a_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    table = rows(page)
    assert table["peak memory of the process"] == ["1000.00 MiB", "900.00 MiB", "0.900"]
    assert table["read from disk, a step"] == ["200.00 MiB", "300.00 MiB", "1.500"]
    assert table["peak memory of the device"] == ["0 B", "0 B", "-"]
    assert table["seconds a step (median)"] == ["-", "2.000", "-"]
    causes = [table[name] for name in ("compute", "waiting for reads", "waiting for writes", "update")]
    assert sum(float(cause[1]) for cause in causes) == pytest.approx(float(table["**step**"][1]), abs=0.002)
    assert sum(float(cause[2].rstrip("%")) for cause in causes) == pytest.approx(100, abs=0.2)
    assert causes[0][0] == "1.000" and causes[1][0] == "-"
    assert table["model"] == ["a\\|b"] and "1.00 GiB" in page


def test_a_report_that_cannot_be_written_is_said(tmp_path):
    with pytest.raises(StorageError, match="report.json cannot be written"):
        a_report(tmp_path / "missing")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


# -- pictures


def pixels(path: Path, colour: str) -> int:
    """How many pixels of the picture have just this colour."""
    image = numpy.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(image - numpy.round(numpy.multiply(to_rgb(colour), 255))).max(axis=2) <= 1).sum())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    directory = tmp_path_factory.mktemp("drawn")
    write(directory / "metrics.jsonl", range(60))
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "lo')
    a_report(directory)
    program = f"""
import sys; from pathlib import Path; from outsize.train.pictures import draw
assert "matplotlib" not in sys.modules
draw(Path({str(directory)!r}))
print(*sys.modules)
"""
    loaded = subprocess.check_output([sys.executable, "-W", "error", "-c", program], text=True).split()
    return directory, loaded


def test_drawing_takes_no_more_than_it_needs(drawn):
    assert "matplotlib" in drawn[1] and not {"torch", "matplotlib.pyplot"} & set(drawn[1])


def test_a_torn_run_is_drawn(drawn):
    directory, _ = drawn
    assert sorted(os.listdir(directory)) == [
        "loss.png",
        "memory.png",
        "metrics.jsonl",
        "report.json",
        "report.md",
    ]
    for name in ("loss.png", "memory.png"):
        with Image.open(directory / name) as image:
            image.load()
            assert image.format == "PNG" and image.width >= 1000
    assert pixels(directory / "loss.png", pictures.COLOURS["weight"]) > 500


def test_bars_are_as_long_as_their_bytes(drawn):
    # 300 MiB of moments, 100 MiB of experts; a legend adds a little of both.
    counts = [pixels(drawn[0] / "memory.png", pictures.COLOURS[kind]) for kind in ("moment", "expert")]
    assert counts[0] / counts[1] == pytest.approx(3, rel=0.15)


def test_one_step_without_a_report_is_drawn_and_none_is_not(tmp_path):
    write(tmp_path / "metrics.jsonl", range(0))
    assert pictures.draw(tmp_path) == []
    write(tmp_path / "metrics.jsonl", range(1))
    assert pictures.draw(tmp_path) == [tmp_path / "loss.png", tmp_path / "memory.png"]


@given(st.lists(st.floats(0, 20), min_size=51, max_size=400))
def test_smoothing_is_a_centred_mean(values):
    trend, width = pictures.smooth(values)
    assert width % 2 == 1 and len(trend) == len(values)
    for middle in (0, len(values) // 2, len(values) - 1):
        around = values[max(0, middle - width // 2) : middle + width // 2 + 1]
        assert trend[middle] == pytest.approx(statistics.fmean(around), abs=1e-9)
