"""From a budget to a Plan for serving: which weights stay near, and how many pages of keys and values fit beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from outsize.asked import ServeRequest
from outsize.errors import BudgetError, OptionError
from outsize.machine.allocator import LARGEST_RECYCLED, Ceiling
from outsize.memory.tier import pages
from outsize.model.route import Leg
from outsize.model.units import Unit, called_parts, divide, parts_of
from outsize.model.vocabulary import Table
from outsize.plan import STORED, KvLayer, Plan, Predicted, Serving
from outsize.planner.needs import KERNELS, PACKED, SPREAD, THREADS, changes_of, held_for
from outsize.planner.serving_forecast import run_step
from outsize.planner.sizes_of import SMALL
from outsize.planner.task import TABLE_BLOCK, table_rows
from outsize.planner.trial import measurable, note_calls, on_fake_tensors
from outsize.serve.attention import Discovery, context_limit
from outsize.serve.cache import page_shape
from outsize.serve.layout import Span
from outsize.serve.products import LinearCalls, can_pack
from outsize.serve.rounded import describe_rounded
from outsize.sizes import format_size
from outsize.train.job import always_near, users_of

PAGE_TOKENS = 16
COMPILED = 96 << 20  # bytes: kernels that oneDNN compiles, one for each shape it meets, and never lets go; docs/log.md
BESIDE = THREADS + KERNELS + SPREAD + COMPILED
FOR_MANY = 4  # of what is free while weights stream, one part in so many goes to pages if nobody said for how many
PARTS_AT_ONCE, UNITS_AT_ONCE = 3.0, 2.3  # that near memory holds while they stream: more do not keep the disk busier
FAR_TIMES = 8  # as many pages as near may lie on disk, at most
FAR_DISK = 4  # and take one part in so many of what the disk has free
BASELINE, TENSORS, KERNEL, WEIGHTS, STREAM, CACHE = (
    "for Python, libraries and the process as it stands",
    "for a step's tensors",
    "for threads and what products keep",
    "for weights that stay",
    "to stream the others through",
    "for keys and values",
)


def plan_serving(
    model: nn.Module,
    units: list[Unit],
    request: ServeRequest,
    baseline_bytes: int,
    disk_free_bytes: int,
    leg: Leg | None = None,
) -> Plan:
    """The plan for serving `model`, which attends by `use_paged_attention`; or its `leg`, on one of several workers.

    Memory goes first to what a step needs, then to pages for one sequence of the whole context, then to weights, then to
    pages for all seats. Where weights must stream, pages come before: one pass over the weights serves everybody who has
    pages. They take what is free if it was said how many shall be served at once, else a quarter of it.

    Raises BudgetError with the smallest budget that works, OptionError for a context longer than the model's, ModelError
    when the model cannot be served."""
    layers, groups, called = discover(model)
    if leg is not None:
        units, layers = [unit for unit in units if leg.has(unit.name)], layers[slice(*leg.layers)]
    sizes, context = _sizes(units), context_of(model, request)
    tensors = measure_step(model, layers, context, request, leg)
    headroom = Ceiling.WORTH + tensors
    room = _Room(request, context, page_size(layers), headroom)
    room.taken.update({BASELINE: baseline_bytes, TENSORS: tensors, KERNEL: BESIDE})
    whole = room.left >= sum(sizes.values()) + room.least_pages
    placed = _all_near(model, sizes, groups, room) if whole else _streaming(model, units, sizes, groups, called, room)
    far = sum(nbytes for name, nbytes in sizes.items() if name not in placed.near)
    if far > disk_free_bytes:
        raise BudgetError(
            f"{format_size(far)} of weights must stream from disk and {format_size(disk_free_bytes)} are free. "
            "Free space, or name another directory with --scratch."
        )
    far_pages = min(FAR_TIMES * placed.pages, (disk_free_bytes - far) // FAR_DISK // room.page_bytes)
    serving = Serving(
        layers, placed.pages, PAGE_TOKENS, room.page_bytes, request.step_tokens, request.seats, context, far_pages
    )
    memory = tuple(room.taken.items())
    return Plan(
        request.weights,
        room.taken[STREAM],
        frozenset(placed.near),
        parts=placed.parts,
        table_rows=tuple(placed.rows.items()),
        blocked_loss=bool(placed.rows),
        packed=placed.packed,
        recycle_bytes=LARGEST_RECYCLED,
        headroom_bytes=headroom,
        memory_bytes=request.memory_bytes,
        predicted=Predicted(room.taken.total(), 0, far, 0, far, memory=memory),
        serving=serving,
        reasons=(
            *_about_rounded(model, request),
            _about_weights(sum(sizes.values()) - far, far, placed.parts),
            _about_pages(serving),
        ),
    )


def beside(model: nn.Module, request: ServeRequest) -> int:
    """Bytes that a worker needs besides its weights and pages, at most, whichever leg of the model it has."""
    tensors = measure_step(model, discover(model)[0], context_of(model, request), request)
    return 2 * tensors + Ceiling.WORTH + BESIDE


def with_pages(plan: Plan, count: int, far: int) -> Plan:
    """The plan with so many pages, near and far, and no more than it has."""
    assert plan.serving is not None and plan.predicted is not None
    serving = replace(plan.serving, pages=count, far_pages=far)
    memory = {**dict(plan.predicted.memory), CACHE: count * serving.page_bytes}
    predicted = replace(plan.predicted, host_peak_bytes=sum(memory.values()), memory=tuple(memory.items()))
    return replace(plan, serving=serving, predicted=predicted, reasons=(*plan.reasons[:-1], _about_pages(serving)))


class _Room:
    """Memory still to be given away, and what has been `taken`, by cause, in bytes. `headroom` nobody takes."""

    def __init__(self, request: ServeRequest, context: int, page_bytes: int, headroom: int) -> None:
        self.taken: Counter[str] = Counter()
        self._headroom = headroom
        self.page_bytes = page_bytes
        self._request, self._context = request, context
        self._one = -(-context // PAGE_TOKENS)  # pages that a sequence of the whole context holds

    @property
    def left(self) -> int:
        return self._request.memory_bytes - self.taken.total() - self._headroom

    @property
    def for_pages(self) -> int:
        """Bytes that pages may take before weights do."""
        return self.left // (FOR_MANY if self._request.concurrency is None else 1)

    @property
    def least_pages(self) -> int:
        """Bytes of pages for one sequence."""
        return self._one * self.page_bytes

    def take_pages(self, nbytes: int) -> int:
        """Pages for at least one sequence, and for as many seats as `nbytes` do."""
        count = min(self._request.seats * self._one, max(self._one, nbytes // self.page_bytes))
        self.taken[CACHE] += count * self.page_bytes
        return count

    def take_weights(self, groups: list[dict[str, int]]) -> set[str]:
        """As many as there is room for, of each group all or none, evenly spread: while those that stay compute, those that
        stream are read. What then is left takes single weights."""
        share = min(1.0, self.left / max(1, sum(sum(sizes.values()) for sizes in groups)))
        taken: set[str] = set()
        total, due = 0, 0.0
        for sizes in groups:
            nbytes = sum(sizes.values())
            due += share * nbytes
            if total + nbytes / 2 <= due and nbytes <= self.left:
                taken |= sizes.keys()
                total += nbytes
                self.taken[WEIGHTS] += nbytes
        for name, nbytes in (item for sizes in groups for item in sizes.items()):
            if name not in taken and nbytes <= self.left:
                taken.add(name)
                self.taken[WEIGHTS] += nbytes
        return taken

    def too_small(self, arena: int) -> BudgetError:
        """For what is taken, an arena, and one sequence."""
        causes = Counter({**self.taken, STREAM: arena, CACHE: self.least_pages})
        causes[TENSORS] += self._headroom
        parts = ", ".join(f"{format_size(nbytes)} {cause}" for cause, nbytes in causes.items() if nbytes)
        return BudgetError(
            f"A budget of {format_size(self._request.memory_bytes)} is too small for {self._context} tokens of context: at "
            f"least {format_size(causes.total())} are needed ({parts}). "
            f"Give --memory {-(-causes.total() // (1 << 20))}MiB, or a shorter context.",
            causes.total(),
        )


@dataclass(frozen=True)
class _Placed:
    """`near` weights, of which some are `packed` products; `rows` in a block of the tables that stream; `pages` near; `parts`
    of repeated units that stream one after the other."""

    near: set[str]
    rows: dict[str, int]
    packed: tuple[tuple[str, ...], ...]
    pages: int
    parts: tuple[str, ...] = ()


def _all_near(model: nn.Module, sizes: dict[str, int], groups: list[tuple[str, ...]], room: _Room) -> _Placed:
    room.taken.update({WEIGHTS: sum(sizes.values()), STREAM: pages(1)})
    packed = _packed(model, groups, set(sizes), room.left - room.least_pages)
    room.taken[WEIGHTS] += sum(sizes[name] for name in _twice(model, packed))
    return _Placed(set(sizes), {}, packed, room.take_pages(room.left))


def _streaming(
    model: nn.Module,
    units: list[Unit],
    sizes: dict[str, int],
    groups: list[tuple[str, ...]],
    called: set[str],
    room: _Room,
) -> _Placed:
    near = _near(model, units) & sizes.keys()
    rows = {name: count for name, count in _tables(model).items() if name in sizes}
    largest = max((nbytes for name, nbytes in sizes.items() if name not in near | rows.keys()), default=0)
    room.taken.update({WEIGHTS: sum(sizes[name] for name in near), KERNEL: PACKED * largest})
    parts = called_parts(parts_of(units, near), units, called)
    wanted, least = _arena(units, parts, sizes, near, rows)
    if room.left < least + room.least_pages:
        raise room.too_small(least)
    room.taken[STREAM] = min(wanted, room.left - room.least_pages) // pages(1) * pages(1)
    count = room.take_pages(room.for_pages)
    free = {name: nbytes for name, nbytes in sizes.items() if name not in near | rows.keys()}
    near |= room.take_weights(_together(units, parts, groups, free))
    return _Placed(near, rows, _packed(model, groups, near - set(rows), 0), count, parts)


def _together(
    units: list[Unit], parts: tuple[str, ...], groups: list[tuple[str, ...]], free: dict[str, int]
) -> list[dict[str, int]]:
    """Bytes by the names of what stays or streams as one, in the order of use: what is leased at once, and linear layers that
    can be one product."""
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    found: dict[tuple[str, str | int], dict[str, int]] = {}
    for unit in units:
        for piece in divide(unit, parts):
            for name, _ in piece.parameters:
                if name in free:
                    found.setdefault((unit.name, group_of.get(name, piece.name)), {})[name] = free.pop(name)
    return list(found.values())


def discover(model: nn.Module) -> tuple[tuple[KvLayer, ...], list[tuple[str, ...]], set[str]]:
    """What each layer keeps of a token, which linear layers are called with one input one after the other, by their
    weights' names, and which modules are called at all; learnt by running the module on fake tensors. Raises ModelError
    when it keeps what cannot be paged."""
    found, calls, called = Discovery(), LinearCalls(), set[str]()

    def run(fake: nn.Module) -> None:
        ids = torch.zeros((1, 2), dtype=torch.long)
        note_calls(fake, called)
        with calls.watching(fake):
            fake(input_ids=ids, position_ids=ids, use_cache=False, paged=found)

    plain = measurable(model)
    try:
        with on_fake_tensors(plain) as fake:
            run(fake)
    except RuntimeError:  # the module looks at some output in a way that one beside others cannot be looked at
        found, calls = Discovery(), LinearCalls(beside=False)
        with on_fake_tensors(plain) as fake:
            run(fake)
    found.complete(model)
    return _in(_dtype(model), tuple(found.layers)), calls.groups(), called


def measure_step(
    model: nn.Module, layers: tuple[KvLayer, ...], context: int, request: ServeRequest, leg: Leg | None = None
) -> int:
    """Bytes beside weights and pages that the C library holds for the largest step: chunks of sequences as long as the
    context, with logits for every seat. `layers` are those of the leg, if there is one."""
    plain = measurable(model)
    count, one = min(request.step_tokens, context), -(-context // PAGE_TOKENS)
    several = min(request.seats, -(-request.step_tokens // count))
    spans = [Span(range(n * one, (n + 1) * one), context - count, count) for n in range(several)]
    layers = _in(_dtype(plain), layers)
    # Attention at once holds no scores, but nobody sees what it does hold: no more than these (`has_tiles`).
    changes = changes_of(
        run_step(plain, layers, spans, PAGE_TOKENS, request.seats, leg=leg, at_once=lambda layer: False)
    )
    wider = max(1, _dtype(model).itemsize // _dtype(plain).itemsize)
    return wider * held_for(changes, LARGEST_RECYCLED)


def page_size(layers: tuple[KvLayer, ...]) -> int:
    """Bytes of a page in all layers."""
    return page_shape(layers, PAGE_TOKENS).nbytes


def _in(dtype: torch.dtype, layers: tuple[KvLayer, ...]) -> tuple[KvLayer, ...]:
    return tuple(replace(layer, dtype=str(dtype).removeprefix("torch.")) for layer in layers)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def context_of(model: nn.Module, request: ServeRequest) -> int:
    most, why = context_limit(model)
    if request.context is not None and request.context > most:
        raise OptionError(f"{why}, not to {request.context}. Give --context {most} or less.")
    return request.context or min(most, 4096)


def _about_weights(near: int, far: int, parts: tuple[str, ...]) -> str:
    if not far:
        return f"weights: all stay near, {format_size(near)}"
    how = ", one part of a layer after the other" if parts else ""
    return f"weights: {format_size(near)} stay near, {format_size(far)} stream past in each step{how}"


def _about_rounded(model: nn.Module, request: ServeRequest) -> list[str]:
    return [] if request.weights == STORED else [f"approximate: {describe_rounded(model, request.weights)}"]


def _about_pages(serving: Serving) -> str:
    together = serving.pages * serving.page_tokens
    return (
        f"keys and values: {serving.pages} pages of {format_size(serving.page_bytes)}, {together} tokens; "
        f"{max(1, together // serving.context)} requests of {serving.context} tokens at once; "
        f"{serving.far_pages} more pages on disk"
    )


def _tables(model: nn.Module) -> dict[str, int]:
    return {
        name: table_rows(parameter)
        for name, parameter in model.named_parameters()
        if parameter.numel() > TABLE_BLOCK and _is_table(model, parameter)
    }


def _sizes(units: Iterable[Unit]) -> dict[str, int]:
    """Bytes of each weight, in whole pages."""
    return {name: pages(p.numel() * p.dtype.itemsize) for unit in units for name, p in unit.parameters}


def _packed(model: nn.Module, groups: list[tuple[str, ...]], near: set[str], spare: int) -> tuple[tuple[str, ...], ...]:
    """The groups that are held as products. One whose weight somebody else needs as it is costs its bytes again: that
    may take `spare` bytes."""
    found = [group for group in groups if near.issuperset(group) and can_pack(model.get_parameter(group[0]).dtype)]
    spent = sum(pages(model.get_parameter(name).nbytes) for name in _twice(model, tuple(found)))
    return tuple(group for group in found if spent <= spare or not _twice(model, (group,)))


def _twice(model: nn.Module, packed: tuple[tuple[str, ...], ...]) -> list[str]:
    """Weights of products that are needed as they are too."""
    return [name for group in packed for name in group if len(users_of(model, model.get_parameter(name))) > 1]


def _near(model: nn.Module, units: list[Unit]) -> set[str]:
    """Weights that stay whatever happens: the small ones, and those in use for as long as the model runs."""
    return {name for name, p in model.named_parameters() if p.numel() <= SMALL} | always_near(units)


def _arena(
    units: list[Unit], parts: tuple[str, ...], sizes: dict[str, int], near: set[str], rows: dict[str, int]
) -> tuple[int, int]:
    """Bytes of near memory to stream through: as much as is of use, and the least that does."""
    held = [0, *(TABLE_BLOCK * p.dtype.itemsize for unit in units for n, p in unit.parameters if n in rows)]
    for unit in units:
        pieces = [
            [sizes[n] for n, _ in piece.parameters if n not in near | rows.keys()] for piece in divide(unit, parts)
        ]
        whole, *alone = [sum(piece) for piece in pieces]
        # Where something stays for as long as a layer runs, what comes and goes may leave a gap on either side of it.
        held.append(whole + max(alone, default=0) * (2 if whole else 1))
    return pages(int((PARTS_AT_ONCE if parts else UNITS_AT_ONCE) * max(held))), pages(int(1.1 * max(held)))


def _is_table(model: nn.Module, parameter: nn.Parameter) -> bool:
    users = users_of(model, parameter)
    return bool(users) and all(Table.suits(module) for module in users) and _outside_units(model, users)


def _outside_units(model: nn.Module, users: list[nn.Module]) -> bool:
    ends = [
        getattr(model, "get_output_embeddings", lambda: None)(),
        getattr(model, "get_input_embeddings", lambda: None)(),
    ]
    return all(any(user is end for end in ends) for user in users)
