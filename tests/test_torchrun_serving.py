"""`torchrun ... -m outsize`, to answer prompts and to serve: killed, and told to end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx2
from launched import PATIENCE, PROMPTS, launched, make_work
from models import write_model

import outsize


def test_a_restart_goes_on_and_hears_nothing_of_the_attempt_before(tmp_path: Path) -> None:
    options = ("--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "--log-dir", tmp_path / "logs")
    work = make_work(tmp_path, ("torch.distributed.run", *options, "-m", "outsize"), ())
    with work.under_way() as command:
        os.kill(command.worker(1), signal.SIGKILL)
        assert command.end() == 0
        assert f"{PROMPTS} answers" not in command.said and " answers in " in command.said
    assert work.count() == PROMPTS
    work.compare()


def test_a_server_that_is_told_to_end_leaves_nothing(tmp_path: Path) -> None:
    """torchrun passes SIGTERM on; the first worker ends, and the other with it."""
    model = write_model(tmp_path / "model")
    options = ("--standalone", "--nproc-per-node", 2, "--log-dir", tmp_path / "logs", "-m", "outsize")
    serve = ("serve", "--model", model, "--memory", "1GiB", "--port", 0, "--name", "tiny")
    with launched(tmp_path, "torch.distributed.run", *options, *serve) as command:
        command.until(lambda: "running on" in command.said)
        (address,) = re.findall(r"running on (http://\S+),", command.said)
        asked = {"model": "tiny", "prompt": "w1 w2 w3", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
        said = httpx2.post(f"{address}/v1/completions", json=asked, timeout=PATIENCE).json()
        command.process.send_signal(signal.SIGTERM)
        assert command.end(tracebacks=1) == 1 and "SignalException" in command.said
        assert "is lost" not in command.said
    with outsize.Engine(str(model), memory="8GiB") as engine:
        assert said["choices"][0]["text"] == engine.generate(["w1 w2 w3"], max_new_tokens=8, ignore_end=True)[0].text
