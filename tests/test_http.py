"""The official OpenAI client, and rude ones, against a real server process."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import pytest
import torch
from crowd import NEW, PROMPTS, gather
from models import TEMPLATE, write_model
from server import KEY, Address, serving, start
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PAGES = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), template=TEMPLATE)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(model, log, "--max-body", "64KiB", "--max-waiting", 64) as address:
        yield address


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


def test_a_conversation_goes_on_with_the_clients_own_message(server: Address) -> None:
    create, messages = server.client.chat.completions.create, [{"role": "user", "content": "w5 w6"}]
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    said = create(**options, messages=messages, response_format={"type": "text"}).choices[0].message
    whole = create(**options, messages=[*messages, said, messages[0]])
    prompt = f"user w5 w6 assistant {said.content} user w5 w6 w1"
    assert whole.choices[0].message.content == expected(server.model, prompt, 8)
    last = said.content.split()[-1]
    cut = create(**options, messages=messages, stop=[last, "w999"]).choices[0]
    assert cut.message.content == said.content[: said.content.index(last)] and cut.finish_reason == "stop"


def test_streams_carry_what_whole_answers_do(server: Address) -> None:
    options = {
        "model": "tiny",
        "max_tokens": 6,
        "temperature": 1.5,
        "seed": 11,
        "n": 3,
        "extra_body": {"ignore_eos": True},
    }
    asked = {**options, "messages": [{"role": "user", "content": "w5"}], "logprobs": True, "top_logprobs": 2}
    whole = server.client.chat.completions.create(**asked)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = server.client.chat.completions.create(**asked, **streamed)
    assert last.usage == whole.usage and all(chunk.usage is None for chunk in chunks)
    said = [choice for chunk in chunks for choice in chunk.choices]
    for choice in whole.choices:
        mine = [one for one in said if one.index == choice.index]
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [entry for one in mine if one.logprobs for entry in one.logprobs.content] == choice.logprobs.content
        assert all(bytes(entry.bytes).decode() == entry.token for entry in choice.logprobs.content)
    assert len({choice.message.content for choice in whole.choices}) > 1, "each completion draws for itself"
    asked = {**options, "prompt": "w5 w6", "logprobs": 1}
    whole = server.client.completions.create(**asked).choices[0].logprobs
    chunks = [chunk.choices[0] for chunk in server.client.completions.create(**asked, **streamed) if chunk.choices]
    offsets = [place for chunk in chunks if chunk.index == 0 and chunk.logprobs for place in chunk.logprobs.text_offset]
    assert offsets == whole.text_offset and len(set(offsets)) == 6


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
    for wrong, named in (({"max_tokens": 0}, "max_tokens"), ({"seed": 10**30}, "seed"), ({"tools": []}, "tools")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w1"}], **wrong)
        assert caught.value.param == named and named in caught.value.message
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


def test_a_crowd_of_which_a_third_is_rude_leaves_no_page_behind(server: Address) -> None:
    right = {prompt: expected(server.model, prompt, NEW) for prompt in PROMPTS}
    found = gather(server, 60, right, seed=5)
    assert found["right"] == 40 and sum(found.values()) == 60, found
    server.settle()
    assert server.stats()["kv"]["pages"] == PAGES
    assert server.client.completions.create(model="tiny", prompt="w1", max_tokens=2).choices[0].finish_reason


def test_a_full_queue_and_a_late_answer_say_so(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "log", "--max-waiting", 1, "--timeout", 0.2, key=None) as here:
        body = {"model": "tiny", "prompt": ["w1", "w2"], "max_tokens": 2}
        full = here.post("/v1/completions", body)
        assert full.status_code == 429 and full.headers["Retry-After"] == "1"
        late = here.post("/v1/completions", {**body, "prompt": "w1", "max_tokens": 60, "n": 60, "ignore_eos": True})
        assert late.status_code == 503 and late.json()["error"]["code"] == "timeout"


def test_every_figure_of_the_live_view_is_documented(server: Address) -> None:
    table = Path(__file__).parent.parent.joinpath("docs/serving.md").read_text().partition("## /stats")[2]
    server.client.completions.create(model="tiny", prompt="w1", max_tokens=2)
    now = server.stats()
    told = {"predicted", "measured"}  # their names are those of `Predicted`
    names = set(now) | {name for part in now if isinstance(now[part], dict) and part not in told for name in now[part]}
    names |= set(now["units"][0]) - {"name"}
    assert [name for name in sorted(names - {"sequences"}) if f"`{name}`" not in table] == []
    assert now["measured"]["seconds_per_step"] > 0 and now["predicted"]["host_peak_bytes"] > 0
    assert sum(unit["bytes"] for unit in now["units"]) == now["memory"]["held"]["host"]["weight"]


def test_told_to_stop_it_ends_streams_politely_and_leaves_nothing_behind(model: Path, tmp_path: Path) -> None:
    asked = {"model": "tiny", "prompt": "w1", "max_tokens": 500, "n": 128, "stream": True, "ignore_eos": True}
    (tmp_path / "scratch").mkdir()
    with ThreadPoolExecutor(1) as other:
        with serving(model, tmp_path / "log", "--scratch", tmp_path / "scratch", context=512) as here:
            stream = other.submit(here.post, "/v1/completions", asked)
            while not here.stats()["requests"]["running"]:
                time.sleep(0.05)
        *_, last = [line for line in stream.result().text.split("\n\n") if line]
    assert "The engine was closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "stopped." in (tmp_path / "log").read_text() and not list((tmp_path / "scratch").iterdir())


def test_told_twice_it_does_not_wait_for_anybody(model: Path, tmp_path: Path) -> None:
    asked = {"model": "tiny", "prompt": "w1", "max_tokens": 500, "n": 128, "stream": True, "ignore_eos": True}
    process, port = start(model, tmp_path / "log", "--context", 512)
    here = Address(port, model, tmp_path / "log")
    with ThreadPoolExecutor(1) as other:
        stream = other.submit(here.post, "/v1/completions", asked)
        while not here.stats()["requests"]["running"]:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        with suppress(httpx2.ConnectError):
            while here.stats():  # until it takes no more requests
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        *_, last = [line for line in stream.result().text.split("\n\n") if line]
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert "The engine was closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in here.log.read_text()
