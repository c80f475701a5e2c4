"""The nouns of serving: what somebody asks for, a sequence of tokens that is being continued, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import torch

from outsize.errors import OptionError, OutsizeError
from outsize.serve.text import TextStream


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 takes the likeliest. Filters apply in the order top-k, top-p, min-p;
    penalties as OpenAI (`presence`, `frequency`) and CTRL (`repetition`, arXiv 1909.05858) define them.

    `json_schema`, a schema as text: the answer is JSON that obeys it, unless it is cut short.
    `seed` makes a request's draws its own: the same whatever else is in the batch, as far as the logits are the same."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logprobs: int | None = None
    n: int = 1
    seed: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Raises OptionError naming the parameter that is out of range."""
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise OptionError(f"{name} is {value}; it must be from {least} to {most}.")
        if len(self.stop) > STOPS or not all(self.stop):
            raise OptionError(f"stop takes up to {STOPS} strings, none of them empty.")

    @property
    def plain(self) -> bool:
        """Nothing but the likeliest token is asked for."""
        changed = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.logit_bias
        return self.temperature == 0 and self.logprobs is None and self.json_schema is None and not changed


STOPS = 16  # strings at which an answer may end
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1 << 30), "temperature": (0, 100), "top_k": (0, 1 << 30), "top_p": (0, 1), "min_p": (0, 1),
    "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2), "repetition_penalty": (0.01, 100), "logprobs": (0, 20),
    "n": (1, 128), "seed": (-(1 << 63), (1 << 63) - 1),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """A sampled token. `logprobs`, when asked for: (token, natural logarithm of its probability), likeliest first, and
    `logprob` that of the token itself; both of the model's own distribution, before temperature and filters."""

    token: int
    logprob: float | None = None
    logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What a request hears: one token of its completion number `index`, the text that it completes, or the end."""

    index: int
    chosen: Chosen | None
    text: str = ""
    finish: str | None = None
    """None while it goes on; then `stop`, `length`, `cancelled` or `error`."""
    error: BaseException | None = None


Listener = Callable[[Event], None]


class Constraint(Protocol):
    """What an answer must be like, token by token."""

    error: OutsizeError | None

    def restrict(self, scores: torch.Tensor) -> None:
        """Rule out, in place, every token in `scores` [vocabulary] that cannot come next."""
        ...

    def accept(self, token: int) -> bool:
        """Take the token that was chosen. True when the answer is complete."""
        ...


class State(Enum):
    """Each docstring line says what occupies memory."""

    WAITING = "waiting"  # no page is held
    RUNNING = "running"  # pages for all computed tokens
    COMING = "coming"  # pages for tokens whose keys and values are on their way from another tier
    FINISHED = "finished"  # no page is held


@dataclass(eq=False)
class Request:
    """What one client asks for: `n` completions of one prompt. `key` is whose share of the machine it takes; of two
    requests the one with the higher `priority` goes first, where the policy looks at it. `constrain` makes each completion
    its constraint."""

    prompt: tuple[int, ...]
    sampling: Sampling
    listener: Listener
    key: str = ""
    priority: int = 0
    cancelled: bool = False
    cached_tokens: int = 0
    constrain: Callable[[], Constraint] | None = None
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(eq=False)
class Sequence:
    """One completion of a request. Tokens before `computed` have their keys and values in `pages`."""

    request: Request
    index: int
    arrival: int
    tokens: list[int]
    generator: torch.Generator | None = None
    text: TextStream | None = None
    constraint: Constraint | None = None
    state: State = State.WAITING
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    served: int = 0
    """Tokens computed for it so far, again after a preemption too: what a policy charges."""

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet; one while it decodes."""
        return len(self.tokens) - self.computed
