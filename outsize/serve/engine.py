"""The engine: many requests, one packed forward a step. Schedule, run, sample.

Not for several threads at once, but for `submit` and `cancel`, which any thread may call: what they ask for happens at the
beginning of the next step. `outsize.serve.service` runs the steps in a thread of its own."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch

from outsize.errors import OptionError, RunError
from outsize.serve.far import FarPages
from outsize.serve.layout import Span
from outsize.serve.pace import Pace
from outsize.serve.pages import Pages
from outsize.serve.request import Chosen, Event, Request, Sampling, Sequence, State
from outsize.serve.runner import Runner
from outsize.serve.sampling import choose
from outsize.serve.schedule import Policy, Scheduler, Turn
from outsize.serve.text import TextStream

NO_NUMBERS = (
    "After {} tokens the model answers with NaN: its weights are damaged, or too large for their precision. Other requests "
    "are not touched; check the model's files."
)


@dataclass
class Totals:
    """What an engine has done since it began."""

    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0


class Engine:
    """Serves by what `runner` can do. `tokenizer`, if there is one, turns tokens into the text that events carry;
    `end_tokens` finish a completion."""

    def __init__(
        self,
        runner: Runner,
        policy: Policy,
        end_tokens: frozenset[int] = frozenset(),
        tokenizer: Any = None,
    ) -> None:
        self.runner, self.serving = runner, runner.serving
        self.model, self.store, self.cache = runner.model, runner.store, runner.cache
        self.end_tokens, self.tokenizer = end_tokens, tokenizer
        self.pace, self.far = Pace.planned(self.serving), None
        if runner.places is not None:
            self.far = FarPages(runner.places, self.serving.far_pages, self.pace)
        self.pages = Pages(self.serving.pages, self.serving.page_tokens, self.far)
        seats, step_tokens = self.serving.seats, self.serving.step_tokens
        self.scheduler = Scheduler(self.pages, policy, seats, step_tokens, runner.copy, self.far)
        self.totals = Totals()
        self._incoming: deque[Request] = deque()
        self._arrivals = 0

    # -- from any thread ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises OptionError when it does not fit."""
        self.fits(len(request.prompt), request.sampling)
        self._incoming.append(request)

    def fits(self, prompt_tokens: int, sampling: Sampling) -> None:
        """Raises OptionError when a prompt of so many tokens and its answer are longer than the context, or empty."""
        if not prompt_tokens:
            raise OptionError("The prompt has no tokens; give at least one.")
        if prompt_tokens + sampling.max_new_tokens > self.serving.context:
            raise OptionError(
                f"{prompt_tokens} tokens of prompt and {sampling.max_new_tokens} new ones are more than the "
                f"{self.serving.context} tokens of context that are served. Shorten the prompt or max_new_tokens."
            )

    def cancel(self, request: Request) -> None:
        """Forget a request: its pages are free from the next step on."""
        request.cancelled = True

    @property
    def waiting(self) -> int:
        """Requests that have computed nothing yet."""
        return len(self._incoming) + sum(s.state is State.WAITING for s in self.scheduler.sequences)

    @property
    def idle(self) -> bool:
        return not self._incoming and not self.scheduler.sequences and not self.scheduler.coming

    # -- the loop -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute the next tokens of as many sequences as may. False when there was nothing to do."""
        self._receive()
        turns = self.scheduler.schedule()
        if not turns:
            return False
        started = perf_counter()
        turns.sort(key=_together)
        logits = self._run(turns)
        self.pace.step(sum(turn.count for turn in turns), perf_counter() - started, self.store.transfers)
        self.scheduler.done(turns)
        self._sample([turn.sequence for turn in turns if turn.sequence.pending == 0], logits)
        if self.far is not None:
            self.far.collect()
            self.pages.save_ahead()
        self.totals.steps += 1
        return True

    def _receive(self) -> None:
        """New requests come in, cancelled ones go."""
        while self._incoming:
            request = self._incoming.popleft()
            request.sequences.append(self._sequence(request, 0))
            self.scheduler.add(request.sequences[0])
        for sequence in [s for s in self.scheduler.sequences if s.request.cancelled]:
            self._finish(sequence, "cancelled")

    def _run(self, turns: list[Turn]) -> torch.Tensor:
        """One packed forward: logits `[B, vocabulary]` after the last known token of each sequence that comes that far."""
        spans = [Span(turn.sequence.pages, turn.sequence.computed, turn.count) for turn in turns]
        tokens = [t for turn in turns for t in turn.sequence.tokens[turn.sequence.computed :][: turn.count]]
        ends = accumulate(turn.count for turn in turns)
        wanted = [end - 1 for turn, end in zip(turns, ends, strict=True) if turn.count == turn.sequence.pending]
        return self.runner.run(spans, tokens, wanted)

    def _sample(self, ready: list[Sequence], logits: torch.Tensor) -> None:
        """The next token of each; where a request wants several completions, they part ways at the first."""
        pairs = [(mate, row) for row, sequence in enumerate(ready) for mate in (sequence, *self._siblings(sequence))]
        rows = torch.tensor([row for _, row in pairs], device=logits.device)
        chosen = choose(logits if len(pairs) == len(ready) else logits[rows], [sequence for sequence, _ in pairs])
        for (sequence, _), choice in zip(pairs, chosen, strict=True):
            if choice is not None:
                self._continue(sequence, choice)
            else:
                self._finish(sequence, "error", RunError(NO_NUMBERS.format(len(sequence.tokens))))

    def _siblings(self, sequence: Sequence) -> list[Sequence]:
        request = sequence.request
        if len(request.sequences) == request.sampling.n:
            return []
        siblings = [self._sequence(request, index) for index in range(1, request.sampling.n)]
        request.sequences += siblings
        for sibling in siblings:
            self.scheduler.fork(sequence, sibling)
        return siblings

    def _sequence(self, request: Request, index: int) -> Sequence:
        self._arrivals += 1
        sampling, generator = request.sampling, None
        if sampling.temperature > 0:
            generator = torch.Generator(self.cache.device)
            generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed + index)
        text = TextStream(self.tokenizer, sampling.stop) if self.tokenizer is not None else None
        if index == 0:
            self.totals.prompt_tokens += len(request.prompt)
        constraint = request.constrain() if request.constrain is not None else None
        return Sequence(request, index, self._arrivals, list(request.prompt), generator, text, constraint)

    def _continue(self, sequence: Sequence, choice: Chosen) -> None:
        """Append a token and tell who asked."""
        sampling, constraint = sequence.request.sampling, sequence.constraint
        if constraint is not None and constraint.error is not None:
            self._finish(sequence, "error", constraint.error)
            return
        sequence.tokens.append(choice.token)
        self.totals.new_tokens += 1
        ended = choice.token in self.end_tokens and not sampling.ignore_end
        text = "" if sequence.text is None or ended else sequence.text.push(choice.token)
        complete = constraint is not None and constraint.accept(choice.token)
        stopped = ended or complete or (sequence.text is not None and sequence.text.stopped)
        full = sequence.new_tokens >= sampling.max_new_tokens
        sequence.request.listener(Event(sequence.index, choice, text))
        if stopped or full:
            self._finish(sequence, "stop" if stopped else "length")

    def _finish(self, sequence: Sequence, reason: str, error: BaseException | None = None) -> None:
        rest = sequence.text.finish() if sequence.text is not None else ""
        self.scheduler.remove(sequence)
        self.totals.finished += 1
        sequence.request.listener(Event(sequence.index, None, rest, reason, error))

    def fail(self, error: BaseException) -> None:
        """Everybody who still waits is told what went wrong."""
        self._receive()
        for sequence in list(self.scheduler.sequences):
            self._finish(sequence, "error", error)

    # -- the whole --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Integrity between steps: raises AssertionError unless every page is held by those that say so."""
        self.pages.check(self.scheduler.holding())
        if self.far is not None:
            self.far.check()

    def close(self) -> None:
        self.scheduler.close()
        if self.far is not None:
            self.far.close()
        self.runner.close()


def _together(turn: Turn) -> tuple[bool, int]:
    """Sequences that decode lie side by side by their length: those that attend in one call are then one run of the step."""
    return turn.count > 1, turn.sequence.computed
