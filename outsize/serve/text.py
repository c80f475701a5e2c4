"""Text as it becomes complete, token by token."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that do not make a character yet


class TextStream:
    """Turns tokens into text, and finds stop strings, which may begin in one token and end in another.

    What might still become part of a stop string is held back until that is known; `stopped` once one was found. The stop
    string itself is never given out."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded together, so that spaces come out right
        self._read = 0  # tokens before this one are text already
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; often more or less than its own."""
        self._tokens.append(token)
        before = self._decode(self._context, self._read)
        now = self._decode(self._context, len(self._tokens))
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._emit(now[len(before) :])

    def finish(self) -> str:
        """What is left at the end, incomplete characters too."""
        if self.stopped:
            return ""
        before = self._decode(self._context, self._read)
        now = self._decode(self._context, len(self._tokens))
        self._read = len(self._tokens)
        text, self._held = self._held + now[len(before) :], ""
        return text

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self._tokens[first:last], skip_special_tokens=True))

    def _emit(self, text: str) -> str:
        text = self._held + text
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
