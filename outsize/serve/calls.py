"""The calls of a recorded forward, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Register:
    """A tensor that an earlier call gave, or an input by its name."""

    name: str


@dataclass(frozen=True)
class Call:
    """`results`: of one tensor, or of a tuple of them."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[str, ...]
    single: bool

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    @property
    def result(self) -> Register:
        """The first."""
        return Register(self.results[0])

    @property
    def uses(self) -> list[str]:
        """Names of the registers that are passed, each as often as it is."""
        return registers_in((self.args, self.kwargs))


def registers_in(value: Any) -> list[str]:
    if isinstance(value, Register):
        return [value.name]
    if isinstance(value, slice):
        return registers_in((value.start, value.stop, value.step))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [name for part in parts for name in registers_in(part)]


def renamed(value: Any, names: dict[str, str]) -> Any:
    """With other registers in place of those that have new names."""
    if isinstance(value, Register):
        return Register(names.get(value.name, value.name))
    if isinstance(value, slice):
        return slice(*(renamed(part, names) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: renamed(part, names) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(renamed(part, names) for part in value)
    return value
