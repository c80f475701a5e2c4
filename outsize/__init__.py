"""Outsize trains, adapts and serves language models that are bigger than the memory at hand."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outsize.api import attach
    from outsize.serving import Engine
    from outsize.train.optimizer_file import load_optimizer_state

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "attach", "load_optimizer_state"]

# Where a public name lives. It is imported at first use: `import outsize` must not cost the memory of torch.
_HOMES = {
    "Engine": "outsize.serving",
    "attach": "outsize.api",
    "load_optimizer_state": "outsize.train.optimizer_file",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'outsize' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
