"""A real server process, and how tests talk to it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai

KEY = "secret"


class Address:
    """Where a server listens, and clients that have the key."""

    def __init__(self, port: int, model: Path, log: Path) -> None:
        self.port, self.model, self.log = port, model, log
        self.url = f"http://127.0.0.1:{port}"
        self.headers = {"Authorization": f"Bearer {KEY}"}
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        page = httpx2.get(f"{self.url}/metrics", headers=self.headers, timeout=30).text
        found = re.search(rf"^outsize_{name} (\S+)$", page, re.MULTILINE)
        assert found is not None, page
        return float(found[1])

    def stats(self) -> dict:
        return httpx2.get(f"{self.url}/stats", headers=self.headers, timeout=30).json()

    def post(self, path: str, body: object, **options) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(self.url + path, content=content, timeout=60, headers=options.get("headers", self.headers))

    def settle(self, seconds: float = 60) -> None:
        """Wait until nobody holds a page, then see that the server is well: it checks its pages when it has nothing to do."""
        deadline = time.monotonic() + seconds
        while self.busy() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.busy(), self.stats()
        assert httpx2.get(f"{self.url}/health", timeout=30).status_code == 200, self.log.read_text()

    def busy(self) -> bool:
        now = self.stats()
        return bool(now["kv"]["held"] or now["requests"]["running"] or now["requests"]["waiting"])


@contextmanager
def serving(model: Path, log: Path, *more: object, key: str | None = KEY, context: int = 64) -> Iterator[Address]:
    """A server for `model`, known as tiny; ended with a signal, which must go politely."""
    process, port = start(model, log, *(("--api-key", key) if key else ()), "--context", context, *more)
    try:
        yield Address(port, model, log)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    assert code == 128 + signal.SIGTERM
    assert "Traceback" not in log.read_text(), log.read_text()


def start(model: Path, log: Path, *more: object) -> tuple[subprocess.Popen[bytes], int]:
    """A server process that is ready, and its port."""
    command = [sys.executable, "-m", "outsize", "serve", "--model", model, "--memory", "1200MiB", "--port", 0]
    options = ["--name", "tiny", "--concurrency", 5, "--step-tokens", 24, *more]
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, [*command, *options])], stderr=file)
    while not (found := re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process, int(found[1])
