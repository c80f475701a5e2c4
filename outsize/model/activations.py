"""What a unit leaves behind in forward for its backward, and where that waits.

Vocabulary of this file: a tensor that autograd saves is *packed*. If it waits in another tier, the bytes of its storage
go into a block of the store, and autograd gets a `Parcel`. When backward asks, the block is leased, usually there
already, because leases in a step come in the same order every time; the tensor that backward gets lies in the leased
bytes. The block is dropped when the last parcel of it has gone. So a graph that is thrown away, used twice, or left
half done by an exception gives back what it holds like any other.

Why not by ranges of tokens, as MEMO does (arXiv 2407.12117): a matrix product over some of the rows does not give the
bits of the product over all of them. Here each operation is run again whole or its result is brought back.
"""

from __future__ import annotations

import heapq
import weakref
from collections import deque
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from outsize.errors import ModelError
from outsize.memory.block import make_block
from outsize.memory.store import Lease, Store
from outsize.memory.tier import pages
from outsize.plan import Activations

ACTIVATION = "activation"  # the one part of an activation's block
CACHES = ("past_key_values", "past_key_value", "layer_past")
aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
ATTEND = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
PRODUCTS = ATTENTION | {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._grouped_mm}
CHANGED = (
    "A tensor that was saved for backward has been changed in place since. Keep, or recompute, the activations of "
    "the unit that does so."
)
UNLIKE = (
    "A unit has not done the same operations again in backward as in forward (another attention kernel, perhaps). Keep its "
    "activations, or recompute all of them."
)


