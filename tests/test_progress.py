"""What a run says on the terminal: lines for people on stderr, lines for scripts on stdout, never both."""

import json
import os
import pty
import subprocess
import sys

from test_report import HERE, MIB, line

from outsize.train.progress import Progress


def run_through(progress: Progress, steps: int = 4) -> None:
    progress.message("loading")
    progress.start(steps)
    for step in range(steps):
        progress.step(line(step))
    progress.evaluation(steps - 1, 3.25)
    progress.message("sample: [bold]The [/x]")
    progress.stop()
    progress.stop()


def test_json_is_all_there_is(capfd):
    run_through(Progress(json=True))
    out, err = capfd.readouterr()
    first, *steps, evaluation, sample = [json.loads(text) for text in out.splitlines()]
    assert err == "" and first == {"message": "loading"} and sample == {"message": "sample: [bold]The [/x]"}
    assert steps == [json.loads(line(step).to_json()) for step in range(4)]
    assert evaluation == {"step": 3, "eval_loss": 3.25}


def test_without_a_terminal_lines_come_now_and_then_and_at_the_end(capfd):
    run_through(Progress(memory_bytes=1024 * MIB, every=10**9))
    out, err = capfd.readouterr()
    loading, first, last, evaluation, sample = err.splitlines()
    assert out == "" and loading == "loading" and sample == "sample: [bold]The [/x]"
    assert first.startswith("step 1/4  loss 4.0000  lr 5e-05  512 tokens/s  memory 900.00 MiB of 1.00 GiB")
    assert "read 300.00 MiB, wrote 200.00 MiB" in first and first.endswith(" left")
    assert last.startswith("step 4/4  loss 3.9700") and "done in" in last
    assert evaluation == "step 4/4: evaluation loss 3.2500"


def test_steps_of_an_earlier_run_count(capfd):
    progress = Progress(every=0)
    progress.start(5, done=3)
    progress.step(line(3))
    progress.step(line(4))
    assert [text.split("  ")[0] for text in capfd.readouterr().err.splitlines()] == ["step 4/5", "step 5/5"]


def test_a_terminal_shows_a_live_line_and_gets_its_cursor_back():
    program = """
from test_progress import *
progress = Progress()
progress.start(9)
print("out", end="", flush=True)
progress.stop()
run_through(Progress(memory_bytes=1024 * MIB))
"""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        cwd=HERE,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux says EIO when the other side has closed
        pass
    os.close(ours)
    assert process.communicate()[0] == "out" and process.returncode == 0
    text = shown.decode()
    assert "step 4/4" in text and "memory 900.00 MiB of 1.00 GiB" in text and "[bold]The [/x]" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
