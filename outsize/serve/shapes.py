"""What may be asked over HTTP, as values that check themselves, and what a refusal looks like. After OpenAI's official
reference, 2025."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from outsize.serve.request import RANGES, STOPS, Sampling

Tokens = list[Annotated[int, Field(ge=0)]]
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions


class Problem(Exception):
    """An error in OpenAI's shape: HTTP status, and who or what is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What `Problem.body` holds."""

    error: ErrorFacts


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    description: str | None = None
    body: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class FreeFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object"]

    def schema_text(self) -> str | None:
        """The JSON schema of the answer, or None when it may be any text."""
        return '{"type": "object"}' if self.type == "json_object" else None


class SchemaFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["json_schema"]
    json_schema: JsonSchema

    def schema_text(self) -> str | None:
        return json.dumps(self.json_schema.body)


def ranged(name: str) -> Any:
    """The range of a field of `Sampling`."""
    least, most = RANGES[name]
    return Field(ge=least, le=most)


MaxTokens = Annotated[int, ranged("max_new_tokens")]
Penalty = Annotated[float, ranged("presence_penalty")]
Logprobs = Annotated[int, ranged("logprobs")]
Stop = Annotated[str, Field(min_length=1)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Common(BaseModel):
    """What both endpoints take. Parameters that are not here are refused by name, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: MaxTokens | None = None
    temperature: Annotated[float, ranged("temperature")] | None = None
    top_p: Annotated[float, ranged("top_p")] | None = None
    top_k: Annotated[int, ranged("top_k")] | None = None
    min_p: Annotated[float, ranged("min_p")] | None = None
    n: Annotated[int, ranged("n")] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    seed: Annotated[int, ranged("seed")] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, ranged("repetition_penalty")] | None = None
    logit_bias: dict[TokenName, Bias] | None = None
    response_format: Annotated[FreeFormat | SchemaFormat, Field(discriminator="type")] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    user: str | None = None

    def sampling(self, max_new_tokens: int, logprobs: int | None, vocabulary: int) -> Sampling:
        """Raises OptionError, or Problem, naming what is out of range."""
        names = ("temperature", "top_p", "top_k", "min_p", "n", "presence_penalty", "frequency_penalty")
        given = {name: getattr(self, name) for name in (*names, "repetition_penalty", "seed")}
        return Sampling(
            **{"temperature": 1.0, **{name: value for name, value in given.items() if value is not None}},
            max_new_tokens=max_new_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            logit_bias=self._biases(vocabulary),
            ignore_end=self.ignore_eos,
            logprobs=logprobs,
            json_schema=self.response_format.schema_text() if self.response_format is not None else None,
        )

    def _biases(self, vocabulary: int) -> tuple[tuple[int, float], ...]:
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        if wrong := [token for token in biases if token >= vocabulary]:
            raise Problem(400, f"logit_bias: {wrong[0]} is not a token of {vocabulary}", None, "logit_bias")
        return tuple(biases.items())


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None  # as the official client sends back the answers that it was given

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: Logprobs | None = None


class CompletionBody(Common):
    prompt: str | list[str] | Tokens | list[Tokens]
    logprobs: Logprobs | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] = False

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise Problem(400, "prompt is empty", None, "prompt")
        alone = isinstance(self.prompt[0], int)
        return [self.prompt] if alone else list(self.prompt)  # pyright: ignore[reportReturnType]


class TokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None


BODIES = (ChatBody, CompletionBody, TokenizeBody)
