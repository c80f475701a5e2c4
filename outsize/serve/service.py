"""An engine that runs by itself: one thread steps, any other may ask."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any, Self

from outsize.errors import OptionError, RunError
from outsize.machine.threads import start_computing
from outsize.serve.constraint import Schemas
from outsize.serve.engine import Engine
from outsize.serve.request import Chosen, Event, Request, Sampling

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """What a request got: text and tokens, why it ended (`stop` or `length`), and how many of the prompt's tokens were
    known already."""

    index: int = 0
    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def tokens(self) -> list[int]:
        return [choice.token for choice in self.chosen]

    def add(self, event: Event) -> None:
        self.text += event.text
        self.finish = event.finish or self.finish
        if event.chosen is not None:
            self.chosen.append(event.chosen)


class Service:
    """Runs `engine` in a thread while there is anything to do, and checks its pages whenever there is nothing more.
    `busy_seconds`: in steps so far; `identity` tells the model from others. `close` when nobody asks any more."""

    def __init__(self, engine: Engine, identity: str, release: Callable[[], None]) -> None:
        self.engine, self.identity, self._release = engine, identity, release
        self.failure: BaseException | None = None
        self.busy_seconds = 0.0
        self.schemas = Schemas(engine.tokenizer, self.vocabulary, engine.end_tokens)
        self._work = threading.Condition()
        self._closing = False
        self._thread = start_computing(self._run, "engine", daemon=True)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None."""
        return self.engine.tokenizer

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows: ids are smaller."""
        model: Any = self.engine.model
        return int(model.config.get_text_config().vocab_size)

    # -- asking -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Raises OptionError for a request that cannot be served, RunError when the engine has stopped."""
        self.fits(request.prompt, request.sampling)
        if (schema := request.sampling.json_schema) is not None:
            request.constrain = partial(self.schemas.constraint, schema)
        with self._work:
            if self._closing or self.failure is not None:
                raise RunError(f"The engine has stopped: {self.failure or 'it is closed'}.")
            self.engine.submit(request)
            self._work.notify()

    def fits(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raises OptionError when a prompt and its answer cannot be served: too long, empty, or of no usable schema."""
        self.engine.fits(len(prompt), sampling)
        if sampling.json_schema is not None:
            self.schemas.constraint(sampling.json_schema)

    def cancel(self, request: Request) -> None:
        with self._work:
            self.engine.cancel(request)
            self._work.notify()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, which may be ids already."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise OptionError("The model has no tokenizer beside its weights; give token ids.")
        return tuple(self.tokenizer(prompt)["input_ids"])

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **options: Any) -> list[Completion]:
        """Continue every prompt; `sampling.n` completions each, in order. `options` are fields of `Sampling`."""
        chosen, running = replace(sampling or Sampling(), **options), self.gathering()
        for number, prompt in enumerate(prompts):
            running.ask(number, self.encode(prompt), chosen)
        found = dict(running.next() for _ in prompts)
        return [completion for number in range(len(prompts)) for completion in found[number]]

    def gathering(self) -> Gathering:
        """For many requests at once: ask as many as you like, and take them as they finish."""
        return Gathering(self)

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Iterator[Event]:
        """Events of one prompt as they come. Leaving the loop early cancels the request."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = Request(self.encode(prompt), replace(sampling or Sampling(), **options), events.put)
        self.submit(request)
        return self._following(request, events)

    def _following(self, request: Request, events: queue.SimpleQueue[Event]) -> Iterator[Event]:
        left = request.sampling.n
        try:
            while left:
                event = _checked(events.get())
                left -= event.finish is not None
                yield event
        finally:
            if left:
                self.cancel(request)

    async def astream(self, request: Request) -> AsyncIterator[Event]:
        """Events of a request whose listener is not set yet, in this event loop. Leaving early cancels the request."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            with suppress(RuntimeError):  # the event loop has ended, and with it whoever asked
                loop.call_soon_threadsafe(events.put_nowait, event)

        request.listener = listen
        self.submit(request)
        left = request.sampling.n
        try:
            while left:
                event = _checked(await events.get())
                left -= event.finish is not None
                yield event
        finally:
            if left:
                self.cancel(request)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._await_work():
                began = perf_counter()
                self.engine.step()
                self.busy_seconds += perf_counter() - began
                if self.engine.idle:
                    self.engine.check()
        except BaseException as error:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """Tell everybody that the engine has stopped, which it has, or waits for ever for another worker."""
        with self._work:
            self.failure = error
        self.engine.fail(error)

    def _await_work(self) -> bool:
        with self._work:
            self._work.wait_for(lambda: not self.engine.idle or self._closing)
            return not self._closing

    def close(self) -> None:
        """Stop after the step under way; who still waits is told so. Frees what the engine holds."""
        with self._work:
            if self._closing:
                return
            self._closing = True
            self._work.notify()
        self._thread.join()
        self.engine.fail(RunError("The engine was closed."))
        self.engine.close()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Gathering:
    """Requests under way, and what has come of each."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._requests: dict[int, tuple[Request, list[Completion]]] = {}

    @property
    def count(self) -> int:
        return len(self._requests)

    def ask(self, number: int, prompt: tuple[int, ...], sampling: Sampling) -> None:
        """`number` is by what the answer will be known."""
        request = Request(prompt, sampling, lambda event: self._events.put((number, event)))
        completions = [Completion(index, prompt_tokens=len(prompt)) for index in range(sampling.n)]
        self._service.submit(request)
        self._requests[number] = request, completions

    def next(self) -> tuple[int, list[Completion]]:
        """Wait until another request is finished."""
        while True:
            number, event = self._events.get()
            request, completions = self._requests[number]
            completions[_checked(event).index].add(event)
            if all(completion.finish for completion in completions):
                for completion in completions:
                    completion.cached_tokens = request.cached_tokens
                del self._requests[number]
                return number, completions


def _checked(event: Event) -> Event:
    if event.error is not None:
        raise event.error
    return event
