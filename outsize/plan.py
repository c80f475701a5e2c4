"""The Plan: one frozen value with every decision in it. Whoever runs a job obeys it and decides nothing."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from outsize.divided import LOOP, Divided
from outsize.errors import OptionError
from outsize.fields import read_fields
from outsize.sizes import format_size

WIDTH = 80  # columns that a plan prints itself on
SPARE = 0.02  # of the budget: as much as predictions are off, and a plan made elsewhere may find less
STORED, INT8, INT4 = "stored", "int8", "int4"  # precisions of a plan for serving
LATITUDE = 0.04  # of its prediction, by which a peak may be above it: less than the 5% by which it may be off
CAUSES = {
    "compute_seconds": "compute",
    "update_seconds": "update",
    "wire_wait_seconds": "exchanging with other workers",
    "read_wait_seconds": "waiting for reads",
    "write_wait_seconds": "waiting for writes",
}
"""What a step's seconds go to, of those predicted and those measured."""


@dataclass(frozen=True)
class Predicted:
    """What a plan says will be measured. Bytes and seconds, of one step where it says so; 0 device bytes without a GPU.

    `bytes_read`, `bytes_written` and `moved` (source, destination, kind, bytes) are means of steps in the middle of a run,
    commits included, evaluation and samples not. `memory` is (cause, bytes), which add up to the host's peak, and
    `device_memory` to the device's. `timeline` is what one step does when: (compute, update, wire, waiting, read or write,
    begin, end); `tensors` is (time, bytes of its tensors from then on). `wire_bytes` come from other workers. None: not
    predicted."""

    host_peak_bytes: int
    device_peak_bytes: int
    bytes_read: int
    bytes_written: int
    disk_bytes: int
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    compute_seconds: float | None = None
    update_seconds: float | None = None
    read_wait_seconds: float | None = None
    write_wait_seconds: float | None = None
    wire_wait_seconds: float | None = None
    wire_bytes: int = 0
    floating_operations: float | None = None
    moved: tuple[tuple[str, str, str, int], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    device_memory: tuple[tuple[str, int], ...] = ()
    timeline: tuple[tuple[str, float, float], ...] = field(default=(), repr=False)
    tensors: tuple[tuple[float, int], ...] = field(default=(), repr=False)


NEAR = "near"  # as the home of activations: they stay where they came into being


@dataclass(frozen=True)
class Activations:
    """What a unit leaves behind in forward for its backward, and where that waits. Every choice is exact.

    `saved`: `all` that autograd saves; only the unit's `input`, and forward runs again; or the input and the results of
    `attention`, or of matrix `products` and attention, and forward runs again without computing these. `home` is a tier,
    or `near`."""

    saved: str = "all"
    home: str = NEAR

    def __post_init__(self) -> None:
        if self.saved not in ("all", "products", "attention", "input"):
            raise OptionError(
                f"Activations {self.saved!r} cannot be saved; there are all, products, attention and input."
            )


KEEP, RECOMPUTE, MOVE = Activations(), Activations("input"), Activations("all", "disk")
KEEP_ATTENTION = Activations("attention")  # the dearest to compute of what takes little room: the rest is recomputed
MOVE_TO_HOST, INPUT_TO_HOST = Activations("all", "host"), Activations("input", "host")  # from a device


@dataclass(frozen=True)
class KvLayer:
    """What a layer keeps of every token it has seen: keys and values of `heads` heads, in torch's `dtype` of that name.
    With a `window`, a token sees that many tokens, itself among them."""

    heads: int
    key_size: int
    value_size: int
    dtype: str
    window: int | None = None


@dataclass(frozen=True)
class Serving:
    """How much is served at once: `pages` of `page_tokens` tokens' keys and values, `seats` sequences in a step that
    computes up to `step_tokens` tokens, each sequence up to `context` tokens long. `far_pages`: of pages for which there
    is no place near, so many lie on disk. `token_seconds`: what a token of a prompt takes to be computed, and its keys
    and values to be read from there and written there, as far as that is known."""

    layers: tuple[KvLayer, ...]
    pages: int
    page_tokens: int
    page_bytes: int
    step_tokens: int
    seats: int
    context: int
    far_pages: int = 0
    token_seconds: tuple[float, float, float] = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Served:
    """What requests will see: `requests` of the whole context hold pages at once, the others wait. With contexts half full,
    `alone` and (`sequences` of them) `together` get so many tokens a second. A prompt of `prompt` tokens has its first
    answer after `first_token_seconds`, being read at `reading` tokens a second; beside a reader a step takes longer than
    `step_seconds`, but no longer than one of its chunks."""

    requests: int
    sequences: int
    alone: float
    together: float
    prompt: int
    first_token_seconds: float
    reading: float
    step_seconds: float


@dataclass(frozen=True)
class Plan(Divided):
    """Where every kind of byte lives, and how each unit runs.

    With `device_bytes` a device computes, and uses up to so many of its memory; with 0 the host does.
    `near_weights` and `near_states` name the weights whose bytes, or whose optimizer state, stay near compute; those of
    `host_weights` and `host_states` live in the memory of a device's host, all others on disk; of these states those of
    `host_updates` are updated there, by its processors. `arena_bytes` is the near
    memory through which those stream. `activations` says what is done with those of each unit it names, the others
    keep theirs; of what moves, tensors smaller than `moved_tensor_bytes`
    stay. `parts` are modules of repeated units, as they are called there, that are leased one after the other while the
    unit runs, which leases the rest; none: it leases all at once. `table_rows` says how many rows of a vocabulary's table
    make a block; a weight that is not in it is one block. `hold`: gradients wait in `gradient_home` until the step's end,
    and the update is a second pass that overlaps the next forward. `recycle_bytes`: the C library keeps freed memory of
    tensors up to this size, until the
    process holds what is `predicted`; until it is looked again `headroom_bytes` more may come. `blocked_loss`:
    the head and its loss are computed over blocks of the vocabulary. `shared_bytes`: all blocks together, when they
    stay near in memory that outlives the process, each with a twin; 0: they do not. Of several `workers` each has its
    share of every optimizer state; from the level `zero` 2 on also of gradients that wait, and of `split_weights`. Of
    these all together have `weight_copies`: one, or one on each of several `nodes`, or for each `close` neighbours there;
    up to `gather_ahead_bytes` of them are gathered before they are needed, while compute goes on. What is divided is so
    in proportion to `shares`, equally if there are none, and so are a step's sequences to `sequences`; the plan is that
    of worker `rank`. With `legs` they are a pipeline: each leg has so many of the repeated units, and micro-batches go
    from one to the next in the order of `schedule` (gpipe, 1f1b, interleaved, v or zero-bubble); of several workers of a
    leg each has its share, as said, and of more legs than workers each has several, as `legs_shape` says. `packed`:
    weights near, in groups that are multiplied at once, which are held as the processor's matrix products read them.
    `serving`: what a plan for serving says beside, and `served` what that means for requests."""

    precision: str
    arena_bytes: int
    near_weights: frozenset[str] = frozenset()
    near_states: frozenset[str] = frozenset()
    host_weights: frozenset[str] = frozenset()
    host_states: frozenset[str] = frozenset()
    host_updates: frozenset[str] = frozenset()
    gradient_home: str = "disk"
    activations: tuple[tuple[str, Activations], ...] = ()
    moved_tensor_bytes: int = 256 << 10
    parts: tuple[str, ...] = ()
    table_rows: tuple[tuple[str, int], ...] = ()
    blocked_loss: bool = False
    accumulate: int = 1
    hold: bool = False
    clip: float | None = None
    moments: str = "fp32"
    commit_every: int = 1
    recycle_bytes: int = 32 << 20
    headroom_bytes: int = 0
    shared_bytes: int = 0
    workers: int = 1
    nodes: int = 1
    close: int = 1
    zero: int = 3
    split_weights: frozenset[str] = frozenset()
    weight_copies: int = 1
    gather_ahead_bytes: int = 0
    sequences: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()
    rank: int = 0
    legs: tuple[int, ...] = ()
    legs_shape: str = LOOP
    schedule: str = "1f1b"
    packed: tuple[tuple[str, ...], ...] = ()
    memory_bytes: int | None = None
    device_bytes: int = 0
    predicted: Predicted | None = None
    serving: Serving | None = None
    served: Served | None = None
    reasons: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.gradient_home not in (self.near, "host", "disk"):
            raise OptionError(
                f"A plan's gradient_home cannot be {self.gradient_home!r}; it is {self.near}, host or disk."
            )
        for name, count in (("commit_every", self.commit_every), ("accumulate", self.accumulate), *self.table_rows):
            if count < 1:
                raise OptionError(f"A plan's {name} cannot be {count}; it is at least 1.")
        if self.shares and (len(self.shares) != self.workers or 0 in self.shares):
            raise OptionError(
                f"A plan's shares cannot be {list(self.shares)} for {self.workers} workers; each has one, of at least 1."
            )

        nested = [name for name in self.parts if name.startswith(tuple(f"{other}." for other in self.parts))]
        twice = [name for name in self.parts if not name or self.parts.count(name) > 1]
        if nested or twice:
            raise OptionError(
                f"A plan's parts cannot have {(nested + twice)[0]!r}, which lies in another one, is there twice or is the "
                "unit itself. Leave it out."
            )
        if self.gather_ahead_bytes and len(set(self.sequences)) > 1:
            raise OptionError(
                "A plan's gather_ahead_bytes is for workers who take equally many sequences, and they take "
                f"{list(self.sequences)}. Make it 0."
            )

    @property
    def near(self) -> str:
        """The tier that computes."""
        return "device" if self.device_bytes else "host"

    def home_of(self, weight: str) -> str:
        """The tier that a weight's bytes live in."""
        return self._home(weight, self.near_weights, self.host_weights)

    def home_of_state(self, weight: str) -> str:
        """The tier that its optimizer state lives in."""
        return self._home(weight, self.near_states, self.host_states)

    def _home(self, weight: str, near: frozenset[str], host: frozenset[str]) -> str:
        return self.near if weight in near else "host" if weight in host else "disk"

    @property
    def ceiling_bytes(self) -> int:
        """Where the process is to give back what the C library keeps: at the predicted peak; where the budget has room, a
        little above (`LATITUDE`), so that a prediction somewhat too low costs no time."""
        if self.predicted is None:
            return sys.maxsize
        most = self.predicted.host_peak_bytes
        room = int((1 - SPARE) * (self.memory_bytes or 0)) - self.headroom_bytes
        return max(most, min(int((1 + LATITUDE) * most), room))

    @property
    def alike(self) -> tuple[Any, ...]:
        """What must be the same in the plans of all workers of a run."""
        if self.legs:
            return self.legs, self.legs_shape, self.schedule, self.blocked_loss, self.hold, self.commit_every
        return (
            *(self.activations, self.parts, self.table_rows, self.blocked_loss, self.hold, self.commit_every),
            *(
                tuple(sorted(self.split_weights)),
                self.weight_copies,
                self.gather_ahead_bytes,
                self.shares,
                self.sequences,
            ),
        )

    @property
    def exactness(self) -> str:
        """`exact`, `rounding` or `approximate`, the loosest of all choices. (A device and its host may round the same update
        otherwise.)"""
        if self.precision in ("bf16", INT8, INT4) or self.moments == "bf16":
            return "approximate"
        return "rounding" if self.blocked_loss or self.host_updates else "exact"

    def to_json(self) -> str:
        """The plan as a file that people can read and change."""
        plain = {name: sorted(v) if isinstance(v, frozenset) else v for name, v in asdict(self).items()}
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str, place: str = "the plan") -> Plan:
        """The inverse of `to_json`. Raises OptionError naming what is unknown, missing or of another type in `place`."""
        try:
            values = json.loads(text)
        except ValueError as problem:
            raise OptionError(f"{place} is no JSON: {problem}. Write it with `outsize plan --save`.") from problem
        return cls(**read_fields(cls, values, place))

    def __str__(self) -> str:
        """The table that `outsize plan` prints."""
        predicted = self.predicted
        lines = [reason.partition(": ") for reason in self.reasons]
        rows = [(what, why) for what, _, why in lines]
        if predicted is not None:
            rows[:0] = _outcome(self, predicted) if self.served is None else _service(self, self.served, predicted)
        width = max((len(what) for what, _ in rows), default=0)
        return "\n".join(_line(what, why, width) for what, why in rows)


