"""From the name of a block to the parameter that it holds a part of; the names are made in model/weights.py and
train/update.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"(?P<what>weight|state):(?P<parameter>.+?)(:(?P<row>\d+))?(@(?P<offset>\d+))?")


@dataclass(frozen=True)
class Place:
    """Where a block's elements are in its parameter: from a row on, and `offset` elements further; no offset: all of the
    rows' elements, seen as a whole."""

    parameter: str
    row: int
    offset: int | None


def weight_place(block: str) -> Place | None:
    """None when the block does not hold a weight."""
    return _place("weight", block)


def chunk_place(block: str) -> Place | None:
    """None when the block does not hold an optimizer's state."""
    return _place("state", block)


def _place(what: str, block: str) -> Place | None:
    found = _BLOCK.fullmatch(block)
    if found is None or found["what"] != what:
        return None
    return Place(found["parameter"], int(found["row"] or 0), None if found["offset"] is None else int(found["offset"]))
