"""`outsize serve --workers 2`, told to end or killed while it answers."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest
from launched import PATIENCE, Launched, launched
from models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@contextmanager
def answering(model: Path, folder: Path) -> Iterator[tuple[Launched, list[str]]]:
    """Servers of whom a client hears something already; its lines."""
    options = ["--memory", "1GiB", "--port", 0, "--workers", 2, "--name", "tiny"]
    with launched(folder, "outsize", "serve", "--model", model, *options) as server:
        server.until(lambda: "running on" in server.said)
        url = re.findall(r"running on (http://\S+),", server.said)[0]
        heard: list[str] = []

        def ask() -> None:
            body = {"model": "tiny", "prompt": "w1 w2", "max_tokens": 500, "ignore_eos": True, "stream": True}
            with (
                suppress(httpx2.RemoteProtocolError),  # who is killed says nothing more
                httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as answer,
            ):
                heard.extend(answer.iter_lines())

        client = threading.Thread(target=ask)
        client.start()
        server.until(lambda: heard)
        yield server, heard
        client.join(PATIENCE)


def test_told_to_end_nothing_stays_behind(model: Path, tmp_path: Path) -> None:
    """Ctrl-C; who is being answered has some seconds."""
    with answering(model, tmp_path) as (server, heard):
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 130
        assert server.said.count("outsize: stopped. No request is under way any more.") == 1
    last = [line for line in heard if line][-1]
    assert last == "data: [DONE]" or "The engine was closed" in last


def test_a_killed_worker_is_named_to_all_and_the_other_ends(model: Path, tmp_path: Path) -> None:
    with answering(model, tmp_path) as (server, heard):
        os.kill(server.worker(1), signal.SIGKILL)
        assert server.end() == 1
        assert "outsize: Worker 1 is lost, and worker 0 stops" in server.said
        assert "outsize: Worker 1 was ended by SIGKILL. No request is under way any more." in server.said
    assert any("Worker 1 is lost" in line for line in heard), heard[-5:]
