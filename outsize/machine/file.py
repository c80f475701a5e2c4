"""A machine's file: TOML, read strictly. Whatever is unknown, missing or not a sensible figure is refused by its name."""

from __future__ import annotations

import os
import tomllib
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from outsize.errors import OptionError
from outsize.machine.machine import Capacity, Close, Limit, Link, Machine, Nodes, Processor, Spread, Unlike
from outsize.machine.quantities import (
    BYTE_RATE,
    COUNT,
    DURATION,
    LATENCY,
    MEASURES,
    NODE_RATE,
    RATE_BY_BYTES,
    RATE_BY_ROWS,
    SIZE,
    TEXT,
    TEXTS,
    UPDATE_RATE,
    Quantity,
)

Value = TypeVar("Value", Machine, Link, Processor, Nodes, Close, Unlike, Spread)
LINK = {
    "source": TEXT,
    "target": TEXT,
    "bytes_per_second": BYTE_RATE,
    "latency": LATENCY,
    "shared": TEXT,
    "bytes_per_core_second": BYTE_RATE,
}
PROCESSOR = {
    "tier": TEXT,
    "name": TEXT,
    "count": COUNT,
    "cores": COUNT,
    "elementwise": RATE_BY_BYTES,
    "copy": BYTE_RATE,
    "update": UPDATE_RATE,
    "operation_seconds": DURATION,
}
NODES = {"count": COUNT, "bytes_per_second": NODE_RATE, "latency": LATENCY}  # and of devices that are close
UNLIKE = {"count": COUNT, "host": SIZE, "disk": SIZE, "disk_bytes_per_second": BYTE_RATE}
TOP = ("name", "origin", "notes", "capacities", "limits", "links", "processors", "nodes", "close", "unlike", "spreads")


def read_machine(path: Path) -> Machine:
    """Return the machine described in the TOML file at `path`.

    Raises:
        OptionError: the file cannot be read, or something in it is wrong; it names the file, the key, the value and
            what is allowed.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise OptionError(f"the machine file {path} cannot be read: {problem.strerror}.") from problem
    except ValueError as problem:  # not TOML, or not UTF-8
        raise OptionError(f"{path} is not a TOML file: {problem}.") from problem
    return _machine(_Table(path, "", values))


def write_machine(machine: Machine, path: Path) -> None:
    """Write `machine` to a file that `read_machine` reads back as an equal value; whole or not at all.

    Raises:
        OptionError: the file cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(tomli_w.dumps(as_table(machine)), encoding="utf-8")
        fresh.replace(path)
    except OSError as problem:
        with suppress(OSError):
            fresh.unlink()
        raise OptionError(
            f"the machine file {path} cannot be written: {problem.strerror}. Choose another."
        ) from problem


def as_table(machine: Machine) -> dict[str, Any]:
    """Return `machine` as plain values, as they stand in its file."""
    table = {
        "name": machine.name,
        "origin": machine.origin,
        "notes": list(machine.notes),
        "capacities": {capacity.tier: SIZE.write(capacity.nbytes) for capacity in machine.capacities},
        "limits": {limit.name: BYTE_RATE.write(limit.bytes_per_second) for limit in machine.limits},
        "nodes": _written(machine.nodes, NODES) if machine.nodes != Nodes() else {},
        "close": _written(machine.close, NODES) if machine.close != Close() else {},
        "unlike": [_written(unlike, UNLIKE) for unlike in machine.unlike],
        "links": [_written(link, LINK) for link in machine.links],
        "processors": [_written_processor(processor) for processor in machine.processors],
        "spreads": [_written(spread, _spread_keys(spread.unit)) for spread in machine.spreads],
    }
    return {key: value for key, value in table.items() if value}


