"""What an operation costs on a machine: floating-point operations by rate, bytes by bandwidth, and a fixed cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from outsize.distributed.measure import Crowd
from outsize.machine.machine import Machine, Processor
from outsize.model.activations import given_by_name
from outsize.planner.known_prices import KnownPrices
from outsize.planner.samples import Cooling, Pulse, usual_seconds

LARGEST_DONE = 256 << 20  # bytes that an operation may touch to be done for its price
UPDATED = 28  # bytes of an element: its weight, low bits and two moments, each read and written, and its gradient
RESULT = -1  # the place of what an operation gives, beside those of its operands
LEAST = 1 << 15  # elements that torch gives to several threads (at::internal::GRAIN_SIZE); fewer are soon in a cache
aten = torch.ops.aten
AS_ON_DEVICE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Price:
    """`beside`: seconds more that it takes while blocks stream."""

    seconds: float
    floating_operations: float = 0.0
    beside: float = 0.0


FREE = Price(0.0)
Cold = Callable[[torch.Tensor], bool]
"""Whether no cache holds a tensor: its bytes come from memory, or go there."""


def nothing(tensor: torch.Tensor) -> bool:
    return False


class Prices(Protocol):
    """Seconds of each torch operation, of whose operands some may be cold, and of the optimizer by the elements it steps.
    `keep` is called when no more is asked for a while: the next planning will know what this one has measured."""

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price: ...

    def update(self, elements: int, like: Any, make: Callable[[], Callable[[], None]]) -> Price:
        """`make()` gives the same step of real numbers; those `like` each other, in the optimizer's class first, take as
        long."""
        ...

    def host_update(self, elements: int) -> float:
        """Seconds of the same on the host of a device."""
        ...

    def keep(self) -> None: ...


@dataclass(frozen=True)
class RatedPrices:
    """Prices from a described machine's rates."""

    machine: Machine

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price:
        processor = self.machine.compute
        count = operations_of(function)
        if count is not None:
            done = _seen(function, args, kwargs) * count(*args, **kwargs, out_val=result)
            matrix = next(
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1
            )
            rate = processor.matmul_rate(DTYPES.get(matrix.dtype, "fp32"), _rows(args))
            return Price(done / rate + processor.operation_seconds, done)
        if is_view(function):
            return Price(processor.operation_seconds)
        touched = sum(bytes_of(leaf) for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
        return Price(touched / processor.elementwise.at(max(touched, 1)) + processor.operation_seconds)

    def update(self, elements: int, like: Any, make: Callable[[], Callable[[], None]]) -> Price:
        return Price(_updated(elements, self.machine.compute))

    def host_update(self, elements: int) -> float:
        return _updated(elements, self.machine.processor("host"))

    def keep(self) -> None: ...


def _updated(elements: int, processor: Processor) -> float:
    """As fast as AdamW on fp32 of which nothing is in a cache, or as memory lets what is stored come and go: one hides under
    the other."""
    return max(elements / processor.update, elements * UPDATED / processor.copy)


@dataclass(frozen=True)
class Thrashed:
    """What cold operands cost more where all caches are gone through (`outsize.planner.thrashed`): `longer`, a part of what
    an operation takes; of a product, `later` seconds for each byte."""

    longer: float = 0.0
    later: float = 0.0


@dataclass(frozen=True)
class MeasuredPrices:
    """Prices of the machine that this runs on: each operation is done a few times, on tensors of the same shapes and dtypes.

    Memory held meanwhile is what one operation takes in and gives out; one that needs too much of it is only rated."""

    rated: RatedPrices
    passing: float
    """Seconds that an operation costs besides (`seconds_of_passing`)."""
    meeting: float = 0.0
    """And one that several threads share (`outsize.planner.meeting`)."""
    known: KnownPrices = field(default_factory=KnownPrices)
    thrashed: Thrashed = Thrashed()
    cooling: Cooling = field(default_factory=Cooling)
    pulse: Pulse = field(default_factory=Pulse)
    _prices: dict[Any, Price] = field(default_factory=dict)
    _done: set[Any] = field(default_factory=set)

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price:
        far = () if is_view(function) or operations_of(function) is not None else _far(args, kwargs, result, cold)
        like = (function, looks(args), looks(tuple(kwargs.items())), *((far,) if far else ()))
        key = function if is_view(function) else like
        if key not in self._prices:
            self._prices[key] = self._price(key, function, args, kwargs, result, far)
        return self._prices[key]

    def _price(
        self, key: Any, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, far: tuple[int, ...]
    ) -> Price:
        rated = self.rated.of(function, args, kwargs, result)
        also = [result if place == RESULT else args[place] for place in far]  # there are two of each
        held = sum(
            bytes_of(leaf) for leaf in tree_leaves((args, kwargs, result, also)) if isinstance(leaf, torch.Tensor)
        )
        seconds = None
        if not is_view(function) and held <= LARGEST_DONE:
            product = operations_of(function) is not None
            do = partial(_do, function, args, kwargs)
            # The weight of a product comes from memory, not from a cache.
            seconds = self.known.find(
                str(key),
                lambda: do(
                    lambda done: usual_seconds(done, self.cooling if product else self._before(done, far), self.pulse)
                ),
                lambda: self._leave(key if product else function, do),
            )
        besides = self.passing + (self.meeting if is_shared(function, (args, result)) else 0.0)
        seconds = rated.seconds if seconds is None else seconds
        return Price(seconds + besides, rated.floating_operations, self._beside(seconds, function, args, result, far))

    def _beside(self, seconds: float, function: Any, args: tuple[Any, ...], result: Any, far: tuple[int, ...]) -> float:
        if operations_of(function) is None:
            return seconds * self.thrashed.longer if far else 0.0
        touched = sum(bytes_of(leaf) for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
        return touched * self.thrashed.later

    def _before(self, done: partial[Any], far: tuple[int, ...]) -> Callable[[], Any]:
        """What leaves cold operands out of the caches, by their places, and all others in: the same is done with
        others in their place. What that gives holds the only memory that is in the caches until a cold result lies
        elsewhere."""
        if not far:
            return partial(_once, done)
        beside = partial(
            done.func, *(_numbers(a) if place in far else a for place, a in enumerate(done.args)), **done.keywords
        )

        def before() -> Any:
            self.cooling()
            given = beside()
            return given if RESULT in far else None

        return before

    def _leave(self, what: Any, do: Callable[[Callable[[partial[Any]], Any]], Any]) -> None:
        """Do what need not be measured once, for what it leaves in memory: code, and of each product a compiled kernel."""
        if what not in self._done:
            self._done.add(what)
            do(lambda done: done())

    def update(self, elements: int, like: Any, make: Callable[[], Callable[[], None]]) -> Price:
        key = str(like)
        if key not in self._prices:
            # Of a user's own class the name says little: who edits it has another one.
            known = self.known if like[0].__module__.startswith("torch.") else KnownPrices()
            with _disable_current_modes():  # the first step that is done makes the optimizer's state
                seconds = known.find(key, lambda: usual_seconds(make(), self.cooling, self.pulse), lambda: make()())
            seconds = seconds or 0.0
            self._prices[key] = Price(seconds, beside=seconds * self.thrashed.longer)
        return self._prices[key]

    def host_update(self, elements: int) -> float:
        return self.rated.host_update(elements)

    def keep(self) -> None:
        self.cooling.end()
        self.known.keep()


@dataclass(frozen=True)
class CrowdedPrices:
    """Prices where others compute on the same machine meanwhile."""

    prices: Prices
    crowd: Crowd

    def of(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold = nothing
    ) -> Price:
        price = self.prices.of(function, args, kwargs, result, cold)
        slower = self.crowd.memory if operations_of(function) is None else self.crowd.products
        return Price(slower * price.seconds, price.floating_operations, slower * price.beside)

    def update(self, elements: int, like: Any, make: Callable[[], Callable[[], None]]) -> Price:
        price = self.prices.update(elements, like, make)
        return Price(self.crowd.memory * price.seconds, beside=self.crowd.memory * price.beside)

    def host_update(self, elements: int) -> float:
        """All devices of a node have one host."""
        return self.crowd.workers * self.prices.host_update(elements)

    def keep(self) -> None:
        self.prices.keep()


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def seconds_of_passing() -> float:
    """What an operation costs on its way through modules, hooks and autograd, forward, recomputed and backward: of a
    stack of layers so small that hardly anything else takes time."""
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(8)))
    inputs = torch.ones(2, 4, requires_grad=True)

    def run() -> None:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            checkpoint(layers, inputs, use_reentrant=False).sum().backward()

    with _Counting() as counting:
        run()
    seconds = []
    for _ in range(20):
        started = perf_counter()
        run()
        seconds.append(perf_counter() - started)
    return min(seconds) / counting.count


