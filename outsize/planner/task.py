"""What is to be trained: a model, its units, an optimizer, and what they come to in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from outsize.asked import Request
from outsize.distributed.arrangement import Arrangement
from outsize.errors import OptionError
from outsize.model.units import Unit, called_parts, divide, parts_of
from outsize.model.vocabulary import Table
from outsize.plan import Activations, Plan
from outsize.planner.needs import gradient_bytes
from outsize.planner.rehearsal import Batch
from outsize.planner.sizes_of import SMALL, WeightSize, sizes_of, split_weights
from outsize.planner.trial import calls_of
from outsize.train.job import always_near, users_of
from outsize.train.optimizers import OptimizerRule

TABLE_BLOCK = 4 << 20  # elements of a vocabulary's table in one block, at most
TABLE_ROWS = 2048  # and rows: the logits of 512 tokens against them are 4 MiB


@dataclass(frozen=True)
class JobSizes:
    """What a job is made of, whatever is decided. `hold`: gradients wait for the step's end. `ahead`: bytes of split weights
    that are gathered before they are needed. `parts`: of units, that are leased one after the other."""

    sizes: dict[str, WeightSize]
    rows: dict[str, int]
    blocked: bool
    always: set[str]
    hold: bool
    split: frozenset[str] = frozenset()
    copies: int = 1
    ahead: int = 0
    parts: tuple[str, ...] = ()

    @cached_property
    def everything(self) -> int:
        """Bytes of all weights and states that need not be near, and of their gradients if these wait."""
        held = gradient_bytes(self.sizes) if self.hold else 0
        return held + sum(s.bytes + s.state_bytes for name, s in self.sizes.items() if name not in self.always)

    @cached_property
    def all_bytes(self) -> int:
        """Of all blocks."""
        return sum(size.bytes + size.state_bytes for size in self.sizes.values())

    def plan(self, request: Request, activations: tuple[tuple[str, Activations], ...]) -> Plan:
        """All that is settled before anything is placed."""
        return Plan(
            precision=request.precision,
            arena_bytes=0,
            activations=activations,
            parts=self.parts,
            table_rows=tuple(self.rows.items()),
            blocked_loss=self.blocked,
            accumulate=request.accumulate,
            hold=self.hold,
            clip=request.clip,
            moments=request.moments,
            workers=request.workers,
            nodes=request.nodes,
            close=request.close,
            zero=request.zero,
            split_weights=self.split,
            weight_copies=self.copies,
            gather_ahead_bytes=self.ahead,
            sequences=request.sequences,
            shares=request.shares or (),
            rank=request.rank,
            legs=request.legs,
            legs_shape=request.legs_shape,
            schedule=request.schedule,
            memory_bytes=request.memory_bytes,
            device_bytes=request.device_bytes,
        )


@dataclass(frozen=True)
class Task:
    """What is to be trained, and how. The model's parameters may be on the meta device.

    `micro_batches` are like those that will come (which rows of the vocabulary they use is a matter of the text); none:
    they are made up. `source_dtype` is that of the weights as they are brought in."""

    model: nn.Module
    units: list[Unit]
    rule: OptimizerRule
    request: Request
    micro_batches: list[Batch] = field(default_factory=list)
    source_dtype: torch.dtype = torch.bfloat16
    block_class: str | None = None
    whole: Task | None = None
    """Of all workers of a pipeline, where this is what one of them has."""

    @cached_property
    def loss(self) -> tuple[bool, dict[str, int]]:
        """Whether the head is computed in blocks, and of how many rows those of its tables are that the model here has."""
        if self.whole is not None:
            blocked, rows = self.whole.loss
            own = dict(self.model.named_parameters())
            return blocked, {name: count for name, count in rows.items() if name in own}
        blocked, tables = _loss_choice(self.model, self.request)
        return blocked, {name: table_rows(parameter) for name, parameter in tables.items()}

    @cached_property
    def batches(self) -> list[Batch]:
        return self.micro_batches or sample_batches(self.model, self.request)

    @cached_property
    def jobs(self) -> list[JobSizes]:
        """By how many copies of split weights there are: the most, and so the fewest bytes on slow links, first; and by how
        much of them is gathered ahead: what is leased at once, or nothing. Units are leased whole, unless other workers do
        otherwise."""
        return self._jobs(self.request.parts or ())

    @cached_property
    def jobs_by_parts(self) -> list[JobSizes]:
        """The same where units are leased by parts, as many as they have; none, where they have no choice."""
        parts = parts_of(self.units, self._sized[0].always) if self.request.parts is None else ()
        parts = self.called(parts)
        return self._jobs(parts) if parts else []

    def called(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `parts` that every unit calls."""
        return called_parts(parts, self.units, calls_of(self.model, self.batches[0])) if parts else ()

    def _jobs(self, parts: tuple[str, ...]) -> list[JobSizes]:
        jobs = [replace(job, parts=parts) for job in self._sized]
        return [replace(job, ahead=ahead) for job in jobs for ahead in self._aheads(job)]

    @cached_property
    def _sized(self) -> list[JobSizes]:
        blocked, rows = self.loss
        hold = self.request.hold or self.request.clip is not None
        return [sizes_of_job(self, rows, blocked, hold, copies) for copies in self._copies()]

    def _aheads(self, job: JobSizes) -> list[int]:
        if len(set(self.request.sequences)) > 1:
            return [0]  # who has one micro-batch gives weights back sooner than others, and what is held is not begun
        if self.request.gather_ahead_bytes is not None:
            return [self.request.gather_ahead_bytes]
        together = [piece for unit in self.units for piece in divide(unit, job.parts)]
        split = [[name for name, _ in piece.parameters if name in job.split] for piece in together]
        largest = max((sum(job.sizes[name].whole for name in names) for names in split), default=0)
        return [largest, 0] if largest else [0]

    def _copies(self) -> list[int]:
        request = self.request
        if request.legs:
            return [1]
        if request.weight_copies is not None:
            return [request.weight_copies]
        possible = Arrangement.of(0, request.workers, request.nodes, request.close).copies[:-1]
        return possible[::-1] if request.zero == 3 and possible else [1]

    @property
    def job(self) -> JobSizes:
        """The smallest."""
        return self.jobs[-1]


