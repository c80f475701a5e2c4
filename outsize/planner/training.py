"""From a request to a Plan for training: what must be near, what may be, and where the rest goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import LARGEST_RECYCLED
from outsize.memory.shared import AVAILABLE
from outsize.memory.tier import PAGE, pages
from outsize.model.units import Unit
from outsize.model.vocabulary import Table
from outsize.plan import KEEP, MOVE, NEAR, RECOMPUTE, Activations, Plan, Predicted, Request
from outsize.planner.demand import Demand, measure_demand
from outsize.planner.sizes_of import WeightSize, sizes_of
from outsize.sizes import format_size
from outsize.train.job import always_near, base_model, users_of
from outsize.train.loss import TOKENS
from outsize.train.optimizers import OptimizerRule
from outsize.train.precision import find_precision
from outsize.train.update import CHUNK, PIECE

SMALL = 1 << 16  # elements; so small a weight stays near with its state: reading it costs more than holding it
TABLE_BLOCK = 4 << 20  # elements of a vocabulary's table in one block, at most
TABLE_ROWS = 2048  # and rows: the logits of 512 tokens against them are 4 MiB
READ_AHEAD = 2  # chunks of state that may be on their way while one is stepped
ALLOCATOR = 2.0  # resident over live bytes of torch's CPU allocator under this load; docs/log.md has the measurement
RECYCLE = 4 << 20  # bytes; tensors up to this size are always kept by the C library for the next one
HOARD = 256 << 20  # bytes more, when the C library may keep every tensor's memory for the next one; docs/log.md
SNAPSHOT_SHARE = 8  # of what a step moves, snapshots of state in memory may add one part in so many
LONGEST_WITHOUT = 50  # steps between snapshots, at most
KEEPER = 12 << 20  # bytes: the process that holds shared memory
FIXED = 232 << 20  # bytes: what glibc's heap hoards beside, thread stacks, kernels' scratch; docs/log.md


@dataclass(frozen=True)
class Needs:
    """Bytes of host memory by cause, before any choice of what stays near."""

    baseline: int
    activations: int
    loss: int
    scratch: int
    least_arena: int
    good_arena: int
    always: int
    recycle: int
    moved: int
    """Of activations to disk and back, a step."""
    moving: int
    """Near memory for activations on their way; part of the arena."""

    @property
    def fixed(self) -> int:
        return self.baseline + self.activations + self.loss + self.scratch + self.always + FIXED

    @property
    def least(self) -> int:
        return self.fixed + self.least_arena


def plan_training(
    model: nn.Module,
    units: list[Unit],
    rule: OptimizerRule,
    request: Request,
    baseline_bytes: int,
    disk_free_bytes: int,
) -> Plan:
    """The plan for training `model` (its parameters may be on the meta device) within `request.memory_bytes`.

    `baseline_bytes` is what the process holds already. Raises BudgetError, with the smallest budget that works, when
    the job does not fit memory or disk."""
    blocked, tables = _loss_choice(model, request)
    rows = {name: table_rows(parameter) for name, parameter in tables.items()}
    sizes = sizes_of(model, rule, request.precision, request.moments, rows)
    always = _always(units, sizes, rows)
    hold = request.hold or request.clip is not None
    activations, needs = _activations_choice(model, units, request, sizes, rows, always, blocked, hold, baseline_bytes)
    if needs.least > request.memory_bytes:
        raise BudgetError(_too_small(request, needs))
    near_weights, near_states, arena, gradients = _place(request, needs, sizes, always, hold)
    disk = sum(2 * (size.bytes + size.state_bytes) for size in sizes.values())
    disk += needs.moved + (0 if gradients == "host" else _gradient_bytes(sizes))
    if disk > disk_free_bytes:
        raise BudgetError(
            f"The state needs {format_size(disk)} of disk (two extents of every block, so that no step overwrites the "
            f"last committed one), and {format_size(disk_free_bytes)} are free. Free space, or choose another --out."
        )
    near = sum(sizes[n].bytes for n in near_weights) + sum(sizes[n].state_bytes for n in near_states)
    near += _gradient_bytes(sizes) if hold and gradients == "host" else 0
    read, written = _traffic(sizes, near_weights, near_states, rows, blocked, hold, gradients)
    peak = needs.fixed - needs.always + near + arena
    generous = len(near_weights) == len(sizes) and peak + HOARD + needs.activations <= request.memory_bytes
    peak += HOARD if generous else 0
    everything = sum(size.bytes + size.state_bytes for size in sizes.values())
    snapshot = sum(sizes[n].bytes for n in near_weights if sizes[n].weight.trainable)
    snapshot += sum(sizes[n].state_bytes for n in near_states)
    commit_every = request.commit_every or _commit_every(snapshot, read + written)
    written += snapshot // commit_every
    can_share = request.keeper and AVAILABLE and len(near_states) == len(near_weights) == len(sizes)
    shares = can_share and peak + snapshot + KEEPER <= request.memory_bytes
    peak += snapshot + KEEPER if shares else 0
    return Plan(
        precision=request.precision,
        arena_bytes=arena,
        near_weights=frozenset(near_weights),
        near_states=frozenset(near_states),
        gradient_home=gradients,
        activations=tuple((unit.name, activations) for unit in units if unit.repeated),
        table_rows=tuple(rows.items()),
        blocked_loss=blocked,
        accumulate=request.accumulate,
        hold=hold,
        clip=request.clip,
        moments=request.moments,
        commit_every=commit_every,
        recycle_bytes=LARGEST_RECYCLED if generous else needs.recycle,
        shared_bytes=everything if shares else 0,
        memory_bytes=request.memory_bytes,
        predicted=Predicted(peak, 0, read + needs.moved, written + needs.moved, disk),
        reasons=_reasons(
            needs,
            near,
            arena,
            activations,
            blocked,
            hold,
            gradients,
            _say_commit(commit_every, snapshot, shares),
            units,
        ),
    )


# -- choices ----------------------------------------------------------------------------------------------------------


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


def _always(units: list[Unit], sizes: dict[str, WeightSize], rows: dict[str, int]) -> set[str]:
    small = {name for name, size in sizes.items() if size.weight.numel <= SMALL and name not in rows}
    return small | always_near(units)


def _activations_choice(
    model: nn.Module,
    units: list[Unit],
    request: Request,
    sizes: dict[str, WeightSize],
    rows: dict[str, int],
    always: set[str],
    blocked: bool,
    hold: bool,
    baseline: int,
) -> tuple[Activations, Needs]:
    """Keep activations only when everything fits beside them: recomputing costs a third more compute, no memory."""
    choices = {"keep": KEEP, "recompute": RECOMPUTE, "move": MOVE}
    if request.activations not in ("auto", *choices):
        raise OptionError(f"activations {request.activations!r} is unknown; there are auto, {', '.join(choices)}.")

    def needs(activations: Activations) -> Needs:
        demand = _demand(model, request, rows, blocked, activations)
        return _needs(units, request, sizes, rows, always, hold, baseline, demand, blocked)

    if request.activations != "auto":
        return choices[request.activations], needs(choices[request.activations])
    recomputing = needs(RECOMPUTE)
    everything = sum(size.bytes + size.state_bytes for size in sizes.values())
    if recomputing.fixed + everything > request.memory_bytes:
        return RECOMPUTE, recomputing
    keeping = needs(KEEP)
    fits = keeping.fixed + everything + (_gradient_bytes(sizes) if hold else 0) <= request.memory_bytes
    return (KEEP, keeping) if fits else (RECOMPUTE, recomputing)


def _demand(
    model: nn.Module, request: Request, rows: dict[str, int], blocked: bool, activations: Activations
) -> Demand:
    shape = (request.batch_size, request.sequence_length)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def run(fake: nn.Module) -> torch.Tensor:
        ids = torch.zeros(shape, dtype=torch.long)
        if blocked:
            for name, parameter in fake.named_parameters():
                parameter.requires_grad_(trainable[name] and name not in rows)
            return base_model(fake)(input_ids=ids, use_cache=False).last_hidden_state
        return fake(input_ids=ids, labels=ids).loss

    return measure_demand(model, find_precision(request.precision).compute, run, activations)


def _needs(
    units: list[Unit],
    request: Request,
    sizes: dict[str, WeightSize],
    rows: dict[str, int],
    always: set[str],
    hold: bool,
    baseline: int,
    demand: Demand,
    blocked: bool,
) -> Needs:
    lanes = request.accumulate
    activations = int(ALLOCATOR * (demand.peak + (lanes - 1) * demand.kept))
    compute_bytes = find_precision(request.precision).compute.itemsize
    loss = 0
    if blocked:
        tokens = request.batch_size * request.sequence_length
        width = next(iter(rows)) if rows else ""
        hidden = sizes[width].weight.row_elements
        block_rows = max(rows.values())
        loss = lanes * tokens * hidden * (4 + 3 * compute_bytes) + min(tokens, TOKENS) * block_rows * (
            8 + 2 * compute_bytes
        )
        loss += block_rows * hidden * compute_bytes
    largest_chunk = max((size.largest_state for size in sizes.values()), default=0)
    scratch = 4 * max(
        4 * PIECE, max((size.largest_gradient for n, size in sizes.items() if not _chunked(size)), default=0)
    )
    pinned = [_pinned(unit, sizes, rows, always, lanes, hold) for unit in units]
    pinned += [sizes[name].largest_block + sizes[name].largest_gradient for name in rows]
    # What is leased is let go in another order than it was leased, so that free room is in pieces.
    moving = pages(2 * demand.leased)
    least = pages(int(1.1 * (max(pinned, default=0) + 2 * largest_chunk))) + moving
    largest_unit = max((_unit_bytes(unit, sizes, rows, always) for unit in units), default=0)
    good = pages(least + int(1.2 * largest_unit) + READ_AHEAD * largest_chunk)
    always_bytes = sum(sizes[name].bytes + sizes[name].state_bytes for name in always)
    recycle = max(RECYCLE, demand.largest + PAGE)
    moved = lanes * demand.moved
    return Needs(baseline, activations, loss, scratch, least, good, always_bytes, recycle, moved, moving)


def _chunked(size: WeightSize) -> bool:
    return size.state_bytes == 0 or size.largest_state < size.state_bytes or size.weight.numel <= CHUNK


def _unit_bytes(unit: Unit, sizes: dict[str, WeightSize], rows: dict[str, int], always: set[str]) -> int:
    return sum(sizes[name].bytes for name, _ in unit.parameters if name not in always and name not in rows)


def _pinned(
    unit: Unit, sizes: dict[str, WeightSize], rows: dict[str, int], always: set[str], lanes: int, hold: bool
) -> int:
    """Near memory that a unit's leases pin at one moment of its backward."""
    streamed = [sizes[name] for name, _ in unit.parameters if name not in always and name not in rows]
    gradients = [size.largest_gradient for size in streamed if size.weight.trainable]
    adding = sum(gradients) if lanes > 1 else max(gradients, default=0) if hold else 0
    return sum(size.bytes for size in streamed) + adding


