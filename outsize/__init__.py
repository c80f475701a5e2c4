"""Outsize trains, adapts and serves language models that are bigger than the memory at hand."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outsize.api import attach, plan
    from outsize.serving import Engine
    from outsize.train.optimizer_file import load_optimizer_state

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "attach", "load_optimizer_state", "plan"]

# Where a public name lives. It is imported at first use: `import outsize` must not cost the memory of torch.
_HOMES = {
    "Engine": "outsize.serving",
    "attach": "outsize.api",
    "load_optimizer_state": "outsize.train.optimizer_file",
    "plan": "outsize.api",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'outsize' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """`outsize.plan` is what a user calls: that the module `outsize.plan` has been imported must not hide it."""

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
