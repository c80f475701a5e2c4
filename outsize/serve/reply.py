"""Answers as OpenAI's official client reads them: whole, or in chunks. After the official reference, 2025."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from itertools import accumulate
from typing import Any

from outsize.serve.request import Chosen, Event
from outsize.serve.service import Completion
from outsize.serve.text import token_bytes


class Reply:
    """Writes answers of one request to `model`, for /v1/chat/completions (`chat`) or /v1/completions. `logprobs`: with
    each token's probability; `usage`: chunks have a place for it."""

    def __init__(self, model: str, tokenizer: Any, chat: bool, logprobs: bool, usage: bool = False) -> None:
        self.chat, self._tokenizer, self._logprobs, self._usage = chat, tokenizer, logprobs, usage
        self._lengths: Counter[int] = Counter()  # characters listed so far, by completion
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
        logprobs = self._listed(index, [event.chosen]) if self._logprobs and event.chosen is not None else None
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
        room = {"usage": None} if self._usage else {}
        return {**self._head, "object": self._chunk_kind, "choices": [choice], **room}

    def _choice(self, number: int, completion: Completion) -> dict[str, Any]:
        what = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
        logprobs = self._listed(number, completion.chosen) if self._logprobs else None
        found = what if self.chat else {"text": completion.text}
        return {"index": number, **found, "logprobs": logprobs, "finish_reason": completion.finish}

    def _listed(self, index: int, chosen: list[Chosen]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._entry(c.token, c.logprob, c.logprobs) for c in chosen], "refusal": None}
        texts = [self._decode(c.token) for c in chosen]
        *offsets, self._lengths[index] = accumulate(map(len, texts), initial=self._lengths[index])
        return {
            "tokens": texts,
            "token_logprobs": [c.logprob for c in chosen],
            "top_logprobs": [{self._decode(token): value for token, value in c.logprobs} for c in chosen],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None, top: Any = None) -> dict[str, Any]:
        letters = token_bytes(self._tokenizer, token) if self._tokenizer is not None else str(token).encode()
        found: dict[str, Any] = {"token": self._decode(token), "logprob": logprob, "bytes": list(letters)}
        if top is not None:
            found["top_logprobs"] = [self._entry(other, value) for other, value in top]
        return found

    def _decode(self, token: int) -> str:
        return str(self._tokenizer.decode([token])) if self._tokenizer is not None else str(token)


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
