"""What a user asks of a job, before anything is decided: of training, and of serving."""

from __future__ import annotations

from dataclasses import dataclass, replace

from outsize.divided import HALVES, LOOP, SHAPES, Divided, V
from outsize.errors import OptionError
from outsize.plan import INT4, INT8, STORED

LAPS = (1, 2, 4)  # that are tried, of legs in a loop


@dataclass(frozen=True)
class ServeRequest:
    """What a user asks of serving: `memory_bytes` for the whole process, up to `concurrency` sequences in a step of up to
    `step_tokens` tokens, each up to `context` tokens long (None: the model's own limit, or 4096). A concurrency that is
    named gets room before weights do; None: 32, where there is room to spare."""

    memory_bytes: int
    context: int | None = None
    concurrency: int | None = None
    step_tokens: int = 512
    weights: str = STORED
    """How those of linear layers are held: as in the files, or in 8 or 4 bits."""

    @property
    def seats(self) -> int:
        return 32 if self.concurrency is None else self.concurrency

    def __post_init__(self) -> None:
        if self.weights not in (STORED, INT8, INT4):
            raise OptionError(f"weights {self.weights!r} is unknown; there are {STORED}, {INT8} and {INT4}.")
        if self.seats < 1 or self.step_tokens < self.seats:
            raise OptionError(
                f"A step of {self.step_tokens} tokens is too small for {self.seats} sequences; each takes at least one."
            )


@dataclass(frozen=True)
class PipelineRequest:
    """What a user asks of a pipeline; None leaves a choice to the planner."""

    legs: int | None = None
    shape: str | None = None
    zero_bubble: bool | None = None

    def ways(self, workers: int) -> list[tuple[int, str, bool]]:
        """(how many legs, in which shape, whether without a bubble): all that what is named leaves open, the simplest first.
        Not all need be possible."""
        loops = [(workers * laps, LOOP, False) for laps in LAPS]
        every = [*loops, (2 * workers, V, False), (2 * workers, V, True)]
        named = (self.legs, self.shape, self.zero_bubble)
        fitting = [way for way in every if all(said in (None, one) for said, one in zip(named, way, strict=True))]
        return fitting or [(self.legs or workers, self.shape or LOOP, bool(self.zero_bubble))]


@dataclass(frozen=True)
class Request(Divided):
    """What a user asks of a training job; "auto" leaves a choice to the planner. Bytes; sizes per micro-batch. With several
    `workers`, equally many on each of `nodes`, of whom `close` neighbours at a time have links faster than the node's, it is
    what each does; `zero` is what they divide: optimizer state (1), gradients too (2), weights too (3).

    `keeper`: memory that outlives the process is to hold the last step. `weight_copies`: how many there are already, as a
    plan has it, and `gather_ahead_bytes`, `parts`, `sequences` and `shares`, too. `rank`: the worker that is planned for.
    `legs`: how many of the repeated units each leg has, in a pipeline, `legs_shape` the way through them; with
    `zero_bubble` their backward is in halves. With `device_bytes` each computes on a device, and uses up to so many of its
    memory; with 0 the host does."""

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
    workers: int = 1
    nodes: int = 1
    close: int = 1
    zero: int = 3
    weight_copies: int | None = None
    gather_ahead_bytes: int | None = None
    parts: tuple[str, ...] | None = None
    sequences: tuple[int, ...] = ()
    shares: tuple[int, ...] | None = None
    rank: int = 0
    legs: tuple[int, ...] = ()
    legs_shape: str = LOOP
    zero_bubble: bool = False
    device_bytes: int = 0

    def __post_init__(self) -> None:
        if self.legs_shape not in SHAPES:
            raise OptionError(f"legs_shape {self.legs_shape!r} is unknown; there are {' and '.join(SHAPES)}.")
        if self.zero_bubble and (self.legs_shape != V or self.activations not in ("auto", "keep")):
            raise OptionError(
                "Without a bubble gradients of weights wait for those of activations, in legs that lie as a v, and all "
                "activations are kept. Give --legs-shape v, and no other --activations than keep; or leave out --zero-bubble."
            )
        if self.zero not in (1, 2, 3):
            raise OptionError(f"ZeRO has no level {self.zero}; there are 1, 2 and 3.")
        if self.workers % self.nodes:
            raise OptionError(f"{self.workers} workers cannot be equally many on each of {self.nodes} nodes.")

    @property
    def schedule(self) -> str:
        """The order in which each worker of a pipeline holds the activations of the fewest micro-batches; of several legs
        each, the one in which they wait the least."""
        if self.laps > 1:
            return "interleaved" if self.legs_shape == LOOP else HALVES if self.zero_bubble else V
        return "1f1b" if self.accumulate >= len(self.legs) else "gpipe"

    @property
    def underway(self) -> int:
        """Micro-batches that are between their forward and their backward at once, with all units of this worker."""
        if self.laps > 1 and self.legs_shape == V:
            return min(self.accumulate, self.rank + 1)
        if self.laps > 1:
            return min(self.accumulate, self.workers, 2 * (self.workers - 1 - self.rank) + 1)
        return min(self.accumulate, len(self.legs) - self.leg) if self.legs else self.accumulate

    def in_line(self, legs: tuple[int, ...], workers: int, nodes: int) -> Request:
        """As a pipeline, whose legs have so many of the repeated units; of several workers of a leg each takes as many of the
        step's sequences. Raises OptionError when they cannot."""
        if self.legs_shape == V and len(legs) != 2 * workers:
            raise OptionError(
                f"Of legs that lie as a v each of {workers} workers has two, and these are {len(legs)}. Leave --legs out, "
                f"or give {2 * workers}."
            )
        sharers, sequences = max(workers // len(legs), 1), self.batch_size * self.accumulate
        if max(workers, len(legs)) % min(workers, len(legs)) or sequences % sharers:
            raise OptionError(
                f"{workers} workers cannot be equally many for each of {len(legs)} legs, or have equally many of them each, "
                f"and take equally many of the {sequences} sequences of a step. Give another --legs, --workers or "
                "--accumulate."
            )
        each = self.divided((sequences // sharers,) * sharers, 1) if sharers > 1 else self
        return replace(each, workers=workers, nodes=nodes, legs=legs)

    def divided(self, sequences: tuple[int, ...], nodes: int) -> Request:
        """What the worker with most to do does of the step that this one asks of all together, of which each is to do so
        many `sequences`."""
        batch_size = min(self.batch_size, max(sequences))
        accumulate = -(-max(sequences) // batch_size)
        return replace(
            self,
            workers=len(sequences),
            nodes=nodes,
            sequences=sequences,
            batch_size=batch_size,
            accumulate=accumulate,
        )
