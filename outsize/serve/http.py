"""OpenAI's endpoints over a service. Who goes away is forgotten: its pages are free one step later."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from outsize.errors import OptionError, OutsizeError, RunError
from outsize.plan import Plan
from outsize.serve.chat import chat_tokens
from outsize.serve.metrics import EngineMetrics
from outsize.serve.openapi import TEXT, answers, complete, takes, takes_path
from outsize.serve.page import page
from outsize.serve.reply import Reply
from outsize.serve.request import Event, Sampling
from outsize.serve.request import Request as EngineRequest
from outsize.serve.service import Completion, Service
from outsize.serve.shapes import (
    COMPLETION_TOKENS,
    ChatBody,
    Common,
    CompletionBody,
    Problem,
    TokenizeBody,
)
from outsize.serve.stats import Stats

Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request], Awaitable[Response]]
STATUS_OF = {OptionError: 400, RunError: 503}
NAMED_HERE = {"max_new_tokens": "max_tokens", "json_schema": "response_format"}  # what the engine calls otherwise


@dataclass(frozen=True)
class Limits:
    """What clients may do. Bytes of a request, seconds until it must be answered, requests that wait for a seat; with no
    `keys`, everybody may ask."""

    body_bytes: int = 4 << 20
    seconds: float = 600.0
    waiting: int = 256
    keys: frozenset[str] = frozenset()


class Server:
    """`app` answers for `service` under the model's `name`."""

    def __init__(self, service: Service, name: str, limits: Limits, plan: Plan) -> None:
        self.service, self.name, self.limits = service, name, limits
        self.metrics, self.stats = EngineMetrics(service.engine), Stats(service, plan)
        self.started = int(time.time())
        self.app = FastAPI(title="Outsize", docs_url=None, redoc_url=None)
        self.app.get("/", include_in_schema=False)(page)
        self.app.get("/health", responses=answers(503))(self.health)
        self._route("GET", "/metrics", self.show_metrics, more=TEXT)
        self._route("GET", "/stats", self.show_stats)
        self._route("GET", "/v1/models", self.models)
        self._route("GET", "/v1/models/{model:path}", self.model, 404, more=takes_path("model"))
        more = takes(ChatBody, streams=True)
        self._route("POST", "/v1/chat/completions", self.chat, 400, 404, 413, 429, 503, more=more)
        more = takes(CompletionBody, streams=True)
        self._route("POST", "/v1/completions", self.complete, 400, 404, 413, 429, 503, more=more)
        self._route("POST", "/tokenize", self.tokenize, 400, 413, more=takes(TokenizeBody))
        self.app.add_exception_handler(404, self._not_found)
        self.app.add_exception_handler(405, self._not_found)
        complete(self.app.openapi(), name, service.vocabulary, self._context, bool(limits.keys))

    def _route(self, method: str, path: str, endpoint: Endpoint, *errors: int, more: Any = None) -> None:
        """Answer at `path` those who have a key; `errors` and `more` are for the description."""
        add = self.app.add_api_route
        add(path, self._guarded(endpoint), methods=[method], responses=answers(401, *errors), openapi_extra=more)

    # -- small endpoints --------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        well = self.service.failure is None
        return JSONResponse({"status": "ok" if well else "failed"}, 200 if well else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

    async def show_stats(self, request: Request) -> Response:
        tokenizer = self.service.tokenizer
        chat = tokenizer is not None and bool(tokenizer.chat_template)
        model = {"name": self.name, "context": self._context, "chat": chat}
        return JSONResponse({"model": model, **self.stats.read()})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        body = await self._read(request, TokenizeBody)
        if (body.prompt is None) == (body.messages is None):
            raise Problem(400, "give either prompt or messages", None, "prompt")
        if body.messages is not None:
            tokens = chat_tokens(self.service.tokenizer, [message.plain() for message in body.messages])
        else:
            tokens = self.service.encode(body.prompt or "")
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self._context})

    # -- completions --------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise Problem(400, "top_logprobs needs logprobs to be true", None, "top_logprobs")
        tokens = chat_tokens(self.service.tokenizer, [message.plain() for message in body.messages])
        given = [most for most in (body.max_completion_tokens, body.max_tokens) if most is not None]
        most = given[0] if given else max(1, self._context - len(tokens))
        sampling = body.sampling(most, (body.top_logprobs or 0) if body.logprobs else None, self.service.vocabulary)
        return await self._answer(request, body, [tokens], sampling, chat=True)

    async def complete(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        self._check_model(body.model)
        prompts, vocabulary = [self.service.encode(prompt) for prompt in body.prompts()], self.service.vocabulary
        if wrong := [token for tokens in prompts for token in tokens if token >= vocabulary]:
            raise Problem(400, f"prompt: {wrong[0]} is not a token of {vocabulary}", None, "prompt")
        most = body.max_tokens if body.max_tokens is not None else COMPLETION_TOKENS
        sampling = body.sampling(most, body.logprobs, vocabulary)
        return await self._answer(request, body, prompts, sampling, chat=False)

    async def _answer(
        self, request: Request, body: Common, prompts: list[tuple[int, ...]], sampling: Sampling, chat: bool
    ) -> Response:
        await self._admit(prompts, sampling, "messages" if chat else "prompt")
        usage = body.stream_options is not None and body.stream_options.include_usage
        reply = Reply(self.name, self.service.tokenizer, chat, sampling.logprobs is not None, usage)
        asked = [
            EngineRequest(tokens, sampling, lambda event: None, self._key(request), body.priority) for tokens in prompts
        ]
        completions = [Completion(i, prompt_tokens=len(one.prompt)) for one in asked for i in range(sampling.n)]
        events = self._events(asked, completions)
        if body.stream:
            return StreamingResponse(self._chunks(reply, events, completions, usage), media_type="text/event-stream")
        await _unless_gone(request, _exhaust(events))
        return JSONResponse(reply.whole(completions))

    async def _events(
        self, asked: list[EngineRequest], completions: list[Completion]
    ) -> AsyncIterator[tuple[int, Event]]:
        """Events of several requests as they come, each with the number of its completion. Ended early, it cancels."""
        n = asked[0].sampling.n
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        deadline = loop.time() + self.limits.seconds
        for number, one in enumerate(asked):
            one.listener = _listener(loop, heard, number * n)
        try:
            for one in asked:
                self.service.submit(one)
            while any(completion.finish is None for completion in completions):
                async with asyncio.timeout_at(deadline):
                    number, event = await heard.get()
                if isinstance(event.error, OutsizeError):
                    raise event.error
                if event.error is not None:
                    raise RunError(f"The engine has stopped: {event.error}") from event.error
                completions[number].add(event)
                completions[number].cached_tokens = asked[number // n].cached_tokens
                yield number, event
        except TimeoutError as problem:
            raise Problem(503, f"not finished within {self.limits.seconds:g} seconds", "timeout") from problem
        finally:
            for one in asked:
                self.service.cancel(one)

    async def _chunks(
        self,
        reply: Reply,
        events: AsyncIterator[tuple[int, Event]],
        completions: list[Completion],
        usage: bool,
    ) -> AsyncIterator[str]:
        """Server-sent events as the official client reads them."""
        async with aclosing(events):  # pyright: ignore[reportArgumentType]
            try:
                for number in range(len(completions) if reply.chat else 0):
                    yield _sent(reply.opening(number))
                async for number, event in events:
                    if event.text or event.finish is not None or event.chosen is not None and event.chosen.logprob:
                        yield _sent(reply.chunk(number, event))
                if usage:
                    yield _sent(reply.closing(completions))
                yield "data: [DONE]\n\n"
            except (Problem, OutsizeError) as problem:
                yield _sent(_as_problem(problem).body)

    # -- who may ask what -----------------------------------------------------------------------------------------------

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        @wraps(endpoint)
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await endpoint(request)
            except (Problem, OutsizeError) as problem:
                found = _as_problem(problem)
                response = JSONResponse(found.body, found.status, found.headers)
            self.metrics.answered[response.status_code] += 1
            return response

        return guarded

    def _key(self, request: Request) -> str:
        return request.headers.get("authorization", "").removeprefix("Bearer ").strip()

    def _check_key(self, request: Request) -> None:
        given = self._key(request).encode()
        if self.limits.keys and not any([hmac.compare_digest(given, key.encode()) for key in self.limits.keys]):
            raise Problem(401, "this API key is not known here", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise Problem(404, f"there is no model {name!r} here, only {self.name!r}", "model_not_found", "model")

    async def _admit(self, prompts: list[tuple[int, ...]], sampling: Sampling, named: str) -> None:
        await asyncio.to_thread(self._fit, prompts, sampling, named)  # it may compile a schema
        if self.service.engine.waiting + len(prompts) > self.limits.waiting:
            message = f"{self.limits.waiting} requests wait already; try again later"
            raise Problem(429, message, "rate_limit_exceeded", headers={"Retry-After": "1"})

    def _fit(self, prompts: list[tuple[int, ...]], sampling: Sampling, named: str) -> None:
        """Raises Problem, or OptionError, when a prompt and its answer cannot be served."""
        for tokens in prompts:
            if len(tokens) + sampling.max_new_tokens > self._context:
                message = (
                    f"{len(tokens)} tokens of prompt and {sampling.max_new_tokens} new ones are more than the context of "
                    f"{self._context} tokens"
                )
                raise Problem(400, message, "context_length_exceeded", named)
            self.service.fits(tokens, sampling)

    async def _read(self, request: Request, shape: type[Body]) -> Body:
        received = bytearray()
        try:
            async for piece in request.stream():
                received += piece
                if len(received) > self.limits.body_bytes:
                    raise Problem(413, f"a request has at most {self.limits.body_bytes} bytes", "request_too_large")
        except ClientDisconnect as problem:
            raise Problem(499, "the client went away", "cancelled") from problem
        try:
            return shape.model_validate_json(bytes(received))
        except ValidationError as problem:
            first = problem.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = "there is no such parameter here" if first["type"] == "extra_forbidden" else first["msg"]
            raise Problem(400, f"{where or 'the body'}: {what}", None, where.partition(".")[0] or None) from problem

    async def _not_found(self, request: Request, problem: Exception) -> Response:
        status = getattr(problem, "status_code", 404)
        found = Problem(status, f"there is no {request.method} {request.url.path} here", "not_found")
        return JSONResponse(found.body, found.status)

    # -- facts ------------------------------------------------------------------------------------------------------------

    def _card(self) -> dict[str, Any]:
        card = {"id": self.name, "object": "model", "created": self.started, "owned_by": "outsize"}
        return {**card, "max_model_len": self._context}

    @property
    def _context(self) -> int:
        return self.service.engine.serving.context


def _listener(
    loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[tuple[int, Event]], first: int
) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(heard.put_nowait, (first + event.index, event))

    return listen


async def _exhaust(events: AsyncIterator[Any]) -> None:
    async with aclosing(events):  # pyright: ignore[reportArgumentType]
        async for _ in events:
            pass


async def _unless_gone(request: Request, work: Any) -> None:
    """Do the work, unless the client goes away before it is done: then it is cancelled."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Problem(499, "the client went away", "cancelled")
        working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_problem(problem: Exception) -> Problem:
    if isinstance(problem, Problem):
        return problem
    status = STATUS_OF.get(type(problem), 500)  # pyright: ignore[reportArgumentType, reportCallIssue]
    named, _, rest = str(problem).partition(" ")
    if status != 400 or named not in Sampling.__dataclass_fields__:
        return Problem(status, str(problem))
    here = NAMED_HERE.get(named, named)
    return Problem(status, f"{here} {rest}", None, here)


def _sent(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