def run_unit(
    activations: Activations,
    forward: Callable[..., Any],
    arrive: Callable[[], None],
    pack: Callable[[torch.Tensor], Any],
    unpack: Callable[[Any], torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a unit's forward with gradients, so that autograd keeps of it what `activations` says, each tensor as `pack`
    gives it. Where forward is to run again in backward, `arrive` is called before each run."""
    if activations.saved == "all":
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)
    results = Results(pack, unpack, ATTENTION if activations.saved == "attention" else PRODUCTS)
    seeing = {"products": results, "attention": AroundAttention(results)}.get(activations.saved, nullcontext())

    def body(*args: Any, **kwargs: Any) -> Any:
        arrive()
        results.begin()
        with seeing:
            return forward(*args, **kwargs)

    # A cache would be appended to twice; transformers' own checkpointed layers leave it out too.
    kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
    with saved_tensors_hooks(pack, unpack):  # for the unit's input; what lies inside, `checkpoint` sees to
        return checkpoint(body, *args, use_reentrant=False, **kwargs)


# -- to another tier and back -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Stay:
    """The bytes of one storage in a block. `near` are the leased bytes while backward uses them."""

    block: str
    key: tuple[int, int]
    original: StorageWeakRef
    """Keeps the address in `key` from being given to another storage."""
    lease: Lease | None = None
    near: torch.Tensor | None = None
    version: int = 0
    loose: StorageWeakRef | None = None

    @property
    def in_use(self) -> bool:
        """All parcels have gone, but somebody still holds a tensor that lies in the leased bytes."""
        return self.loose is not None and not self.loose.expired()


@dataclass(eq=False)
class Content:
    """What all parcels of one storage share; the stay ends when it dies."""

    stay: Stay


@dataclass(frozen=True, eq=False)
class Parcel:
    """What autograd keeps in place of a tensor that waits in another tier."""

    content: Content
    dtype: torch.dtype
    shape: Sequence[int]
    stride: Sequence[int]
    offset: Any


@dataclass(eq=False)
class Mover:
    """Sends saved tensors to blocks of `store` and brings them back. Storages smaller than `least` bytes stay, and so do
    those in `fixed`, which somebody else holds anyway (by `_cdata`).

    Blocks are used again for whatever has the same size, within a step and in the next one."""

    store: Store
    least: int
    fixed: set[int] = field(default_factory=set)
    _here: dict[tuple[int, int], weakref.ref[Content]] = field(default_factory=dict)
    _free: dict[tuple[str, int], list[tuple[int, str]]] = field(default_factory=dict)
    _made: dict[str, tuple[tuple[str, int], int]] = field(default_factory=dict)
    _ended: deque[Stay] = field(default_factory=deque)

    def pack(self, tensor: torch.Tensor, home: str) -> torch.Tensor | Parcel:
        """The tensor itself if it is small or of an unusual kind; else a parcel, its bytes being on their way."""
        self.settle()
        storage = tensor.untyped_storage() if tensor.layout is torch.strided else None
        if storage is None or storage.nbytes() < self.least or storage._cdata in self.fixed or _unusual(tensor):
            return without_graph(tensor)
        key = (storage._cdata, tensor._version)
        known = self._here.get(key)
        content = known() if known is not None else None
        if content is None:
            content = self._send(tensor, storage, key, home)
        return Parcel(content, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(self, parcel: Parcel) -> torch.Tensor:
        self.settle()
        stay = parcel.content.stay
        if stay.near is None:
            stay.lease = self.store.lease(stay.block)
            stay.near = self.store.alias(stay.lease)
            stay.version = stay.near._version
        elif stay.near._version != stay.version:
            raise ModelError(CHANGED)
        base = stay.near.view(parcel.dtype)
        return base.as_strided(parcel.shape, parcel.stride, base.storage_offset() + parcel.offset)

    def settle(self) -> None:
        """Give back the blocks of parcels that have gone. Parcels die wherever Python lets them, even inside the store:
        so this happens later, at moments that are the same in every step."""
        for _ in range(len(self._ended)):
            stay = self._ended[0]
            if stay.near is not None:
                assert stay.lease is not None
                aliased = stay.near is not stay.lease.bytes
                stay.loose = StorageWeakRef(stay.near.untyped_storage()) if aliased else None
                stay.near = None
            if stay.in_use:
                self._ended.rotate(-1)
                continue
            (stay.lease or self.store.lease(stay.block, fresh=True)).drop()
            self._ended.popleft()
            self._here.pop(stay.key, None)
            shelf, number = self._made[stay.block]
            heapq.heappush(self._free[shelf], (number, stay.block))

    def _send(self, tensor: torch.Tensor, storage: Any, key: tuple[int, int], home: str) -> Content:
        stay = Stay(self._block(home, storage.nbytes()), key, StorageWeakRef(storage))
        content = Content(stay)
        weakref.finalize(content, self._ended.append, stay).atexit = False
        self._here[key] = weakref.ref(content)
        with torch.no_grad(), self.store.lease(stay.block, fresh=True) as lease:
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            lease.bytes[: storage.nbytes()].view(tensor.dtype).copy_(whole)
        return content

    def _block(self, home: str, nbytes: int) -> str:
        """A block of that size that nobody uses; a new one if there is none."""
        shelf = (home, pages(nbytes))
        free = self._free.setdefault(shelf, [])
        if free:
            return heapq.heappop(free)[1]
        number = sum(made == shelf for made, _ in self._made.values())
        name = f"{ACTIVATION}:{home}:{shelf[1]}:{number}"
        self.store.create(make_block(name, [(ACTIVATION, ACTIVATION, torch.uint8, (shelf[1],))]), home, durable=False)
        self._made[name] = (shelf, number)
        return name


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """For autograd to keep as it is. Some functions save their own result, which holds the graph: kept so, a graph that
    nobody calls backward on would hold itself for ever."""
    return tensor.detach()


def _unusual(tensor: torch.Tensor) -> bool:
    """Not simply numbers at an offset of a storage."""
    lazy = tensor.is_conj() or tensor.is_neg()
    return lazy or tensor.is_quantized or tensor.untyped_storage().nbytes() % tensor.element_size() != 0


# -- results that are dear to compute ---------------------------------------------------------------------------------


class Results(TorchDispatchMode):
    """Results of `dear` operations: saved when the unit runs, and given out instead of being computed when it runs again.
    What draws random numbers is always computed, so that what follows draws those that it drew."""

    def __init__(
        self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor], dear: Set[Any]
    ) -> None:
        super().__init__()
        self._pack, self._unpack, self._dear = pack, unpack, dear
        self._results: list[tuple[Any, Any]] = []  # each operation and what it gave
        self._again = False
        self._next = 0

    def begin(self) -> None:
        """A run of the unit, its first or again."""
        self._again, self._next = bool(self._results), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket not in self._dear or _draws(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        if self._again:
            return self._given_out(func)
        result = func(*args, **(kwargs or {}))
        self._results.append((func, tree_map_only(torch.Tensor, self._save, result)))
        return result

    def _given_out(self, func: Any) -> Any:
        known, result = self._results[self._next] if self._next < len(self._results) else (None, None)
        if known is not func:
            raise ModelError(UNLIKE)
        self._next += 1
        return tree_map_only(_Saved, self._bring, result)

    def _save(self, result: torch.Tensor) -> _Saved:
        with _versions_shared():
            alias = without_graph(result)
            return _Saved(self._pack(alias), alias._version)

    def _bring(self, saved: _Saved) -> torch.Tensor:
        with _versions_shared():
            if isinstance(saved.packed, torch.Tensor) and saved.packed._version != saved.version:
                raise ModelError(CHANGED)
            return without_graph(self._unpack(saved.packed))


class AroundAttention(TorchFunctionMode):
    """Lets `results` see the operations of attention alone: it slows each that it sees."""

    def __init__(self, results: Results) -> None:
        super().__init__()
        self._results = results

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self._results if func in ATTEND else nullcontext():
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True, eq=False)
class _Saved:
    packed: Any
    version: int


def _versions_shared() -> Any:
    """Below autograd, where a dispatch mode works, views count their changes apart; within this, as anywhere else. As
    `torch.utils.checkpoint` does it."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The operation draws random numbers: attention with dropout inside."""
    return bool(given_by_name(func, args, kwargs).get("dropout_p"))


def given_by_name(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an operation, as its schema calls them; of one without a schema those that were given by name."""
    schema = getattr(func, "_schema", None)
    names = (argument.name for argument in (schema.arguments if schema is not None else ()))
    return {**dict(zip(names, args, strict=False)), **kwargs}
