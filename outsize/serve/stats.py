"""What `/stats` says and the page shows: who is served, where every byte is, and what the plan foretold."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from outsize.machine.describe import process_memory
from outsize.memory.entry import Entry, Residency
from outsize.model.units import find_units
from outsize.model.weights import WEIGHT
from outsize.plan import Plan
from outsize.serve.pages import Pages
from outsize.serve.request import Sequence, State
from outsize.serve.service import Service

LISTED = 64  # sequences named one by one, at most
PASSING = {Residency.COMING, Residency.NEAR, Residency.CHANGED, Residency.LEAVING}


class Stats:
    """Reads a service that runs, from any thread, without stopping it: figures of one moment, give or take a step."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self._service, self._engine, self._plan = service, service.engine, plan
        self._began = time.monotonic()
        self._read_before = self._bytes_read
        self._weights = self._weights_by_unit()

    def read(self) -> dict[str, Any]:
        """Everything, as docs/serving.md lists it: counts, bytes, seconds."""
        totals = self._engine.totals
        return {
            "seconds": time.monotonic() - self._began,
            "requests": self._requests(),
            "totals": {
                "steps": totals.steps,
                "prompt_tokens": totals.prompt_tokens,
                "new_tokens": totals.new_tokens,
                "finished": totals.finished,
                "preemptions": self._engine.scheduler.preemptions,
            },
            "memory": self._memory(),
            "kv": {**_kv(self._engine.pages), **self._far(), "page_bytes": self._engine.serving.page_bytes},
            "units": [{"name": name, **weights.whereabouts()} for name, weights in self._weights.items()],
            "predicted": self._predicted(),
            "measured": self._measured(),
            "reasons": list(self._plan.reasons),
        }

    def _requests(self) -> dict[str, Any]:
        sequences = list(self._engine.scheduler.sequences)
        running = sum(sequence.state is State.RUNNING for sequence in sequences)
        listed = [_sequence(sequence) for sequence in sequences[:LISTED]]
        return {"running": running, "waiting": self._engine.waiting, "sequences": listed}

    def _memory(self) -> dict[str, Any]:
        now, held = process_memory(), defaultdict[str, dict[str, int]](dict)
        for (tier, kind), nbytes in list(self._engine.store.ledger.held.items()):
            held[tier][kind] = nbytes
        budget = {"budget": self._plan.memory_bytes}
        return {**budget, "resident": now.resident_bytes, "peak": now.peak_bytes, "held": held}

    def _far(self) -> dict[str, int]:
        """Pages of another tier: places there are, and those whose content can be brought back."""
        far = self._engine.far
        return {"far_pages": far.count, "far": far.known} if far is not None else {"far_pages": 0, "far": 0}

    def _weights_by_unit(self) -> dict[str, _Weights]:
        """Those of each unit that this worker has; a tied weight counts in the first unit that uses it."""
        blocks = defaultdict[str, list[Entry]](list)
        for name, entry in self._engine.store.entries.items():
            kind, _, rest = name.partition(":")
            if kind == WEIGHT:
                blocks[rest.partition(":")[0]].append(entry)
        found, seen = dict[str, _Weights](), set[str]()
        leg = self._engine.runner.leg
        for unit in find_units(self._engine.model):
            if leg is not None and not leg.has(unit.name):
                continue
            own = [(name, parameter) for name, parameter in unit.parameters if name not in seen]
            seen |= {name for name, _ in own}
            entries = tuple(entry for name, _ in own for entry in blocks[name])
            elsewhere = sum(parameter.nbytes for name, parameter in own if not blocks[name])
            if own:
                found[unit.name or "model"] = _Weights(entries, elsewhere)
        return found

    def _predicted(self) -> dict[str, float]:
        """All plain figures of the plan's prediction."""
        foretold = vars(self._plan.predicted) if self._plan.predicted is not None else {}
        return {name: value for name, value in foretold.items() if isinstance(value, int | float)}

    def _measured(self) -> dict[str, float | None]:
        """Means over all steps so far, by the names of the prediction."""
        totals, seconds = self._engine.totals, self._service.busy_seconds
        per_step = 1 / totals.steps if totals.steps else None
        return {
            "bytes_read": per_step and (self._bytes_read - self._read_before) * per_step,
            "seconds_per_step": per_step and seconds * per_step,
            "tokens_per_second": totals.new_tokens / seconds if seconds else None,
        }

    @property
    def _bytes_read(self) -> int:
        """Of weights that stream."""
        moved = list(self._engine.store.ledger.moved.items())
        return sum(nbytes for (source, _, kind), nbytes in moved if source == "disk" and kind != "kv")


def _sequence(sequence: Sequence) -> dict[str, Any]:
    prompt = len(sequence.request.prompt)
    counts = {"prompt_tokens": prompt, "new_tokens": len(sequence.tokens) - prompt, "computed": sequence.computed}
    return {"state": sequence.state.value, **counts, "pages": len(sequence.pages)}


def _kv(pages: Pages) -> dict[str, int]:
    holders = list(pages.holders)
    held, shared = sum(count > 0 for count in holders), sum(count > 1 for count in holders)
    counts = {"held": held, "shared": shared, "kept": pages.kept}
    return {"pages": pages.count, "page_tokens": pages.page_tokens, **counts}


@dataclass(frozen=True)
class _Weights:
    """Blocks, and bytes that stay near outside the store's blocks, in a library's own form."""

    blocks: tuple[Entry, ...]
    elsewhere: int

    def whereabouts(self) -> dict[str, int]:
        """Bytes: all, those that stay near, and of the others those near at this moment."""
        found = {"bytes": self.elsewhere, "near": self.elsewhere, "passing": 0}
        for entry in self.blocks:
            nbytes = sum(entry.block.bytes_by_kind.values())
            found["bytes"] += nbytes
            found["near"] += nbytes * (entry.residency is Residency.STAYING)
            found["passing"] += nbytes * (entry.residency in PASSING)
        return found
