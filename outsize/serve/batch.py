"""A file of prompts to a file of answers, which can be stopped at any time and continued."""

from __future__ import annotations

import json
import os
from collections import Counter
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
    """Append to `target` the answer to each line of `source` that has none there yet, as each is finished, and put all in
    order at the end; how many were missing.

    A line of `source` has `prompt` (text or token ids) or `messages`, and perhaps options of its own. A line of `target`
    has its `line` number, `text`, `finish_reason` and token counts, for each of `n` completions one; a last answer that is
    not whole, of a run that was killed, is written anew. So however often it was stopped, the file comes out the same.
    Raises DataError naming the line that cannot be read, StorageError when `target` cannot be written."""
    requests = read_requests(service, source, sampling)
    done = answered(target, {number: sampling.n for number, _, sampling in requests})
    work = [request for request in requests if request[0] not in done]
    try:
        with target.open("a") as file:
            for number, completions in _finished(service, work):
                file.write("".join(json.dumps(_line(number, one)) + "\n" for one in completions))
                file.flush()
        _put_in_order(target)
    except OSError as problem:
        raise StorageError(f"{target}: cannot be written ({problem}).") from problem
    return len(work)


def answered(target: Path, completions: dict[int, int]) -> set[int]:
    """Lines that have as many answers as `completions` says; what a kill left of the last is cut off.

    Raises DataError when the file holds anything else."""
    if not target.exists():
        return set()
    whole = target.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        numbers = [json.loads(line)["line"] for line in kept]
        found = Counter(numbers)
        if numbers and found[numbers[-1]] < completions[numbers[-1]]:
            del kept[-found.pop(numbers[-1]) :]
        strangers = [number for number, count in found.items() if count != completions[number]]
    except (ValueError, KeyError, TypeError) as problem:
        raise _no_answers(target) from problem
    if strangers:
        raise _no_answers(target)
    if sum(map(len, kept)) < len(whole):
        os.truncate(target, sum(map(len, kept)))
    return set(found)


def _no_answers(target: Path) -> DataError:
    return DataError(f"{target}: holds something else than answers to this input; name another file for --output.")


def _put_in_order(target: Path) -> None:
    """Sort the answers by line and completion, in one stroke."""
    lines = target.read_text().splitlines(keepends=True)
    keys = [(found["line"], found["index"]) for found in map(json.loads, lines)]
    if keys != sorted(keys):
        draft = target.with_name(target.name + ".draft")
        draft.write_text("".join(line for _, line in sorted(zip(keys, lines, strict=True))))
        draft.replace(target)


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
    if isinstance(schema := options.get("json_schema"), dict):
        options["json_schema"] = json.dumps(schema)
    sampling = replace(sampling, **{name: value for name, value in options.items() if name in OPTIONS})
    service.fits(tokens, sampling)
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
