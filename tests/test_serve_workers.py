"""`outsize serve --workers 2`, told to end or killed while it answers."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from launched import PATIENCE, Launched, launched
from models import write_model

import outsize
from outsize.serve.far_index import SIZE

PROMPT = " ".join(f"w{number}" for number in range(40))  # two pages, and some
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@dataclass
class Server:
    """What a client asks, and the lines that it has heard of a long answer."""

    launched: Launched
    url: str
    heard: list[str] = field(default_factory=list)

    def listen(self) -> None:
        with (
            suppress(httpx2.RemoteProtocolError),  # who is killed says nothing more
            httpx2.stream("POST", self.url, json=asked(400) | STREAMED, timeout=PATIENCE) as answer,
        ):
            self.heard.extend(answer.iter_lines())


def asked(count: int) -> dict[str, object]:
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": count, "ignore_eos": True, "temperature": 0}


@contextmanager
def answering(model: Path, folder: Path) -> Iterator[Server]:
    """Two workers, of whom somebody hears something already."""
    options = ["--memory", "1GiB", "--port", 0, "--workers", 2, "--name", "tiny", "--kv-directory", folder / "kv"]
    with launched(folder, "outsize", "serve", "--model", model, *options) as command:
        command.until(lambda: "running on" in command.said)
        server = Server(command, re.findall(r"running on (http://\S+),", command.said)[0] + "/v1/completions")
        client = threading.Thread(target=server.listen)
        client.start()
        command.until(lambda: server.heard)
        yield server
        client.join(PATIENCE)


def test_told_to_end_nothing_stays_behind(model: Path, tmp_path: Path) -> None:
    """Ctrl-C; who is being answered has some seconds."""
    with answering(model, tmp_path) as server:
        server.launched.process.send_signal(signal.SIGINT)
        assert server.launched.end() == 130
        assert server.launched.said.count("outsize: stopped. No request is under way any more.") == 1
    last = [line for line in server.heard if line][-1]
    assert last == "data: [DONE]" or "The engine was closed" in last


def test_a_killed_worker_is_named_to_all_and_what_they_knew_is_known_again(model: Path, tmp_path: Path) -> None:
    with answering(model, tmp_path) as server:
        server.launched.until(
            lambda: all(path.stat().st_size >= 2 * SIZE for path in (tmp_path / "kv").glob("*/index"))
        )
        os.kill(server.launched.worker(1), signal.SIGKILL)
        assert server.launched.end() == 1
        assert "outsize: Worker 1 is lost, and worker 0 stops" in server.launched.said
        assert "outsize: Worker 1 was ended by SIGKILL. No request is under way any more." in server.launched.said
    assert any("Worker 1 is lost" in line for line in server.heard), server.heard[-5:]
    with answering(model, tmp_path) as server:
        server.launched.until(lambda: "data: [DONE]" in server.heard)
        assert '"cached_tokens": 32' in "".join(server.heard)
        said = httpx2.post(server.url, json=asked(8), timeout=PATIENCE).json()
        server.launched.process.send_signal(signal.SIGTERM)
        assert server.launched.end() == 143
    with outsize.Engine(str(model), memory="8GiB") as engine:
        assert said["choices"][0]["text"] == engine.generate([PROMPT], max_new_tokens=8, ignore_end=True)[0].text
