"""What may be asked over HTTP, as values that check themselves, and what a refusal looks like. After OpenAI's official
reference, 2025."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from outsize.serve.request import Sampling

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


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        """The JSON schema of the answer, or None when it may be any text."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise Problem(400, "response_format: json_schema goes with the type of that name", None, "response_format")
        if self.json_schema is not None:
            return json.dumps(self.json_schema.body)
        return '{"type": "object"}' if self.type == "json_object" else None


class Common(BaseModel):
    """What both endpoints take. Parameters that are not here are refused by name, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
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
        found = []
        for token, bias in (self.logit_bias or {}).items():
            known = token.isdecimal() and len(token) < 12 and int(token) < vocabulary
            if not known or not -100 <= bias <= 100:
                raise Problem(
                    400, f"logit_bias: {token}: {bias} is not a token id and a bias within 100", None, "logit_bias"
                )
            found.append((int(token), bias))
        return tuple(found)


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
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None


class CompletionBody(Common):
    prompt: str | list[str] | Tokens | list[Tokens]
    logprobs: int | None = None
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
