"""How an unchanged module runs out of the store.

Vocabulary of this file: a unit is *entered* when the first lane arrives at it, forward or backward, and *left* when all
have been through it and one arrives at the next. In between the unit's parameters point into leased bytes; otherwise they
are placeholders of their true shape. What autograd keeps of a unit is for the plan to say (`outsize.model.activations`); a
saved tensor that lies in a leased weight is always replaced by a `Ticket` and leased again in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from outsize.errors import ModelError, OptionError
from outsize.machine.allocator import Ceiling
from outsize.memory.store import Lease, Store
from outsize.model.activations import Mover, Parcel, run_unit, without_graph
from outsize.model.lanes import Lanes
from outsize.model.leaves import Leaves, Slot, slots_in
from outsize.model.units import Unit
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
    """A unit, the weights it leases while it runs, and what is done with its activations."""

    unit: Unit
    weights: tuple[Weight, ...]
    activations: Activations
    forward: Callable[..., Any]
    slots: list[Slot]
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
        self._here: AttachedUnit | None = None
        self._handles: list[Handle] = []
        self._resident = {name: store.lease(weights[name].blocks[0].name) for name in resident}
        for weight in weights.values():
            self._rest(weight)
            if weight.trainable:
                self._handles.append(weight.parameter.register_post_accumulate_grad_hook(self._taker(weight)))
        self._tables = {name for name, _ in plan.table_rows}
        self._mover = Mover(store, plan.moved_tensor_bytes, self._held_anyway())
        activations = dict(plan.activations)
        self.units = [self._bind(u, activations.pop(u.name, KEEP)) for u in units if not u.encloses]
        inside = {
            id(module) for attached in self.units if attached.weights for module in attached.unit.module.modules()
        }
        outside = [module for module in model.modules() if id(module) not in inside]
        self._slots = slots_in(outside, [w for w in weights.values() if w.name not in self._tables])
        if activations:
            raise OptionError(f"The plan names {next(iter(activations))!r}, which is not a unit of this model.")
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

    def _bind(self, unit: Unit, activations: Activations) -> AttachedUnit:
        if activations.home not in (NEAR, *self.store.tiers):
            raise OptionError(
                f"Activations of {unit.name} are to wait in {activations.home!r}, which is not a tier here."
            )
        names = dict.fromkeys(name for name, _ in unit.parameters if name in self.weights)
        moving = [self.weights[name] for name in names if name not in self._resident.keys() | self._tables]
        whole = tuple(weight for weight in dict.fromkeys(moving) if weight.whole)
        slots = slots_in(unit.module.modules(), [self.weights[name] for name in names.keys() - self._tables])
        attached = AttachedUnit(unit, whole, activations, unit.module.forward, slots)
        if whole:
            unit.module.forward = functools.wraps(attached.forward)(functools.partial(self._run, attached))
        elif activations != KEEP:
            raise OptionError(f"Unit {unit.name} leases no weights, so that it can only keep its activations.")
        return attached

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
            found = run_unit(attached.activations, attached.forward, return_to, pack, self._unpack, args, kwargs)
        else:
            found = attached.forward(*args, **kwargs)
        self.lanes.pass_turn()
        return found

    def _pack(self, activations: Activations, tensor: torch.Tensor) -> torch.Tensor | Ticket | Parcel:
        self.ceiling.keep()
        found = self._owner(tensor)
        if found is None:
            stays = activations.home in (NEAR, self.store.near)
            return without_graph(tensor) if stays else self._mover.pack(tensor, activations.home)
        attached, weight = found
        base = attached.leases[weight.name].tensors[WEIGHT]
        offset = (place_of(tensor)[1] - place_of(base)[1]) // base.element_size()
        return Ticket(attached, weight, offset, tuple(tensor.shape), tuple(tensor.stride()))

    def _owner(self, tensor: torch.Tensor) -> tuple[AttachedUnit, Weight] | None:
        """The leased weight in whose bytes the tensor lies, if any: views count, so identity is by place."""
        storage, address = place_of(tensor)
        attached = self._here
        if attached is None:
            return None
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
        """A lane is at the unit from now on: leave the unit before, which all lanes have been through, and enter."""
        if self._here is not attached:
            self._leave()
            self._enter(attached)
        self._leaves.show(attached.slots, self.lanes.current)

    def _change_lane(self) -> None:
        """Another lane runs from now on, somewhere outside the units."""
        self._leaves.show(self._slots, self.lanes.current)

    def _enter(self, attached: AttachedUnit) -> None:
        self.ceiling.keep()
        self._here = attached
        for weight in attached.weights:
            if self.before_use is not None:
                self.before_use(weight)
            lease = attached.leases[weight.name] = self.store.lease(weight.blocks[0].name)
            weight.parameter.data = lease.tensors[WEIGHT]

    def _leave(self) -> None:
        attached, self._here = self._here, None
        if attached is not None:
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
        if self._here is not None:
            self.release_weight(self._here, weight)

    def leased(self, weight: Weight) -> Lease | None:
        """The lease of a weight whose unit is entered, or that is resident."""
        leases = self._resident if self._here is None else self._resident | self._here.leases
        return leases.get(weight.name)

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
        self._leave()
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


def _refuse_state(module: nn.Module, *args: Any) -> None:
    """Before `state_dict` and `load_state_dict`: an empty state must not be taken for the model's."""
    raise ModelError(STATE_IS_ELSEWHERE.format(type(module).__name__))