def sizes_of_job(task: Task, rows: dict[str, int], blocked: bool, hold: bool, copies: int) -> JobSizes:
    split = split_weights(task.model, task.units, task.rule, task.request, rows)
    sizes = sizes_of(task.model, task.rule, task.request, rows, split, copies)
    small = {name for name, size in sizes.items() if size.weight.numel <= SMALL and name not in rows}
    return JobSizes(sizes, rows, blocked, small | always_near(task.units), hold, split, copies)


def sample_batches(model: nn.Module, request: Request) -> list[Batch]:
    """Micro-batches of made-up text: word frequencies fall as 1 / (rank + 2.7), as in natural language (Mandelbrot)."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    words = embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 256
    weights = 1.0 / (torch.arange(words, dtype=torch.float32) + 2.7)
    generator = torch.Generator().manual_seed(0)
    count = request.batch_size * request.sequence_length

    def batch() -> Batch:
        ids = torch.multinomial(weights, count, replacement=True, generator=generator)
        ids = ids.view(request.batch_size, request.sequence_length)
        return {"input_ids": ids, "labels": ids.clone()}

    return [batch() for _ in range(request.accumulate)]


def _loss_choice(model: nn.Module, request: Request) -> tuple[bool, dict[str, nn.Parameter]]:
    """Whether the head is computed in blocks, and the weights that become tables for it."""
    if request.loss not in ("auto", "blocked", "module"):
        raise OptionError(f"loss {request.loss!r} is unknown; there are auto, blocked and module.")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    decoder_only = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    plain = isinstance(head, nn.Linear) and head.bias is None and isinstance(embedding, nn.Embedding)
    if request.loss == "module" or not plain or not decoder_only:
        if request.loss == "blocked":
            raise OptionError(
                f"{type(model).__name__} has no plain embedding and head to compute in blocks; use loss=module."
            )
        return False, {}
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    chosen = {id(head.weight), id(embedding.weight)}
    tables = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and all(Table.suits(module) for module in users_of(model, parameter))
    }
    return len(tables) == len(chosen), tables if len(tables) == len(chosen) else {}


def table_rows(parameter: nn.Parameter) -> int:
    """Rows of a vocabulary's table in one block."""
    return max(1, min(TABLE_ROWS, TABLE_BLOCK // parameter[0].numel()))
