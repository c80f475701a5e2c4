"""Outsize itself: the function behind `outsize train`, in the environment that the command gives it."""

from __future__ import annotations

import resource
import shutil
import statistics
import threading
from functools import partial
from pathlib import Path
from typing import Any

from shapes import SEQUENCE_LENGTH, SHAPES, write_model, write_text

SKIPPED = 2  # steps: the first two record the trace, once without and once with state to read


def prepare(place: str, shape: str) -> dict[str, Any]:
    """Write the model and the text of a shape into the folder `place`, unless they are there."""
    folder = Path(place)
    if not (folder / "text.txt").exists():
        write_model(SHAPES[shape], folder / "model")
        write_text(SHAPES[shape], folder / "text.txt")
    return {}


def train(place: str, throttled: bool = False, **settings: Any) -> dict[str, Any]:
    """Train what `prepare` wrote, with these settings. Returns medians, and whether anything grew."""
    if throttled:
        from throttle import ThrottledDisk

        from outsize import training

        training.open_store = partial(training.open_store, wrap_disk=ThrottledDisk)
    watch = Watch()
    try:
        report, lines = _trained(place, settings)
    finally:
        watch.stop()
    return summarise(lines) | {"planned_peak_bytes": report["planned"]["host_peak_bytes"], **watch.found()}


def foretell(place: str, **settings: Any) -> dict[str, Any]:
    """Train what `prepare` wrote, with these settings. Returns what was planned and what was measured."""
    return _trained(place, settings)[0]


def _trained(place: str, settings: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report and the lines of a run, whose own folder is removed at the end."""
    from outsize.machine.allocator import limit_heaps

    limit_heaps()
    from outsize import training
    from outsize.train.report import each_line
    from outsize.train.settings import TrainSettings

    out = Path(place) / "run"
    shutil.rmtree(out, ignore_errors=True)
    chosen = {"sequence_length": SEQUENCE_LENGTH, "json": True, **settings}
    try:
        report = training.train(
            TrainSettings(model=str(Path(place) / "model"), data=Path(place) / "text.txt", out=out, **chosen)
        )
        return report, list(each_line(out / "metrics.jsonl"))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the steps after the first ones; the waits and the update are parts of a step's seconds."""
    steady = lines[SKIPPED:]
    columns = ("seconds", "bytes_read", "bytes_written", "read_wait_seconds", "write_wait_seconds", "update_seconds")
    return {
        **{name: statistics.median(line[name] for line in steady) for name in columns},
        "tokens": steady[0]["tokens"],
        "steps": len(steady),
        "last_loss": lines[-1]["loss"],
    }


class Watch:
    """Looks at the process once in a while: resident memory and open files must not grow as steps go by."""

    def __init__(self, every: float = 0.5) -> None:
        self._seen: list[tuple[int, int]] = []
        self._every, self._ended = every, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        from outsize.machine.describe import open_files, process_memory

        while not self._ended.wait(self._every):
            self._seen.append((process_memory().resident_bytes, open_files()))

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def found(self) -> dict[str, Any]:
        """Medians over the second and the last quarter of the time: by then the setup is over."""
        quarter = max(len(self._seen) // 4, 1)
        early, late = self._seen[quarter : 2 * quarter], self._seen[-quarter:]
        return {
            "resident_early_bytes": statistics.median_high([seen[0] for seen in early]),
            "resident_late_bytes": statistics.median_high([seen[0] for seen in late]),
            "open_files_early": statistics.median_high([seen[1] for seen in early]),
            "open_files_late": statistics.median_high([seen[1] for seen in late]),
            "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        }
