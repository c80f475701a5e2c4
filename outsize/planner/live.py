"""Which storages are alive while fake tensors are computed with, and which of them the caches hold no longer.

A new one lies where one that went lay, and is in the caches if that was: the C library gives the memory back that was freed
last, of those about as large. Where all that is made is kept, there is none, and memory comes that nobody used lately."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from outsize.planner.prices import bytes_of
from outsize.planner.script import Key, Live

CACHED = 32 << 20  # bytes that operations touch until what was touched before them is out of the caches; chosen
LONG_AGO = -CACHED - 1


class LiveBytes:
    """Tells `script` of all storages that operations create and let go; what is ignored is the store's."""

    def __init__(self, tell: Callable[[Live], None]) -> None:
        self._tell = tell
        self._ignored: dict[int, Any] = {}
        self._count = 0
        self._live: dict[int, Any] = {}
        self.passed = 0
        """Bytes that operations have touched."""
        self._touched: dict[int, int] = {}  # how many of them when each of the live storages was last touched
        self._freed: dict[int, list[int]] = {}  # the same of storages that went, by about how large they were

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        for storage in [tensor.untyped_storage() for tensor in tensors]:
            self._watch(self._ignored, storage, lambda touched: None)

    def is_cold(self, tensor: torch.Tensor) -> bool:
        """Its bytes come from memory, or go there, and not to a cache: it is the store's, or more than the caches hold was
        touched since it was."""
        cdata = tensor.untyped_storage()._cdata
        return cdata in self._ignored or self.passed - self._touched.get(cdata, self.passed) > CACHED

    def touch(self, values: Any) -> None:
        """An operation reads or writes these."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, FakeTensor):
                self.passed += bytes_of(tensor)
                cdata = tensor.untyped_storage()._cdata
                if cdata in self._live:
                    self._touched[cdata] = self.passed

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
        freed = self._freed.setdefault(_about(nbytes), [])
        self._touched[storage._cdata] = freed.pop() if freed else LONG_AGO

        def go(touched: int) -> None:
            freed.append(touched)
            self._tell(Live(key, -nbytes))

        self._watch(self._live, storage, go)
        self._tell(Live(key, nbytes))

    def _watch(self, among: dict[int, Any], storage: torch.UntypedStorage, then: Callable[[int], None]) -> None:
        """Until it dies, which its Python object does no sooner; `then` is told when it was last touched."""
        cdata = storage._cdata

        def go(_: Any) -> None:
            del among[cdata]
            then(self._touched.pop(cdata, LONG_AGO))

        among[cdata] = weakref.ref(storage, go)


def _about(nbytes: int) -> int:
    """The same for sizes that differ by less than a fourth."""
    return nbytes >> max(nbytes.bit_length() - 3, 0) << max(nbytes.bit_length() - 3, 0)
