"""What a training run will hold, cause by cause, before any choice of what stays near."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from math import prod

from outsize.machine.allocator import Ceiling
from outsize.machine.caching import ROUND, cached_peak
from outsize.machine.devices import CONTEXT
from outsize.machine.environment import merges
from outsize.machine.heap import Change, heap_peak
from outsize.memory.disk import BOUNCE
from outsize.memory.tier import pages
from outsize.model.activations import ACTIVATION
from outsize.model.units import Unit, divide
from outsize.plan import Plan
from outsize.planner.beside import BUFFERS, COPIES, WORKSPACE, Beside
from outsize.planner.rehearsal import Rehearsed, homes
from outsize.planner.script import Create, Event, HomeOf, Key, Live, Script, Touched
from outsize.planner.sizes_of import WeightSize
from outsize.train.precision import find_precision
from outsize.train.update import CHUNK, PIECE

READ_AHEAD = 2  # chunks of state that may be on their way while one is stepped
LOOSE = 1.1  # leases end in another order than they begin, so that free room is in pieces
MANY = 48  # units that the C library is asked about
THREADS = 4 << 20  # bytes: stacks of the transfer threads and of lanes, and what python keeps for each
KERNELS = 32 << 20  # bytes that products and OpenMP keep for themselves; fitted, docs/log.md
# Where the C library does not merge what is freed, small allocations keep more of its heap than a replay of tensors tells.
SPREAD = 32 << 20  # bytes of that in any run
PINNED = 96 << 20  # bytes where nothing need be given back; both fitted, docs/log.md
PACKED = 3  # times a matrix: what may come within one product, its operands packed and its result
KEPT = "kept between tensors, as there is room"
TENSORS = "tensors of a step"
ARRIVING = 2  # pieces that come to a device's host for an update there: of a weight and of its gradient
PIECES = {"split": 3, "none": 3, "same": 0}  # of a piece in fp32, by how masters are kept: master, gradient, one more


@dataclass(frozen=True)
class Needs:
    """Bytes of the memory that computes, by cause: the host's, or a device's; then `beside` is what its host holds.

    `baseline` is what the process holds before it begins, or the driver of a device; `tensors` what the C library holds at
    most for the step's tensors, or the device's allocator; `scratch` the buffers of the update, of transfers and of
    products, `headroom` what may come between two looks at what the process holds, `always` the weights and states that
    never leave."""

    baseline: int
    tensors: int
    scratch: int
    least_arena: int
    good_arena: int
    always: int
    headroom: int
    beside: Beside | None = None

    @property
    def fixed(self) -> int:
        return self.baseline + self.tensors + self.scratch + self.headroom + self.always

    @property
    def least(self) -> int:
        return self.fixed + self.least_arena


def find_needs(
    units: list[Unit],
    sizes: dict[str, WeightSize],
    rows: dict[str, int],
    always: set[str],
    baseline: int,
    rehearsed: Rehearsed,
    bare: Plan,
    libraries: int = 0,
) -> Needs:
    """`bare` is the rehearsed plan, with nothing near; `baseline` that of the process, but for a device's `libraries`."""
    largest_chunk = max((size.largest_state for size in sizes.values()), default=0)
    scratch = _updating(sizes, bare) + _exchanged(sizes, bare)
    least = pages(int(LOOSE * (pinned_peak(rehearsed.script, homes(bare, always), bare.near) + 2 * largest_chunk)))
    together = [piece for unit in units for piece in divide(unit, bare.parts)]
    largest = max((_unit_bytes(piece, sizes, rows, always) for piece in together), default=0)
    here = Needs(
        baseline=baseline,
        tensors=tensor_bytes(rehearsed, bare),
        scratch=scratch + THREADS + KERNELS + (0 if merges() else SPREAD) + (3 * BOUNCE if rows else 0),
        least_arena=least,
        good_arena=pages(least + int(1.2 * largest) + READ_AHEAD * largest_chunk),
        always=sum(sizes[name].bytes + sizes[name].state_bytes for name in always),
        headroom=Ceiling.WORTH + PACKED * _largest_matrix(sizes, rows),
    )
    if not bare.device_bytes:
        return here
    return replace(
        here,
        baseline=CONTEXT,
        scratch=scratch + WORKSPACE,
        least_arena=-(-here.least_arena // ROUND) * ROUND,
        good_arena=-(-here.good_arena // ROUND) * ROUND,
        always=sum(sizes[name].weight_on_device + sizes[name].state_on_device for name in always),
        headroom=0,
        beside=Beside(
            *(baseline, libraries, moved_bytes(rehearsed, "host")),
            THREADS + BUFFERS * BOUNCE + COPIES * _largest_matrix(sizes, rows),
            _updating(sizes, bare, ARRIVING),
        ),
    )


def moved_bytes(rehearsed: Rehearsed, home: str) -> int:
    """Of blocks for activations that wait in that tier."""
    script = rehearsed.asked
    created = (event.block for event in chain(script.setup, *script.steps) if isinstance(event, Create))
    return sum({b.name: b.nbytes for b in created if b.name.startswith(f"{ACTIVATION}:{home}:")}.values())


def pinned_peak(script: Script, home_of: HomeOf, near: str = "host") -> int:
    """Memory of the tier `near` that the leases of blocks with another home pin at once, at most."""
    sizes: dict[str, int] = {}
    pins: Counter[str] = Counter()
    now = peak = 0
    for event in chain(script.setup, *script.steps):
        if isinstance(event, Create):
            away = home_of(event.block.name) != near
            sizes[event.block.name] = event.block.nbytes if away else 0
        elif isinstance(event, Touched) and event.what != "change":
            before = pins[event.name]
            pins[event.name] += 1 if event.what in ("take", "fresh") else -1
            if not before or not pins[event.name]:
                now += sizes[event.name] if not before else -sizes[event.name]
                peak = max(peak, now)
    return peak


def tensor_bytes(rehearsed: Rehearsed, plan: Plan) -> int:
    """What the C library takes for a step's tensors, or the allocator of a device; of many units as many as it is asked
    for, the rest carried on."""

    def taken(units: Sequence[str]) -> int:
        script = rehearsed.over(units) if units else rehearsed.script
        changes = changes_of(script.steps[-1])
        return cached_peak(_ended(changes)) if plan.device_bytes else held_for(changes, plan.recycle_bytes)

    if len(rehearsed.units) <= MANY:
        return taken(rehearsed.units)
    many, few = rehearsed.some(MANY), rehearsed.some(MANY // 2)
    held = taken(many)
    return held + max(held - taken(few), 0) * (len(rehearsed.units) - len(many)) // (len(many) - len(few))


def _ended(changes: list[Change]) -> list[Change]:
    """With what is alive at the end let go: then a device's allocator has room for the same again. (Of units that others
    stand for, some tensors are never seen to go.)"""
    alive: dict[int, int] = {}
    for number, nbytes in changes:
        if nbytes > 0:
            alive[number] = nbytes
        else:
            alive.pop(number, None)
    return [*changes, *((number, -nbytes) for number, nbytes in alive.items())]


def held_for(changes: list[Change], recycle: int) -> int:
    """What the C library holds at most for these tensors, when they come again and again."""
    peak = heap_peak(changes * 2, recycle)
    return peak if peak is not None else int(1.5 * _live_peak(changes))  # nobody to ask: a guess


def changes_of(events: Iterable[Event]) -> list[Change]:
    """The tensors of a step, by number."""
    numbers: dict[Key, int] = {}
    return [(numbers.setdefault(event.key, len(numbers)), event.nbytes) for event in events if isinstance(event, Live)]


def _live_peak(changes: Iterable[Change]) -> int:
    """The most bytes of tensors alive at once."""
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def _updating(sizes: dict[str, WeightSize], plan: Plan, more: int = 0) -> int:
    """Buffers of the update, each of the largest piece in fp32: those the updater keeps, so many `more`, and moments that
    are kept in bf16 as the optimizer sees them."""
    trainable = [size for size in sizes.values() if size.weight.trainable]
    chunked = (min(size.largest_gradient, 4 * PIECE) if _chunked(size) else size.largest_gradient for size in trainable)
    master = find_precision(plan.precision).master
    buffers = max(PIECES[master], plan.clip is not None) + (2 if plan.moments == "bf16" else 0) + more
    return buffers * max(chunked, default=0)


def _exchanged(sizes: dict[str, WeightSize], plan: Plan) -> int:
    """What comes of a gradient from other workers; the sum is among the step's tensors."""
    return max(size.exchanged for size in sizes.values()) if plan.sharers > 1 else 0


def _largest_matrix(sizes: dict[str, WeightSize], rows: dict[str, int]) -> int:
    return max((size.bytes for name, size in sizes.items() if name not in rows), default=0)


def gradient_bytes(sizes: dict[str, WeightSize], taken: Callable[[int], int] = pages) -> int:
    """Of gradients that wait: a block of fp32 for each block of a weight; what is `taken` for one of so many bytes."""
    weights = [size.weight for size in sizes.values() if size.weight.trainable]
    return sum(taken(4 * prod(weight.block_shape(block))) for weight in weights for block in weight.blocks)


def _chunked(size: WeightSize) -> bool:
    return size.state_bytes == 0 or size.largest_state < size.state_bytes or size.weight.numel <= CHUNK


def _unit_bytes(unit: Unit, sizes: dict[str, WeightSize], rows: dict[str, int], always: set[str]) -> int:
    return sum(sizes[name].leased for name, _ in unit.parameters if name not in always and name not in rows)
