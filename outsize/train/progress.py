"""What a run says on the terminal, before it starts and while it runs."""

from __future__ import annotations

import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from outsize.sizes import format_size
from outsize.train.report import StepLine, evaluation_json, format_duration

if TYPE_CHECKING:
    from rich.console import RenderableType


class Progress:
    """What a run says while it runs.

    To people, on stderr: a live display on a terminal, else a line every `every` seconds.
    To scripts (`json`): a JSON line on stdout for each step, evaluation and message, and nothing else."""

    def __init__(self, memory_bytes: int | None = None, json: bool = False, every: float = 10.0) -> None:
        self.memory_bytes, self.json, self.every = memory_bytes, json, every
        self._live: Any = None
        self._total = self._done = self._done_before = 0
        self._started = self._printed = 0.0

    def start(self, total_steps: int, done: int = 0) -> None:
        """Begin to show `total_steps` steps, of which an earlier run did `done`."""
        self._total, self._done, self._done_before = total_steps, done, done
        self._started, self._printed = time.monotonic(), -math.inf
        if not self.json and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No thread of its own: it is drawn anew when a step ends, and costs nothing in between.
            self._live = Live(console=Console(stderr=True), auto_refresh=False, redirect_stdout=False)
            self._live.start()

    def step(self, line: StepLine) -> None:
        self._done += 1
        now = time.monotonic()
        if self.json:
            self._write(line.to_json(), sys.stdout)
        elif self._live is not None:
            self._live.update(self._display(line), refresh=True)
        elif now - self._printed >= self.every or self._done >= self._total:
            self._printed = now
            self._write(
                "  ".join([self._count(), *self._learning(line), *self._bytes(line), self._left()]),
                sys.stderr,
            )

    def evaluation(self, step: int, eval_loss: float) -> None:
        if self.json:
            self._write(evaluation_json(step, eval_loss), sys.stdout)
        else:
            self.message(f"{self._count()}: evaluation loss {eval_loss:.4f}")

    def message(self, text: str) -> None:
        """Say something between two steps; in JSON, a line {"message": text}."""
        if self.json:
            self._write(json.dumps({"message": text}), sys.stdout)
        elif self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._write(text, sys.stderr)

    def stop(self) -> None:
        """Leave the terminal as it was, the last display on it. May be called twice, or without a start."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _write(self, text: str, stream: TextIO) -> None:
        print(text, file=stream, flush=True)

    def _display(self, line: StepLine) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        first = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self._total, completed=self._done, width=20)
        first.add_row(self._count(), bar, *self._learning(line), self._left())
        return Group(first, Text("  ".join(self._bytes(line))))

    def _count(self) -> str:
        return f"step {self._done}/{self._total}"

    def _learning(self, line: StepLine) -> list[str]:
        return [f"loss {line.loss:.4f}", f"lr {line.lr:.3g}"]

    def _bytes(self, line: StepLine) -> list[str]:
        budget = "" if self.memory_bytes is None else f" of {format_size(self.memory_bytes)}"
        device = [f"device {format_size(line.device_peak_bytes)}"] if line.device_peak_bytes else []
        moved = f"read {format_size(line.bytes_read)}, wrote {format_size(line.bytes_written)}"
        return [
            f"{line.tokens_per_second:,.0f} tokens/s",
            f"memory {format_size(line.host_peak_bytes)}{budget}",
            *device,
            moved,
        ]

    def _left(self) -> str:
        """The time left if the rest goes as what was done: evaluations and samples, too, will come again."""
        elapsed, remaining = time.monotonic() - self._started, self._total - self._done
        if remaining <= 0:
            return f"done in {format_duration(elapsed)}"
        return f"{format_duration(elapsed / (self._done - self._done_before) * remaining)} left"


class Silent(Progress):
    """What a worker says that is not the first one."""

    def start(self, total_steps: int, done: int = 0) -> None:
        pass

    def step(self, line: StepLine) -> None:
        pass

    def evaluation(self, step: int, eval_loss: float) -> None:
        pass

    def message(self, text: str) -> None:
        pass
