"""Answers that must be JSON are JSON, whatever the model would rather say: here one of random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from models import TEMPLATE, write_model
from server import Address, serving

import outsize
from outsize.errors import OptionError

pytest.importorskip("llguidance", reason="structured output needs the extra structured")
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dög"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "legs": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    },
    "required": ["kind", "age", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), letters=True, template=TEMPLATE)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with serving(model, tmp_path_factory.mktemp("server") / "log", context=256) as address:
        yield address


def obeys(text: str) -> bool:
    found = json.loads(text)
    assert found.keys() == {"kind", "age", "legs"} and found["kind"] in ("cat", "dög")
    return 0 <= found["age"] <= 99 and 2 <= len(found["legs"]) <= 4 and {True, False}.issuperset(found["legs"])


def test_an_engine_answers_by_the_schema(model: Path) -> None:
    with outsize.Engine(str(model), memory="8GiB", context=256, concurrency=4) as engine:
        options = {"max_new_tokens": 200, "json_schema": json.dumps(SCHEMA), "n": 4, "seed": 1}
        drawn = engine.generate(["a pet", "another"], temperature=1.5, **options)
        assert all(obeys(one.text) and one.finish == "stop" for one in drawn)
        assert len({one.text for one in drawn}) >= 4, "it is the model that chooses"
        (likeliest,) = engine.generate(["a pet"], max_new_tokens=200, json_schema=json.dumps(SCHEMA), ignore_end=True)
        assert obeys(likeliest.text)
        (free,) = engine.generate(["a pet"], max_new_tokens=30)
        assert free.text[:1] != "{", "who asks for no schema is not bound by it"
        for wrong in ("no JSON", "[1]", '{"type": "nothing"}'):
            with pytest.raises(OptionError, match="json_schema cannot be used"):
                engine.generate(["a pet"], json_schema=wrong)


def test_the_official_client_gets_what_it_asked_for(server: Address) -> None:
    create = server.client.chat.completions.create
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a pet"}], "temperature": 1, "seed": 2}
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    whole = create(**asked, response_format=wanted).choices[0]
    assert obeys(whole.message.content) and whole.finish_reason == "stop"
    chunks = create(**asked, response_format=wanted, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
    free = create(**asked, response_format={"type": "json_object"}).choices[0]
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    wanted["json_schema"]["schema"] = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        create(**asked, response_format=wanted)
    assert caught.value.param == "response_format" and "nowhere" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        create(**asked, response_format={"type": "json_schema"})
    assert caught.value.param == "response_format"


def test_without_the_library_a_message_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)  # as if it were not installed
    with outsize.Engine(str(model), memory="8GiB", context=64) as engine:
        with pytest.raises(OptionError, match=r"pip install 'outsize\[structured\]'"):
            engine.generate(["w1"], max_new_tokens=2, json_schema="{}")
        engine.generate(["w1"], max_new_tokens=2)
