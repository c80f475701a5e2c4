"""Dataclasses out of JSON that people may have edited: every key is known, and every value of its field's type."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from outsize.errors import OptionError


def read_fields(cls: type, values: Any, place: str) -> dict[str, Any]:
    """What a JSON object says of a class's fields, each of the type that the field's default or annotation has. Raises
    OptionError naming what is unknown, missing or of another type in `place`."""
    hints = get_type_hints(cls)
    known = {field.name: hints[field.name] for field in fields(cls)}
    if not isinstance(values, dict):
        raise OptionError(f"{place} must be keys and values, not {values!r}.")
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise OptionError(f"{place} has no key {unknown[0]!r}; it has: {', '.join(known)}.")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - values.keys())
    if missing:
        raise OptionError(f"{place} lacks {missing[0]!r}.")
    return {name: _read_value(value, known[name], f"{place}: {name}") for name, value in values.items()}


def _read_value(value: Any, wanted: Any, place: str) -> Any:
    origin, inside = get_origin(wanted) or wanted, get_args(wanted)
    if origin in (Union, UnionType):
        return None if value is None else _read_value(value, next(i for i in inside if i is not NoneType), place)
    if is_dataclass(wanted):
        return origin(**read_fields(origin, value, place))
    if origin in (frozenset, tuple) and isinstance(value, list):
        if origin is frozenset or inside[-1] is Ellipsis:
            return origin(_read_value(item, inside[0], place) for item in value)
        if len(value) == len(inside):
            return tuple(_read_value(item, kind, place) for item, kind in zip(value, inside, strict=True))
    fits = (int, float) if origin is float else origin
    exact = isinstance(value, fits) and (origin is bool or not isinstance(value, bool))
    if not exact or (isinstance(value, (int, float)) and not 0 <= value < float("inf")):
        raise OptionError(
            f"{place} cannot be {value!r}; it must be {getattr(wanted, '__name__', wanted)}, not negative."
        )
    return value