def _line(what: str, why: str, width: int) -> str:
    """A row of the table; what does not fit goes on below."""
    return fill(why, WIDTH, initial_indent=f"{what:<{width}}  ", subsequent_indent=" " * (width + 2))


def _outcome(plan: Plan, predicted: Predicted) -> list[tuple[str, str]]:
    """What a user asks first: does it fit, how long does it take, what does it move, is it exact."""
    budget = "" if plan.memory_bytes is None else f" of {format_size(plan.memory_bytes)}"
    who = f"worker {plan.rank} of {plan.workers}" if plan.legs else "the process"
    rows = [("memory", f"{who} peaks at {format_size(predicted.host_peak_bytes)}{budget}")]
    rows += [("", f"{format_size(nbytes)} {cause}") for cause, nbytes in predicted.memory]
    if plan.device_bytes:
        peak, most = format_size(predicted.device_peak_bytes), format_size(plan.device_bytes)
        rows += [("device", f"its memory peaks at {peak} of {most}")]
        rows += [("", f"{format_size(nbytes)} {cause}") for cause, nbytes in predicted.device_memory]
    rows += [("disk", f"{format_size(predicted.disk_bytes)}, the state; it is also the checkpoint")]
    if predicted.seconds_per_step is not None:
        rows += [("a step takes", f"{predicted.seconds_per_step:.2f} s, {predicted.tokens_per_second:,.0f} tokens/s")]
        rows += [
            ("", f"{getattr(predicted, key) or 0.0:.2f} s {name}")
            for key, name in CAUSES.items()
            if plan.workers > 1 or key != "wire_wait_seconds"
        ]
    read, written = format_size(predicted.bytes_read), format_size(predicted.bytes_written)
    others = f", {format_size(predicted.wire_bytes)} from other workers" if plan.workers > 1 else ""
    rows += [("a step moves", f"{read} read from disk, {written} written to it{others}")]
    rows += [("", f"{format_size(n)} {kind} {source} to {target}") for source, target, kind, n in predicted.moved]
    return [*rows, ("numbers", plan.exactness)]


def _service(plan: Plan, served: Served, predicted: Predicted) -> list[tuple[str, str]]:
    """What a user asks of a server first: for how many, how fast, how soon."""
    budget = "" if plan.memory_bytes is None else f" of {format_size(plan.memory_bytes)}"
    each, context = served.together / served.sequences, plan.serving.context if plan.serving else 0
    who = "the process" if plan.workers == 1 else f"the fullest of {plan.workers} workers"
    return [
        ("memory", f"{who} peaks at {format_size(predicted.host_peak_bytes)}{budget}"),
        ("requests", f"{served.requests} at once with {context} tokens each; others wait, their turn comes"),
        ("tokens/s", f"{served.alone:,.1f} for one alone"),
        ("", f"{served.together:,.1f} for {served.sequences} together, {each:,.1f} for each"),
        ("first token", f"after {served.first_token_seconds:.2f} s, of a prompt of {served.prompt} tokens"),
        ("", f"prompts are read at {served.reading:,.0f} tokens/s"),
        (
            "a step takes",
            f"{served.step_seconds * 1e3:,.0f} ms, and reads {format_size(predicted.bytes_read)} from disk",
        ),
        *([("numbers", plan.exactness)] if plan.precision != STORED else []),
    ]