class _Table:
    """A table of a file, and where it stands: `key` is its dotted name."""

    def __init__(self, path: Path, key: str, values: Any) -> None:
        self.path, self.key, self.values = path, key, values
        if not isinstance(values, dict):
            raise self.refuse(values, "a table")

    def refuse(self, value: Any, allowed: str, key: str = "") -> OptionError:
        return OptionError(f"{self.path}: {self._name(key) or 'the file'} = {value!r}; allowed: {allowed}.")

    def allow(self, keys: Any) -> None:
        for key in self.values:
            if key not in keys:
                raise OptionError(f"{self.path}: unknown key {self._name(key)!r}; allowed: {', '.join(keys)}.")

    def get(self, key: str, quantity: Quantity) -> Any:
        if key not in self.values:
            raise OptionError(f"{self.path}: {self._name(key)!r} is missing.")
        try:
            return quantity.read(self.values[key])
        except ValueError as problem:
            raise self.refuse(self.values[key], str(problem), key) from problem

    def fields(self, quantities: dict[str, Quantity]) -> dict[str, Any]:
        """Return the values of those keys that are there; `_made` knows which must be."""
        return {key: self.get(key, quantity) for key, quantity in quantities.items() if key in self.values}

    def table(self, key: str) -> _Table:
        return _Table(self.path, self._name(key), self.values.get(key, {}))

    def tables(self, key: str) -> list[_Table]:
        values = self.values.get(key, [])
        if not isinstance(values, list):
            raise self.refuse(values, f"tables, each headed [[{key}]]", key)
        return [_Table(self.path, f"{self._name(key)}[{index}]", value) for index, value in enumerate(values)]

    def _name(self, key: str) -> str:
        return f"{self.key}.{key}" if self.key and key else self.key or key


def _machine(table: _Table) -> Machine:
    table.allow(TOP)
    capacities, limits = table.table("capacities"), table.table("limits")
    return _made(
        table,
        Machine,
        {
            **table.fields({"name": TEXT, "origin": TEXT, "notes": TEXTS}),
            "capacities": tuple(Capacity(tier, capacities.get(tier, SIZE)) for tier in capacities.values),
            "limits": tuple(Limit(name, limits.get(name, BYTE_RATE)) for name in limits.values),
            "links": tuple(_read(link, Link, LINK) for link in table.tables("links")),
            "processors": tuple(_processor(processor) for processor in table.tables("processors")),
            "nodes": _read(table.table("nodes"), Nodes, NODES),
            "close": _read(table.table("close"), Close, NODES),
            "unlike": tuple(_read(unlike, Unlike, UNLIKE) for unlike in table.tables("unlike")),
            "spreads": tuple(_spread(spread) for spread in table.tables("spreads")),
        },
    )


def _processor(table: _Table) -> Processor:
    table.allow((*PROCESSOR, "matmul"))
    rates = table.table("matmul")
    matmul = tuple((dtype, rates.get(dtype, RATE_BY_ROWS)) for dtype in rates.values)
    return _made(table, Processor, {**table.fields(PROCESSOR), "matmul": matmul})


def _spread(table: _Table) -> Spread:
    unit = table.get("unit", TEXT)
    if unit not in MEASURES:
        raise table.refuse(unit, ", ".join(MEASURES), "unit")
    return _read(table, Spread, _spread_keys(unit))


def _spread_keys(unit: str) -> dict[str, Quantity]:
    measure = MEASURES[unit]
    return {"figure": TEXT, "unit": TEXT, "lowest": measure, "median": measure, "highest": measure, "times": COUNT}


def _read(table: _Table, make: type[Value], quantities: dict[str, Quantity]) -> Value:
    table.allow(quantities)
    return _made(table, make, table.fields(quantities))


def _made(table: _Table, make: type[Value], values: dict[str, Any]) -> Value:
    """Make a value of what was read. What it needs and was not there, or refuses itself, is told with its place."""
    missing = [field.name for field in fields(make) if field.default is MISSING and field.name not in values]
    if missing:
        raise OptionError(f"{table.path}: {table.key or 'the file'} lacks {', '.join(missing)}.")
    try:
        return make(**values)
    except OptionError as problem:
        raise OptionError(f"{table.path}: {problem}") from problem


def _written(value: Any, quantities: dict[str, Quantity]) -> dict[str, Any]:
    pairs = {key: (getattr(value, key), quantity) for key, quantity in quantities.items()}
    return {key: quantity.write(held) for key, (held, quantity) in pairs.items() if held is not None}


def _written_processor(processor: Processor) -> dict[str, Any]:
    matmul = {dtype: RATE_BY_ROWS.write(rate) for dtype, rate in processor.matmul}
    return {**_written(processor, PROCESSOR), "matmul": matmul}
