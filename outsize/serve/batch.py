"""A file of prompts to a file of answers, which can be stopped at any time and continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from outsize.errors import DataError, OptionError, StorageError
from outsize.serve.chat import chat_tokens
from outsize.serve.request import Sampling
from outsize.serve.service import Completion, Service

AHEAD = 4  # requests in the engine for each of its seats, so that none stays empty
OPTIONS = {field.name for field in fields(Sampling)}


def answer_file(service: Service, source: Path, target: Path, sampling: Sampling) -> int:
    """Append a line to `target` for each line of `source` that has none there yet, as each is finished; how many.

    A line of `source` has `prompt` (text or token ids) or `messages`, and perhaps options of its own. A line of `target`
    has its `line` number, `text`, `finish_reason` and token counts; half a line at the end, of a run that was killed, is
    written anew. Raises DataError naming the line that cannot be read, StorageError when `target` cannot be written."""
    done = answered(target)
    work = [item for item in read_requests(service, source, sampling) if item[0] not in done]
    try:
        with target.open("a") as file:
            for number, completions in _finished(service, work):
                for completion in completions:
                    file.write(json.dumps(_line(number, completion)) + "\n")
                file.flush()
    except OSError as problem:
        raise StorageError(f"{target}: cannot be written ({problem}).") from problem
    return len(work)


def answered(target: Path) -> set[int]:
    """Lines that have their answer; what a kill left of another is cut off."""
    if not target.exists():
        return set()
    whole = target.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        target.write_bytes(kept)
    try:
        return {json.loads(line)["line"] for line in kept.splitlines()}
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(f"{target}: holds something else than answers; name another file for --output.") from problem


def read_requests(service: Service, source: Path, sampling: Sampling) -> list[tuple[int, tuple[int, ...], Sampling]]:
    """(line number, token ids, sampling) of each line; everything is checked before anything is computed."""
    try:
        lines = source.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{source}: cannot be read ({problem}).") from problem
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append((number, *_request(service, json.loads(line), sampling)))
            except (ValueError, TypeError, OptionError) as problem:
                raise DataError(f"{source}, line {number}: {problem}") from problem
    return found


def _request(service: Service, given: Any, sampling: Sampling) -> tuple[tuple[int, ...], Sampling]:
    if not isinstance(given, dict) or not (("prompt" in given) ^ ("messages" in given)):
        raise ValueError('give an object with either "prompt" or "messages"')
    if unknown := sorted(given.keys() - OPTIONS - {"prompt", "messages"}):
        raise ValueError(f"unknown field {unknown[0]!r}; known are prompt, messages, {', '.join(sorted(OPTIONS))}")
    spoken = "messages" in given
    tokens = chat_tokens(service.tokenizer, given["messages"]) if spoken else service.encode(given["prompt"])
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    sampling = replace(sampling, **{name: value for name, value in options.items() if name in OPTIONS})
    service.engine.fits(len(tokens), sampling)
    return tokens, sampling


def _finished(
    service: Service, work: list[tuple[int, tuple[int, ...], Sampling]]
) -> Iterator[tuple[int, list[Completion]]]:
    """Completions as requests finish, with enough of them in the engine to fill its seats."""
    waiting, running = iter(work), service.gathering()
    for number, tokens, sampling in waiting:
        running.ask(number, tokens, sampling)
        if running.count >= AHEAD * service.engine.serving.seats:
            yield running.next()
    while running.count:
        yield running.next()


def _line(number: int, completion: Completion) -> dict[str, Any]:
    usage = {"prompt_tokens": completion.prompt_tokens, "new_tokens": len(completion.chosen)}
    return {
        "line": number,
        "index": completion.index,
        "text": completion.text,
        "finish_reason": completion.finish,
        **usage,
    }