def _gradient_bytes(sizes: dict[str, WeightSize]) -> int:
    return sum(4 * size.weight.numel for size in sizes.values() if size.weight.trainable)


def _place(
    request: Request, needs: Needs, sizes: dict[str, WeightSize], always: set[str], hold: bool
) -> tuple[set[str], set[str], int, str]:
    """Fill what memory is left: weights first (6 bytes of traffic a step saved for each 2 held), then optimizer state
    (20 for each 10). When all fits, nothing streams and no arena is needed."""
    room = request.memory_bytes - needs.fixed
    everything = sum(size.bytes + size.state_bytes for name, size in sizes.items() if name not in always)
    gradients = _gradient_bytes(sizes) if hold or request.accumulate > 1 else 0
    if everything + gradients + needs.moving <= room:
        return set(sizes), set(sizes), pages(1) + needs.moving, "host"
    arena = min(needs.good_arena, room)
    room -= arena
    weights, states = set(always), set(always)
    for chosen, cost in ((weights, lambda size: size.bytes), (states, lambda size: size.state_bytes)):
        for name, size in reversed(sizes.items()):
            if name not in always and cost(size) <= room:
                chosen.add(name)
                room -= cost(size)
    return weights, states, arena + room if not room else arena, "disk"


def _commit_every(snapshot: int, moved: int) -> int:
    """State on disk is committed by writing it, every step. State in memory is copied out, and how often is what bounds
    the traffic: a small part of what steps move anyway, or else now and then."""
    return max(1, min(-(-SNAPSHOT_SHARE * snapshot // max(moved, 1)), LONGEST_WITHOUT))


# -- predictions ------------------------------------------------------------------------------------------------------


def _traffic(
    sizes: dict[str, WeightSize],
    near_weights: set[str],
    near_states: set[str],
    rows: dict[str, int],
    blocked: bool,
    hold: bool,
    gradients: str,
) -> tuple[int, int]:
    """Bytes (read, written) a step when nothing is found near by luck: an upper estimate of what is streamed."""
    read = written = 0
    for name, size in sizes.items():
        if name not in near_weights:
            uses = 2 + (1 if hold else 0) - (1 if name in rows else 0)
            read += uses * size.bytes
            written += size.bytes if size.weight.trainable else 0
        if name not in near_states:
            read += size.state_bytes
            written += size.state_bytes
        if hold and gradients == "disk" and size.weight.trainable:
            read, written = read + 4 * size.weight.numel, written + 4 * size.weight.numel
    return read, written


def _too_small(request: Request, needs: Needs) -> str:
    parts = (
        f"{format_size(needs.baseline)} for Python and its libraries, {format_size(needs.activations)} activations of "
        f"one layer at {request.batch_size} x {request.sequence_length} tokens, {format_size(needs.loss)} loss, "
        f"{format_size(needs.least_arena)} for the largest layer on its way, "
        f"{format_size(needs.always + needs.scratch + FIXED)} small weights and buffers"
    )
    return (
        f"A budget of {format_size(request.memory_bytes)} is too small: this job needs at least "
        f"{format_size(_round_up(needs.least))} ({parts}). Give --memory {_mebibytes(needs.least)}, or a shorter sequence."
    )


def _round_up(nbytes: int) -> int:
    return -(-nbytes // (1 << 20)) * (1 << 20)


def _mebibytes(nbytes: int) -> str:
    return f"{_round_up(nbytes) >> 20}MiB"


def _reasons(
    needs: Needs,
    near: int,
    arena: int,
    choice: Activations,
    blocked: bool,
    hold: bool,
    gradients: str,
    commit: str,
    units: list[Unit],
) -> tuple[str, ...]:
    return (
        f"baseline: {format_size(needs.baseline)} are held by Python and its libraries already",
        f"near: {format_size(near)} of weights and optimizer state stay in memory",
        f"arena: {format_size(arena)} for what streams; {format_size(needs.least_arena)} is the least, "
        f"{format_size(needs.good_arena)} lets reads run well ahead",
        f"activations: {format_size(needs.activations)}, {_say(choice, needs)}",
        "loss: over blocks of the vocabulary (rounding)" if blocked else "loss: the module's own",
        f"update: second pass, gradients wait in {gradients}" if hold else "update: in backward, no gradient waits",
        f"commit: {commit}",
    )


def _say_commit(every: int, snapshot: int, shares: bool) -> str:
    if shares:
        held = f"a crash of this process loses no step: a keeper process holds the last in {format_size(snapshot)} more"
    else:
        held = f"a crash loses {every} at most"
    return f"every {every} steps, {format_size(snapshot)} from memory while the next computes; {held}"


def _say(choice: Activations, needs: Needs) -> str:
    if choice.home != NEAR:
        return f"and {format_size(needs.moved)} a step that wait on disk"
    return "all kept" if choice == KEEP else "recomputed layer by layer"