def yardsticks(passing: float, cooling: Cooling, pulse: Pulse) -> list[float]:
    """Seconds of what prices are made of: a product, an operation as fast as memory is, and what an operation costs
    besides."""
    numbers, large = torch.full((1024, 1024), 0.25, dtype=torch.bfloat16), torch.full((4, 1 << 20), 0.25)
    done = (partial(torch.mm, numbers[:512], numbers), partial(torch.add, large, large))
    return [*(usual_seconds(each, cooling, pulse) for each in done), passing]


def _do(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: Callable[[partial[Any]], Any]) -> Any:
    """What `how` gives for an operation on real numbers; None for one that numbers of no meaning cannot pass."""
    with _disable_current_modes():
        try:
            real_args, real_kwargs = tree_map_only(torch.Tensor, _numbers, (args, kwargs))
            return how(partial(function, *real_args, **real_kwargs))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return None


def _once(done: Callable[[], Any]) -> None:
    done()


def _far(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, cold: Cold) -> tuple[int, ...]:
    """The places of operands that are cold, and large enough for it to matter; `RESULT` stands for memory that is new."""
    first = result[0] if isinstance(result, tuple) and result else result
    tensors = [(place, arg) for place, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    given = (tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor))
    if isinstance(first, torch.Tensor) and _storage(first) not in map(_storage, given):
        tensors.append((RESULT, first))
    return tuple(place for place, tensor in tensors if tensor.numel() >= LEAST and cold(tensor))


