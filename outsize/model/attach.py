"""How an unchanged module runs out of the store.

Vocabulary of this file: a unit is *entered* when the first lane arrives at it, forward or backward, and *left* when all
have been through it and one arrives at the next. In between the unit's parameters point into leased bytes; otherwise they
are placeholders of their true shape. What autograd keeps of a unit is for the plan to say (`outsize.model.activations`); a
saved tensor that lies in a leased weight is always replaced by a `Ticket` and leased again in backward. A unit may have
*parts*: modules in it that are entered one after the other while the unit is, and lease by themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from outsize.errors import ModelError, OptionError
from outsize.machine.allocator import Ceiling
from outsize.memory.store import Lease, Store
from outsize.model.activations import Mover, Parcel, run_unit, without_graph
from outsize.model.lanes import Lanes
from outsize.model.leaves import Leaves, Slot, slots_in
from outsize.model.units import Unit, divide
from outsize.model.weights import WEIGHT, Weight, placeholder
from outsize.plan import KEEP, NEAR, Activations, Plan

GradientTaker = Callable[[Weight, torch.Tensor], None]
STATE_IS_ELSEWHERE = (
    "{} is attached to Outsize: its weights are in the store, and what the module holds between uses is empty. Call "
    "job.detach() for an ordinary module, or outsize.train.run.export(job, folder) to write the weights to files."
)
BeforeUse = Callable[[Weight], None]


class Handle(Protocol):
    """What can be taken off a module again."""

    def remove(self) -> None: ...


@dataclass(frozen=True)
class Ticket:
    """What autograd keeps instead of a view of a weight: how to find it again when backward asks."""

    unit: AttachedUnit
    weight: Weight
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(eq=False)
class AttachedUnit:
    """A unit, the weights it leases while it runs, and what is done with its activations. Its `parts` lease others; of a
    part, `within` is the unit that it belongs to."""

    unit: Unit
    weights: tuple[Weight, ...]
    activations: Activations
    forward: Callable[..., Any]
    slots: list[Slot]
    within: AttachedUnit | None = None
    parts: list[AttachedUnit] = field(default_factory=list)
    leases: dict[str, Lease] = field(default_factory=dict)


class Attachment:
    """The module's units bound to a store. `detach` makes it an ordinary module again.

    `resident` weights have parameters that always point into the store (small ones, and those of modules that enclose
    others); all others must be `whole` or belong to a table that handles itself (`outsize.model.vocabulary`). A parameter
    that is not among `weights` is somebody else's."""

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        units: list[Unit],
        weights: dict[str, Weight],
        resident: set[str],
        plan: Plan,
        device: torch.device,
    ) -> None:
        self.model, self.store, self.weights, self.device = model, store, weights, device
        self.lanes = Lanes(self._change_lane)
        self.ceiling = Ceiling(plan.ceiling_bytes)
        self.take_gradient: GradientTaker | None = None
        self.before_use: BeforeUse | None = None
        self._leaves = Leaves(self._taker)
        self._entered: list[AttachedUnit] = []  # a unit, and perhaps one of its parts
        self._complete: set[str] = set()  # weights that this traversal has updated
        self._mark = torch.empty(0)
        self._handles: list[Handle] = []
        self._resident = {name: store.lease(weights[name].blocks[0].name) for name in resident}
        for weight in weights.values():
            self._rest(weight)
            if weight.trainable:
                self._handles.append(weight.parameter.register_post_accumulate_grad_hook(self._taker(weight)))
        self._tables = {name for name, _ in plan.table_rows}
        self._mover = Mover(store, plan.moved_tensor_bytes, self._held_anyway())
        activations = dict(plan.activations)
        self.units = [
            attached
            for unit in units
            if not unit.encloses
            for attached in self._bind(unit, activations.pop(unit.name, KEEP), plan.parts)
        ]
        self.in_parts = {weight.name for part in self.units if part.within for weight in part.weights}
        inside = {
            id(module) for attached in self.units if attached.weights for module in attached.unit.module.modules()
        }
        outside = [module for module in model.modules() if id(module) not in inside]
        self._slots = slots_in(outside, [w for w in weights.values() if w.name not in self._tables])
        if activations:
            raise OptionError(f"The plan names {next(iter(activations))!r}, which is not a unit of this model.")
        for part in plan.parts:
            if not any(_has(unit.module, part) for unit in units if unit.repeated):
                raise OptionError(
                    f"The plan's parts name {part!r}, which is no module of a repeated unit of this model."
                )
        for module in {id(module): module for module in (model, *(unit.module for unit in units))}.values():
            self._handles.append(module.register_state_dict_pre_hook(_refuse_state))
            self._handles.append(module.register_load_state_dict_pre_hook(_refuse_state))

    # -- binding --------------------------------------------------------------------------------------------------

    def _rest(self, weight: Weight) -> None:
        """What the parameter points to between uses."""
        lease = self._resident.get(weight.name)
        if lease is not None:
            weight.parameter.data = lease.tensors[WEIGHT]
        else:
            weight.parameter.data = placeholder(weight, self.device)

    def _held_anyway(self) -> set[int]:
        """Storages of which a saved tensor costs nothing: those of resident weights, and the module's buffers."""
        tensors = [*(lease.bytes for lease in self._resident.values()), *self.model.buffers()]
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    def _bind(self, unit: Unit, activations: Activations, parts: tuple[str, ...]) -> list[AttachedUnit]:
        """The unit, and those of its parts that lease."""
        if activations.home not in (NEAR, *self.store.tiers):
            raise OptionError(
                f"Activations of {unit.name} are to wait in {activations.home!r}, which is not a tier here."
            )
        whole, *pieces = [self._attached(piece, activations) for piece in divide(unit, parts)]
        whole.parts = [part for part in pieces if part.weights]
        for part in whole.parts:
            part.within = whole
            part.unit.module.forward = functools.wraps(part.forward)(functools.partial(self._run_part, part))
        if whole.weights or whole.parts:
            unit.module.forward = functools.wraps(whole.forward)(functools.partial(self._run, whole))
        elif activations != KEEP:
            raise OptionError(f"Unit {unit.name} leases no weights, so that it can only keep its activations.")
        return [whole, *whole.parts]

    def _attached(self, unit: Unit, activations: Activations) -> AttachedUnit:
        names = dict.fromkeys(name for name, _ in unit.parameters if name in self.weights)
        moving = [self.weights[name] for name in names if name not in self._resident.keys() | self._tables]
        whole = tuple(weight for weight in dict.fromkeys(moving) if weight.whole)
        slots = slots_in(unit.module.modules(), [self.weights[name] for name in names.keys() - self._tables])
        return AttachedUnit(unit, whole, activations, unit.module.forward, slots)

    def _taker(self, weight: Weight) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            self.ceiling.keep()
            gradient, parameter.grad = parameter.grad, None
            if self.take_gradient is not None and gradient is not None:
                self.take_gradient(weight, gradient)

        return take

    # -- running --------------------------------------------------------------------------------------------------

    def _run(self, attached: AttachedUnit, *args: Any, **kwargs: Any) -> Any:
        self.arrive(attached)
        if torch.is_grad_enabled():
            pack = functools.partial(self._pack, attached.activations)
            return_to = functools.partial(self.arrive, attached)
            again = attached.parts and attached.activations.saved != "all"
            forward = functools.partial(self._ticketed, attached.forward) if again else attached.forward
            found = run_unit(attached.activations, forward, return_to, pack, self._unpack, args, kwargs)
        else:
            found = attached.forward(*args, **kwargs)
        self.lanes.pass_turn()
        return found

    def _run_part(self, part: AttachedUnit, *args: Any, **kwargs: Any) -> Any:
        name = part.unit.name
        if part.within not in self._entered:
            raise ModelError(f"{name} runs outside the unit whose part it is. Leave it out of the plan's parts.")
        self.arrive(part)
        found = part.forward(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) and self._owner(leaf) for leaf in tree_leaves(found)):
            raise ModelError(
                f"{name} gives its own weight away, for when it is gone. Leave it out of the plan's parts."
            )
        return found

    def _ticketed(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a unit's forward within a checkpoint, which knows nothing of parts that come and go. Instead of a weight it is
        given a mark to save: when backward asks for that, forward has run again, and the ticket's weight is leased after."""
        pack, unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]

        def pack_here(tensor: torch.Tensor) -> Any:
            ticket = self._ticket(tensor)
            return pack(tensor) if ticket is None else (ticket, pack(self._mark))

        def unpack_here(saved: Any) -> torch.Tensor:
            if not isinstance(saved, tuple):
                return unpack(saved)
            ticket, mark = saved
            unpack(mark)
            return self._unpack(ticket)

        with saved_tensors_hooks(pack_here, unpack_here):
            return forward(*args, **kwargs)

    def _pack(self, activations: Activations, tensor: torch.Tensor) -> torch.Tensor | Ticket | Parcel:
        self.ceiling.keep()
        ticket = self._ticket(tensor)
        if ticket is not None:
            return ticket
        stays = activations.home in (NEAR, self.store.near)
        return without_graph(tensor) if stays else self._mover.pack(tensor, activations.home)

    def _ticket(self, tensor: torch.Tensor) -> Ticket | None:
        found = self._owner(tensor)
        if found is None:
            return None
        attached, weight = found
        base = attached.leases[weight.name].tensors[WEIGHT]
        offset = (place_of(tensor)[1] - place_of(base)[1]) // base.element_size()
        return Ticket(attached, weight, offset, tuple(tensor.shape), tuple(tensor.stride()))

    def _owner(self, tensor: torch.Tensor) -> tuple[AttachedUnit, Weight] | None:
        """The leased weight in whose bytes the tensor lies, if any: views count, so identity is by place."""
        storage, address = place_of(tensor)
        for attached in self._entered:
            for weight in attached.weights:
                lease = attached.leases.get(weight.name)
                if lease is not None:
                    base, start = place_of(lease.bytes)
                    if base == storage and start <= address < start + lease.bytes.numel():
                        return attached, weight
        return None

    def _unpack(self, saved: torch.Tensor | Ticket | Parcel) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if isinstance(saved, Parcel):
            return self._mover.unpack(saved)
        self.arrive(saved.unit)
        lease = saved.unit.leases.get(saved.weight.name)
        if lease is None:
            raise ModelError(
                f"{saved.weight.name} is read in backward after its gradient was complete, and has been updated. "
                "Hold gradients until the step's end instead (clip, or your own loop)."
            )
        base = lease.tensors[WEIGHT]
        return base.view(-1).as_strided(saved.shape, saved.stride, base.storage_offset() + saved.offset)

    # -- entering and leaving ---------------------------------------------------------------------------------------

    def arrive(self, attached: AttachedUnit) -> None:
        """A lane is at the unit, or at a part of one, from now on: leave the unit before, which all lanes have been through,
        or the part before, and enter."""
        way = [attached] if attached.within is None else [attached.within, attached]
        if self._entered[: len(way)] != way:
            while self._entered != way[: len(self._entered)]:
                self._leave()
            for each in way[len(self._entered) :]:
                self._enter(each)
        for each in way:
            self._leaves.show(each.slots, self.lanes.current)

    def _change_lane(self) -> None:
        """Another lane runs from now on, somewhere outside the units."""
        self._leaves.show(self._slots, self.lanes.current)

    def _enter(self, attached: AttachedUnit) -> None:
        self.ceiling.keep()
        self._entered.append(attached)
        for weight in (weight for part in attached.parts for weight in part.weights):
            if self.before_use is not None:
                self.before_use(weight)  # not within the unit, which may be in the middle of a checkpoint
        for weight in attached.weights:
            if self.before_use is not None and attached.within is None:
                self.before_use(weight)
            if weight.name in self._complete:
                continue  # whoever reads it after its update gets what is no number
            lease = attached.leases[weight.name] = self.store.lease(weight.blocks[0].name)
            weight.parameter.data = lease.tensors[WEIGHT]

    def _leave(self) -> None:
        """The part, or the unit where none is entered."""
        attached = self._entered.pop()
        self._leaves.show(attached.slots, 0)
        for weight in attached.weights:
            self.release_weight(attached, weight)

    def release_weight(self, attached: AttachedUnit, weight: Weight) -> None:
        lease = attached.leases.pop(weight.name, None)
        if lease is not None:
            self._rest(weight)
            lease.release()

    def release_early(self, weight: Weight) -> None:
        """The weight's gradient is complete and applied: nothing in this backward reads it again."""
        self._complete.add(weight.name)
        for attached in self._entered:
            self.release_weight(attached, weight)

    def leased(self, weight: Weight) -> Lease | None:
        """The lease of a weight whose unit is entered, or that is resident."""
        leases = [self._resident, *(attached.leases for attached in self._entered)]
        return next((held[weight.name] for held in leases if weight.name in held), None)

    @property
    def streams(self) -> bool:
        """Some weight comes and goes."""
        return len(self._resident) < len(self.weights)

    @contextmanager
    def call_by_call(self, phase: str) -> Iterator[None]:
        """Within it, every call of the model is one phase of the store: streaming is foreseen from the second on."""
        phases: list[Any] = []

        def begin(module: nn.Module, args: Any) -> None:
            self.ceiling.keep()
            phases.append(self.store.phase(phase, again=True))
            phases[-1].__enter__()

        def end(module: nn.Module, args: Any, output: Any) -> None:
            self.leave_all()
            phases.pop().__exit__(None, None, None)

        handles = [
            self.model.register_forward_pre_hook(begin),
            self.model.register_forward_hook(end, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def traversal(self) -> Iterator[None]:
        """One pass of all lanes over the units; at its end every unit has been left."""
        try:
            yield
        finally:
            self.leave_all()

    def leave_all(self) -> None:
        while self._entered:
            self._leave()
        self._complete.clear()
        self._mover.settle()

    def until_detached(self, handle: Handle) -> None:
        """Remove this too when the module is detached."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Take all hooks off. Whoever wants the weights reads them from the store first: parameters hold nothing then."""
        self.leave_all()
        self._leaves.forget()
        for handle in self._handles:
            handle.remove()
        for attached in self.units:
            attached.unit.module.__dict__.pop("forward", None)
        for name, lease in self._resident.items():
            self.weights[name].parameter.data = placeholder(self.weights[name], self.device)
            lease.release()
        self._resident.clear()


def place_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins: its storage and the byte in it. Tensors of a rehearsal have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * tensor.element_size()


def _has(module: nn.Module, name: str) -> bool:
    return any(path == name for path, _ in module.named_modules())


def _refuse_state(module: nn.Module, *args: Any) -> None:
    """Before `state_dict` and `load_state_dict`: an empty state must not be taken for the model's."""
    raise ModelError(STATE_IS_ELSEWHERE.format(type(module).__name__))
