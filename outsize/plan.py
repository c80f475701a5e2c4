"""The Plan: one frozen value with every decision in it. Whoever runs a job obeys it and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from outsize.errors import OptionError


@dataclass(frozen=True)
class Predicted:
    """What a plan says will be measured. Bytes, per step where it says so; 0 device bytes without a GPU."""

    host_peak_bytes: int
    device_peak_bytes: int
    bytes_read: int
    bytes_written: int
    disk_bytes: int


NEAR = "near"  # as the home of activations: they stay where they came into being


@dataclass(frozen=True)
class Activations:
    """What a unit leaves behind in forward for its backward, and where that waits. Every choice is exact.

    `saved`: `all` that autograd saves; only the unit's `input`, and forward runs again; or the input and the results of
    matrix `products` and attention, and forward runs again without computing these. `home` is a tier, or `near`."""

    saved: str = "all"
    home: str = NEAR

    def __post_init__(self) -> None:
        if self.saved not in ("all", "products", "input"):
            raise OptionError(f"Activations {self.saved!r} cannot be saved; there are all, products and input.")


KEEP, RECOMPUTE, MOVE = Activations(), Activations("input"), Activations("all", "disk")


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
class Plan:
    """Where every kind of byte lives, and how each unit runs.

    `near_weights` and `near_states` name the weights whose bytes, or whose optimizer state, stay near compute; all others
    live on disk. `arena_bytes` is the near memory through which those stream. `activations` says what is done with those
    of each unit it names, the others keep theirs; of what moves, tensors smaller than `moved_tensor_bytes` stay.
    `table_rows` says how many rows of a vocabulary's table make a block; a weight that is not in it is one block. `hold`:
    gradients wait in `gradient_home` until the step's end, and the update is a second pass that overlaps the next
    forward. `recycle_bytes`: the C library keeps freed memory of tensors up to this size, until the
    process holds more than `predicted`. `blocked_loss`: the head and its loss are computed over
    blocks of the vocabulary. `shared_bytes`: all blocks together, when they stay near in memory that outlives the
    process, each with a twin; 0: they do not. `serving`: what a plan for serving says beside."""

    precision: str
    arena_bytes: int
    near_weights: frozenset[str] = frozenset()
    near_states: frozenset[str] = frozenset()
    gradient_home: str = "disk"
    activations: tuple[tuple[str, Activations], ...] = ()
    moved_tensor_bytes: int = 256 << 10
    table_rows: tuple[tuple[str, int], ...] = ()
    blocked_loss: bool = False
    accumulate: int = 1
    hold: bool = False
    clip: float | None = None
    moments: str = "fp32"
    commit_every: int = 1
    recycle_bytes: int = 8 << 20
    shared_bytes: int = 0
    memory_bytes: int | None = None
    predicted: Predicted | None = None
    serving: Serving | None = None
    reasons: tuple[str, ...] = field(default=())

    @property
    def exactness(self) -> str:
        """`exact`, `rounding` or `approximate`, the loosest of all choices."""
        if self.precision == "bf16" or self.moments == "bf16":
            return "approximate"
        return "rounding" if self.blocked_loss else "exact"


@dataclass(frozen=True)
class ServeRequest:
    """What a user asks of serving: `memory_bytes` for the whole process, up to `seats` sequences in a step of up to
    `step_tokens` tokens, each up to `context` tokens long (None: the model's own limit, or 4096)."""

    memory_bytes: int
    context: int | None = None
    seats: int = 32
    step_tokens: int = 512

    def __post_init__(self) -> None:
        if self.seats < 1 or self.step_tokens < self.seats:
            raise OptionError(
                f"A step of {self.step_tokens} tokens is too small for {self.seats} sequences; each takes at least one."
            )


@dataclass(frozen=True)
class Request:
    """What a user asks of a training job; "auto" leaves a choice to the planner. Bytes; sizes per micro-batch.

    `keeper`: if there is room, memory that outlives the process holds the last step."""

    memory_bytes: int
    sequence_length: int = 512
    batch_size: int = 1
    accumulate: int = 1
    precision: str = "mixed"
    moments: str = "fp32"
    clip: float | None = None
    hold: bool = False
    loss: str = "auto"
    activations: str = "auto"
    commit_every: int | None = None
    keeper: bool = False
