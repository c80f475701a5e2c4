"""OpenAI's HTTP interface as values: what comes in, checked; what goes out. After the official reference, 2025."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from outsize.serve.request import Chosen, Event, Sampling
from outsize.serve.service import Completion

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


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


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
        )

    def _biases(self, vocabulary: int) -> tuple[tuple[int, float], ...]:
        found = []
        for token, bias in (self.logit_bias or {}).items():
            if not token.isdecimal() or int(token) >= vocabulary or not -100 <= bias <= 100:
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


class Reply:
    """Writes answers of one request. `decode(token)` is the text of one token."""

    def __init__(self, model: str, chat: bool, logprobs: bool, decode: Any) -> None:
        self.chat, self._logprobs, self._decode = chat, logprobs, decode
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        choices = [self._choice(number, completion) for number, completion in enumerate(completions)]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage(completions)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat: who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, event: Event) -> dict[str, Any]:
        logprobs = self._listed([event.chosen]) if self._logprobs and event.chosen is not None else None
        what: Any = event.text
        if self.chat:
            what = {} if event.finish is not None and not event.text else {"content": event.text}
        return self._chunk(index, what, logprobs, event.finish)

    def closing(self, completions: list[Completion]) -> dict[str, Any]:
        """The chunk that says what was used."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage(completions)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, what: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta" if self.chat else "text": what, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def _choice(self, number: int, completion: Completion) -> dict[str, Any]:
        what = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        logprobs = self._listed(completion.chosen) if self._logprobs else None
        found = what if self.chat else {"text": completion.text}
        return {"index": number, **found, "logprobs": logprobs, "finish_reason": completion.finish}

    def _listed(self, chosen: list[Chosen]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(c.token, c.logprob, c.logprobs) for c in chosen], "refusal": None}
        return {
            "tokens": [self._decode(c.token) for c in chosen],
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{self._decode(token): value for token, value in c.logprobs} for c in chosen],
            "text_offset": [0] * len(chosen),
        }

    def _entry(self, token: int, logprob: float | None, top: Any = None) -> dict[str, Any]:
        text = self._decode(token)
        found: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": list(text.encode())}
        if top is not None:
            found["top_logprobs"] = [self._entry(other, value) for other, value in top]
        return found


def usage(completions: list[Completion]) -> dict[str, Any]:
    """Tokens of all prompts and answers; a prompt counts once, however many completions it has."""
    prompts = [completion for completion in completions if completion.index == 0]
    asked, answered = sum(c.prompt_tokens for c in prompts), sum(len(c.chosen) for c in completions)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
    }
