"""The official OpenAI client, and rude ones, against a real server process."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from models import tiny_model
from test_cli import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}w1"
PAGES = 20
KEY = "secret"


class Address:
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

    def post(self, path: str, body: object, **options) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx2.post(self.url + path, content=content, timeout=60, headers=options.get("headers", self.headers))


def start(model: Path, log: Path, *more: object) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "outsize", "serve", "--model", model, "--memory", "1200MiB", "--port", port]
    options = ["--name", "tiny", "--context", 64, "--concurrency", 5, "--step-tokens", 24, *more]
    with log.open("wb") as file:
        process = subprocess.Popen([*map(str, [*command, *options])], stderr=file)
    while "running on" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    return process, port


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=False).save_pretrained(folder)
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    log = tmp_path_factory.mktemp("server") / "log"
    process, port = start(model, log, "--api-key", KEY, "--max-body", "64KiB", "--max-waiting", 64)
    yield Address(port, model, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) in (0, -signal.SIGTERM)
    assert "Traceback" not in log.read_text()


def expected(model: Path, prompt: str, new: int) -> str:
    whole = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")
    found = whole.generate(**ids, max_new_tokens=new, min_new_tokens=new, eos_token_id=None, do_sample=False)
    assert isinstance(found, torch.Tensor)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat_whole_and_streamed_say_what_transformers_says(server: Address) -> None:
    messages = [{"role": "user", "content": "w5 w6"}]
    options = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    answer = expected(server.model, "user w5 w6 w1", 8)
    whole = server.client.chat.completions.create(**options)
    assert whole.choices[0].message.content == answer and whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 8)
    chunks = list(server.client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens == 8
    said = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in said) == answer
    assert [choice.finish_reason for choice in said if choice.finish_reason] == ["length"]


def test_completions_of_many_prompts_with_logprobs_and_seeds(server: Address) -> None:
    create = server.client.completions.create
    found = create(model="tiny", prompt=["w1 w2", "w3"], max_tokens=4, temperature=0, logprobs=2, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text
    assert all(value <= 0 for value in found.choices[0].logprobs.token_logprobs)
    assert found.usage.prompt_tokens == 3
    drawn = [create(model="tiny", prompt=[4, 5], max_tokens=12, temperature=2, seed=7).choices[0].text for _ in "ab"]
    assert drawn[0] == drawn[1]
    long = list(range(5, 45))
    create(model="tiny", prompt=long, max_tokens=1)
    assert create(model="tiny", prompt=long, max_tokens=1).usage.prompt_tokens_details.cached_tokens == 32


def test_the_async_client_streams_many_at_once(server: Address) -> None:
    async def talk() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)

        async def one(number: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=f"w{number}", max_tokens=6, temperature=0, stream=True,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(number) for number in range(2, 14)))

    found = asyncio.run(talk())
    assert found[3] == expected(server.model, "w5", 6) and len(found) == 12


def test_errors_have_openais_shape(server: Address) -> None:
    client, good = server.client, {"model": "tiny", "prompt": "w1", "max_tokens": 2}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**good, "max_tokens": 100})
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**good, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**good, extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**{**good, "model": "huge"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert server.post("/v1/completions", {**good, "prompt": "w1 " * 30_000}).status_code == 413
    for body in (b"{", b"", b"[]", b"\xff\xfe", {"model": "tiny"}, {**good, "prompt": [[-1]]}, {**good, "n": 0}):
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    assert server.post("/v1/nothing", {}).json()["error"]["code"] == "not_found"
    assert client.models.list().data[0].id == "tiny" and httpx2.get(f"{server.url}/health").status_code == 200
    assert server.post("/tokenize", {"prompt": "w1 w2"}).json()["count"] == 2


def rude(server: Address, number: int) -> str:
    """One client: polite, rubbish, or gone in the middle."""
    draw = random.Random(number)
    body = {
        "model": "tiny",
        "prompt": f"w{number} w3",
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": bool(number % 2),
    }
    if number % 3 == 0:
        done = server.post("/v1/completions", {**body, "stream": False})
        return str(done.status_code)
    if number % 3 == 1:
        rubbish = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
        return str(server.post("/v1/chat/completions", rubbish).status_code)
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(text)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head.encode() + text[: len(text) if number % 2 else draw.randrange(1, len(text) + 1)])
        time.sleep(draw.random() / 5)
    return "gone"


def test_rude_clients_leave_no_page_behind(server: Address) -> None:
    with ThreadPoolExecutor(40) as crowd:
        found = list(crowd.map(lambda number: rude(server, number), range(120)))
    assert set(found) <= {"200", "400", "429", "gone"} and found.count("200") > 0
    deadline = time.monotonic() + 60
    while server.metric("kv_pages_available") < server.metric("kv_pages") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("kv_pages_available") == server.metric("kv_pages") == PAGES
    assert server.metric("sequences_running") == server.metric("requests_waiting") == 0
    assert server.client.completions.create(model="tiny", prompt="w1", max_tokens=2).choices[0].finish_reason


def test_a_full_queue_and_a_late_answer_say_so_and_a_signal_ends_politely(model: Path, tmp_path: Path) -> None:
    process, port = start(model, tmp_path / "log", "--max-waiting", 1, "--timeout", 0.2)
    here = Address(port, model, tmp_path / "log")
    body = {"model": "tiny", "prompt": ["w1", "w2"], "max_tokens": 2}
    full = here.post("/v1/completions", body)
    assert full.status_code == 429 and full.headers["Retry-After"] == "1"
    late = here.post("/v1/completions", {**body, "prompt": "w1", "max_tokens": 60, "n": 60, "ignore_eos": True})
    assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert "Traceback" not in here.log.read_text()
