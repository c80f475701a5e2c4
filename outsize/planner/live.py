"""Which storages are alive while fake tensors are computed with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from outsize.planner.script import Key, Live


class LiveBytes:
    """Tells `script` of all storages that operations create and let go; what is ignored is somebody else's."""

    def __init__(self, tell: Callable[[Live], None]) -> None:
        self._tell = tell
        self._ignored: dict[int, Any] = {}
        self._count = 0
        self._live: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        for storage in [tensor.untyped_storage() for tensor in tensors]:
            self._watch(self._ignored, storage, lambda: None)

    def ignores(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._ignored

    def see(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._ignored and storage._cdata not in self._live and storage.nbytes():
                    self._come(storage)

    def number(self) -> Key:
        """Of a storage that nobody has seen before."""
        self._count += 1
        return self._count, -1

    def _come(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = self.number(), storage.nbytes()
        self._watch(self._live, storage, lambda: self._tell(Live(key, -nbytes)))
        self._tell(Live(key, nbytes))

    def _watch(self, among: dict[int, Any], storage: torch.UntypedStorage, then: Callable[[], None]) -> None:
        """Until it dies, which its Python object does no sooner."""
        cdata = storage._cdata

        def go(_: Any) -> None:
            del among[cdata]
            then()

        among[cdata] = weakref.ref(storage, go)