def is_shared(function: Any, values: Any) -> bool:
    """It has enough elements for several threads."""
    shared = (isinstance(leaf, torch.Tensor) and leaf.numel() >= LEAST for leaf in tree_leaves(values))
    return not is_view(function) and any(shared)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that looks the same: a number that is neither zero nor one, or zeros where they may be indices."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = torch.full((max(elements, 1),), 0.25 if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride())


def looks(value: Any) -> Any:
    """What the cost of an operation may depend on, to look it up by."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(looks, value)) if isinstance(value, list | tuple) else value


@cache
def operations_of(function: Any) -> Callable[..., int] | None:
    """The formula of `torch.utils.flop_counter` for an operation that has one. It has one for attention on devices, none for
    that of processors, which is given the same tensors."""
    packet = getattr(function, "overloadpacket", function)
    return flop_registry.get(AS_ON_DEVICE.get(packet, packet))


def _seen(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The part of its operations that is done: where each token sees only those before it, kernels leave out the others."""
    return 0.5 if given_by_name(function, args, kwargs).get("is_causal") else 1.0


@cache
def is_view(function: Any) -> bool:
    """The operation's result is another look at its input: nothing is computed."""
    schema = getattr(function, "_schema", None)
    returns = schema.returns if schema is not None else []
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _rows(args: tuple[Any, ...]) -> int:
    """Rows of the left matrix of a product, of all its batches."""
    matrices = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]
    return matrices[0].shape[-2] if matrices else 1


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes that are read or written: of an expanded tensor those that exist."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else 1
    return elements * tensor.element_size()
