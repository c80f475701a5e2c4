"""A file of prompts to a file of answers, which can be stopped at any time and continued."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from outsize.errors import DataError, OptionError, StorageError
from outsize.serve.chat import chat_tokens
from outsize.serve.request import Sampling
from outsize.serve.service import Completion, Service

AHEAD = 4  # requests in the engine for each of its seats, so that none stays empty
DEFAULTS = asdict(Sampling())
OPTIONS = DEFAULTS.keys()


@dataclass(frozen=True)
class Line:
    """A line of a file of prompts."""

    number: int
    tokens: tuple[int, ...]
    sampling: Sampling
    model: str

    @cached_property
    def digest(self) -> str:
        """Of what is asked, and who: its answers bear it, so that others are not taken for them."""
        options = {name: value for name, value in asdict(self.sampling).items() if value != DEFAULTS[name]}
        return sha256(json.dumps([self.model, self.tokens, options], sort_keys=True).encode()).hexdigest()[:16]


def answer_file(service: Service, source: Path, target: Path, sampling: Sampling) -> int:
    """Append to `target` the answer to each line of `source` that has none there yet, as each is finished, and put all in
    order at the end; how many were missing.

    A line of `source` has `prompt` (text or token ids) or `messages`, and perhaps options of its own. A line of `target`
    has its `line` number, a digest of the `request`, `text`, `finish_reason` and token counts, for each of `n`
    completions one; a last answer that is not whole, of a run that was killed, is written anew. So however often it was
    stopped, the file comes out the same. Raises DataError naming the line that cannot be read, or that is not what was
    answered, StorageError when `target` cannot be written."""
    lines = read_lines(service, source, sampling)
    done = answered(target, {line.number: line for line in lines})
    work = [line for line in lines if line.number not in done]
    try:
        with target.open("a") as file:
            for line, completions in _finished(service, work):
                file.write("".join(json.dumps(_answer(line, one)) + "\n" for one in completions))
                file.flush()
        _put_in_order(target)
    except OSError as problem:
        raise StorageError(f"{target}: cannot be written ({problem}).") from problem
    return len(work)


def answered(target: Path, lines: dict[int, Line]) -> set[int]:
    """Lines, by number, that have all their answers; what a kill left of the last is cut off.

    Raises DataError when a line, or the model, has changed since it was answered, or the file holds anything else."""
    if not target.exists():
        return set()
    whole = target.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        answers = [json.loads(line) for line in kept]
        numbers = [answer["line"] for answer in answers]
        changed = {answer["line"] for answer in answers if answer["request"] != lines[answer["line"]].digest}
        if changed:
            raise _changed(target, changed)
        found = Counter(numbers)
        if numbers and found[numbers[-1]] < lines[numbers[-1]].sampling.n:
            del kept[-found.pop(numbers[-1]) :]
        strangers = [number for number, count in found.items() if count != lines[number].sampling.n]
    except (ValueError, KeyError, TypeError) as problem:
        raise _no_answers(target) from problem
    if strangers:
        raise _no_answers(target)
    if sum(map(len, kept)) < len(whole):
        os.truncate(target, sum(map(len, kept)))
    return set(found)


def _changed(target: Path, numbers: set[int]) -> DataError:
    others = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return DataError(
        f"{target}: answers line {min(numbers)}{others} as it was before: the model, the input or an option has changed "
        "since. Name another file for --output, or remove these answers from it, and run again."
    )


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


def read_lines(service: Service, source: Path, sampling: Sampling) -> list[Line]:
    """Everything is checked before anything is computed."""
    try:
        lines = source.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{source}: cannot be read ({problem}).") from problem
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(Line(number, *_request(service, json.loads(line), sampling), service.identity))
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


def _finished(service: Service, work: list[Line]) -> Iterator[tuple[Line, list[Completion]]]:
    """Completions as requests finish, with enough of them in the engine to fill its seats."""
    by_number, running = {line.number: line for line in work}, service.gathering()

    def next_one() -> tuple[Line, list[Completion]]:
        number, completions = running.next()
        return by_number[number], completions

    for line in work:
        running.ask(line.number, line.tokens, line.sampling)
        if running.count >= AHEAD * service.engine.serving.seats:
            yield next_one()
    while running.count:
        yield next_one()


def _answer(line: Line, completion: Completion) -> dict[str, Any]:
    usage = {"prompt_tokens": completion.prompt_tokens, "new_tokens": len(completion.chosen)}
    return {
        "line": line.number,
        "request": line.digest,
        "index": completion.index,
        "text": completion.text,
        "finish_reason": completion.finish,
        **usage,
    }
