"""Figures as people write them in a machine's file: "24GiB", "1.3GB/s", "312TFLOP/s", "10us". Decimal prefixes of rates
are powers of 1000; sizes are written as everywhere in Outsize."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from outsize.errors import OptionError
from outsize.machine.machine import Rate, steady
from outsize.sizes import UNITS, parse_size

LARGE = {"": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15}
SMALL = {"n": -9, "u": -6, "m": -3, "": 0}
SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Quantity:
    """A kind of figure. `read` takes what stands in a file and raises ValueError with what would be allowed there;
    `write` is its exact inverse."""

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]


def _measure(unit: str, prefixes: dict[str, int], example: str, zero: bool = False) -> Quantity:
    """A float in `unit`, upper and lower case alike; `zero` allows 0."""
    # Bounded lengths, because Decimal works as long as the digits are many.
    pattern = re.compile(rf"([0-9]{{1,40}}(?:\.[0-9]{{1,60}})?)\s*([a-z]?)\s*{re.escape(unit.lower())}")
    powers = {prefix.lower(): power for prefix, power in prefixes.items()}
    allowed = f'a number {"from 0 on" if zero else "above 0"} and its unit, such as "{example}"'

    def read(written: Any) -> float:
        match = pattern.fullmatch(written.strip().lower()) if isinstance(written, str) else None
        if match is None or match[2] not in powers:
            raise ValueError(allowed)
        value = float(Decimal(match[1]).scaleb(powers[match[2]]))
        if value == 0 and not zero:
            raise ValueError(allowed)
        return value

    def write(value: float) -> str:
        number = Decimal(repr(float(value)))
        reached = [prefix for prefix, power in prefixes.items() if Decimal(1).scaleb(power) <= number]
        prefix = reached[-1] if reached else next(iter(prefixes))
        return f"{number.scaleb(-prefixes[prefix]).normalize():f}{prefix}{unit}"

    return Quantity(read, write)


def _by_size(measure: Quantity, read_size: Callable[[str], int], write_size: Callable[[int], str]) -> Quantity:
    """A rate that is one figure, or a table of them by the size of a piece of work."""

    def read(written: Any) -> Rate:
        if not isinstance(written, dict):
            return steady(measure.read(written))
        if not written:
            raise ValueError("at least one size")
        return Rate(tuple(sorted((float(read_size(size)), measure.read(rate)) for size, rate in written.items())))

    def write(rate: Rate) -> Any:
        if len(rate.points) == 1:
            return measure.write(rate.best)
        return {write_size(int(size)): measure.write(value) for size, value in rate.points}

    return Quantity(read, write)


def _read_size(written: Any) -> int:
    try:
        size = parse_size(written) if isinstance(written, str) else 0
    except OptionError:
        size = 0
    if size == 0:
        raise ValueError('a size above 0, such as "24GiB"')
    return size


def _write_size(size: int) -> str:
    """The shortest way to write `size` without losing a byte."""
    whole = [unit for unit in SIZE_UNITS if size % UNITS[unit.lower()] == 0]
    return min((f"{size // UNITS[unit.lower()]}{unit}" for unit in whole), key=len)


def _read_count(written: Any) -> int:
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ValueError("a whole number from 1 on")
    return written


def _read_rows(written: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,11}", written):
        raise ValueError("rates by rows, such as { 1 = ..., 512 = ... }")
    return int(written)


def _read_text(written: Any) -> str:
    if not isinstance(written, str) or not written:
        raise ValueError("text")
    return written


def _read_texts(written: Any) -> tuple[str, ...]:
    if not isinstance(written, list):
        raise ValueError('a list of texts, such as ["..."]')
    return tuple(_read_text(text) for text in written)


MEASURES = {
    "B/s": _measure("B/s", LARGE, "1.3GB/s"),
    "FLOP/s": _measure("FLOP/s", LARGE, "312TFLOP/s"),
    "param/s": _measure("param/s", LARGE, "2.5Gparam/s"),
    "s": _measure("s", SMALL, "10us"),
}
SIZE = Quantity(_read_size, _write_size)
COUNT = Quantity(_read_count, int)
TEXT = Quantity(_read_text, str)
TEXTS = Quantity(_read_texts, list)
NODE_RATE = _measure("B/s", LARGE, "100GB/s", zero=True)
BYTE_RATE, FLOP_RATE, UPDATE_RATE = MEASURES["B/s"], MEASURES["FLOP/s"], MEASURES["param/s"]
DURATION = MEASURES["s"]
LATENCY = _measure("s", SMALL, "10us", zero=True)
RATE_BY_BYTES = _by_size(BYTE_RATE, _read_size, _write_size)
RATE_BY_ROWS = _by_size(FLOP_RATE, _read_rows, str)
