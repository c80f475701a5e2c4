"""What a run writes for people and scripts: a line a step, and the plan beside the measurement."""

from __future__ import annotations

import json
import math
import os
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outsize.distributed.arrangement import WIRE as LINKED
from outsize.errors import RunError, StorageError
from outsize.plan import CAUSES
from outsize.sizes import format_size

Number = float | int | None
"""None: not predicted, or not measured."""

WARM_UP = 2
"""Steps left out of medians and means: the first ones touch buffers and load libraries for the first time."""

WAITS = ("read_wait_seconds", "write_wait_seconds", "update_seconds", "wire_wait_seconds")
STEP_COLUMNS = (
    *("step", "loss", "seconds", "tokens", "tokens_per_second", "bytes_read", "bytes_written"),
    *("host_peak_bytes", "device_peak_bytes", "wire_bytes", *WAITS),
)
WIRE = ("wire_bytes", "wire_wait_seconds")
"""What a line has only of several workers."""
COMPARED = {
    "host_peak_bytes": "peak memory of the process",
    "device_peak_bytes": "peak memory of the device",
    "bytes_read": "read from disk, a step",
    "bytes_written": "written to disk, a step",
    "wire_bytes": "received from other workers, a step",
    "disk_bytes": "space on disk",
    "seconds_per_step": "seconds a step (median)",
    "tokens_per_second": "tokens a second (median)",
}
FROM = {"disk": "read"} | {tier: f"from {tier}" for tier in LINKED}
TO = {"disk": "written"} | {tier: f"to {tier}" for tier in LINKED}
BESIDE = {("host", "device"): "to the device", ("device", "host"): "from the device"}
FIGURES = {"planned", "measured", "ratio", "share", "size"}


@dataclass(frozen=True)
class StepLine:
    """One training step, counted from 1: all that was moved, and all the time that passed, since the line before, but for
    evaluation and samples. So what a commit writes of state that stays in memory is in the line of the step that computes
    meanwhile, the next one; what the last commit of a run writes is in none. Peaks are of the process so far.

    The waits and the update are disjoint parts of `seconds`, so that what remains is compute."""

    step: int
    loss: float
    lr: float
    gradient_norm: float | None
    seconds: float
    tokens: int
    bytes_read: int
    bytes_written: int
    host_peak_bytes: int
    device_peak_bytes: int
    read_wait_seconds: float
    write_wait_seconds: float
    update_seconds: float
    wire_bytes: int = 0
    """That came from other workers."""
    wire_wait_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> str:
        """One line without its end; `gradient_norm` is left out when it was not computed."""
        record = asdict(self) | {"tokens_per_second": self.tokens_per_second}
        if self.gradient_norm is None:
            del record["gradient_norm"]
        if not self.wire_bytes:
            record = {name: value for name, value in record.items() if name not in WIRE}
        return _one_line(record)


def evaluation_json(step: int, eval_loss: float) -> str:
    """Return an evaluation's line without its end."""
    return _one_line({"step": step, "eval_loss": eval_loss})


class Metrics:
    """The file metrics.jsonl of a running job: every line in it is whole, whatever ends the process."""

    def __init__(self, path: Path, done: int = 0) -> None:
        """Open `path`, keeping the lines of the first `done` steps.

        Raises StorageError when it cannot be written, RunError when a line before the last is damaged."""
        self.path = path
        kept = each_line(path) if done and path.exists() else ()
        _replace(path, (_one_line(record) + "\n" for record in kept if record["step"] <= done))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def append(self, line: StepLine) -> None:
        """Write the line of one step, or none of it. Raises StorageError, for one when the disk is full."""
        self._append(line.to_json())

    def append_evaluation(self, step: int, eval_loss: float) -> None:
        """Write the mean loss over the evaluation data after `step`. Raises StorageError."""
        self._append(evaluation_json(step, eval_loss))

    def _append(self, line: str) -> None:
        data = line.encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(data) != len(data):
                raise OSError("the disk is full")
        except OSError as problem:
            self._file.truncate(end)
            raise _unwritable(self.path, problem) from problem

    def has_evaluation(self, step: int) -> bool:
        """The evaluation after `step` is in the file."""
        return any(line["step"] == step and "eval_loss" in line for line in each_line(self.path))

    def sync(self) -> None:
        """Make every line so far durable. Raises StorageError."""
        try:
            os.fsync(self._file.fileno())
        except OSError as problem:
            raise _unwritable(self.path, problem) from problem

    def close(self) -> None:
        self._file.close()


def each_line(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl one at a time, but for a last line that a kill tore.

    Raises RunError when a line before the last is damaged."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError('it has no "step"')
            except ValueError as problem:
                if file.read(1):
                    raise RunError(
                        f"{path}, line {number} is damaged: {problem}. Mend or remove that line."
                    ) from problem
                return
            yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all lines of a metrics.jsonl, as `each_line` yields them."""
    return list(each_line(path))


def measured(lines: Iterable[Mapping[str, Any]]) -> dict[str, Number]:
    """Return the `measured` of report.json from the lines of a run, in one pass; None: nothing was measured.

    Peaks and totals are over all steps. `bytes_read`, `seconds_per_step` and `tokens_per_second` are medians after the
    warm-up. `bytes_written` is the mean after it, since only some steps write a commit; so are seconds by cause, since
    means add up: to `mean_seconds_per_step`."""
    columns = gather(lines)
    steps = len(columns["loss"])
    steady = {name: column[WARM_UP if steps > WARM_UP else 0 :] for name, column in columns.items()}
    mean = {name: statistics.fmean(steady[name]) if steps else math.nan for name in ("seconds", *WAITS)}
    found = {
        "host_peak_bytes": _whole(max(columns["host_peak_bytes"], default=math.nan)),
        "device_peak_bytes": _whole(max(columns["device_peak_bytes"], default=math.nan)),
        "bytes_read": _whole(_median(steady["bytes_read"])),
        "bytes_written": _whole(statistics.fmean(steady["bytes_written"]) if steps else math.nan),
        "wire_bytes": _whole(_median(steady["wire_bytes"])),
        "seconds_per_step": _median(steady["seconds"]),
        "tokens_per_second": _median(steady["tokens_per_second"]),
        "compute_seconds": mean["seconds"] - sum(mean[name] for name in WAITS),
        **{name: mean[name] for name in WAITS},
        "mean_seconds_per_step": mean["seconds"],
        "steps": steps,
        "total_tokens": int(sum(columns["tokens"])),
        "total_seconds": sum(columns["seconds"]),
        "total_bytes_read": int(sum(columns["bytes_read"])),
        "total_bytes_written": int(sum(columns["bytes_written"])),
        "first_loss": next(iter(columns["loss"]), math.nan),
        "last_loss": next(reversed(columns["loss"]), math.nan),
        "eval_loss": next(reversed(columns["eval_loss"]), math.nan),
    }
    return _finite(found)


def gather(lines: Iterable[Mapping[str, Any]]) -> dict[str, array[float]]:
    """Return the numbers of a run's lines as columns, 8 bytes a number; NaN: it was not finite.

    `step` and most columns are those of training lines, `eval_step` and `eval_loss` of evaluation lines."""
    columns = {name: array("d") for name in (*STEP_COLUMNS, "eval_step", "eval_loss")}
    for line in lines:
        if "eval_loss" in line:
            record = {"eval_step": line["step"], "eval_loss": line["eval_loss"]}
        else:
            record = {name: line.get(name, 0) if name in WIRE else line[name] for name in STEP_COLUMNS}
        for name, value in record.items():
            columns[name].append(math.nan if value is None else value)
    return columns


def held_by_tier(held: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Return a ledger's `held` as report.json has it: bytes by tier, then by kind."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for (tier, kind), nbytes in sorted(held.items()):
        if nbytes:
            found[tier][kind] = nbytes
    return dict(found)


def moved_a_step(moved: Mapping[tuple[str, str, str], int], steps: int) -> dict[str, dict[str, int]]:
    """Return what a ledger's `moved` grew by in `steps` steps as report.json has it: bytes a step that were
    `read` from disk and `written` to it, by kind, that came `from` workers and went `to` them, and that went between a
    device and its host's memory."""
    found: dict[str, Counter[str]] = {"read": Counter(), "written": Counter()}
    for (source, destination, kind), nbytes in sorted(moved.items()):
        direction = BESIDE.get((source, destination)) or FROM.get(source) or TO.get(destination)
        if direction is not None and nbytes:
            found.setdefault(direction, Counter())[kind] += nbytes
    return {
        direction: {kind: nbytes // max(steps, 1) for kind, nbytes in counts.items()}
        for direction, counts in found.items()
    }


def write_report(
    directory: Path,
    planned: Mapping[str, Number],
    measured: Mapping[str, Number],
    facts: Mapping[str, str],
    *,
    memory_bytes: int | None = None,
    held: Mapping[str, Mapping[str, int]] | None = None,
    moved: Mapping[str, Mapping[str, int]] | None = None,
) -> None:
    """Write report.json and report.md. `planned` and `measured` get the same keys; what either lacks is null.

    `memory_bytes` is the budget; `held` and `moved` come from `held_by_tier` and `moved_a_step`.
    Raises StorageError."""
    keys = list(dict.fromkeys([*COMPARED, *measured, *planned]))
    report = _finite(
        {
            "planned": {key: planned.get(key) for key in keys},
            "measured": {key: measured.get(key) for key in keys},
            "memory_bytes": memory_bytes,
            "held": held or {},
            "moved": moved or {},
            "facts": dict(facts),
        }
    )
    _replace(directory / "report.json", [json.dumps(report, indent=2), "\n"])
    _replace(directory / "report.md", (line + "\n" for line in _page(directory.resolve().name, report)))


def _page(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    planned, found = report["planned"], report["measured"]
    yield f"# Run {name}: planned and measured\n"
    yield _outcome(found) + "\n"
    yield from _table(("what", "planned", "measured", "ratio"), _compared(planned, found))
    if report["memory_bytes"] is not None:
        yield f"\nThe budget (`--memory`) was {format_size(report['memory_bytes'])}."
    yield "\n## Time by cause, seconds a step (mean)\n"
    yield from _table(("cause", "planned", "measured", "share"), _by_cause(planned, found))
    for title, first, what in (("Held at the end", "tier", "held"), ("Moved a step", "direction", "moved")):
        if report[what]:
            yield f"\n## {title}\n"
            yield from _table((first, "kind", "size"), _by_kind(report[what]))
    yield "\n## Facts\n"
    yield from _table(("what", "value"), report["facts"].items())


def _outcome(found: Mapping[str, Any]) -> str:
    if not found.get("steps"):
        return "No step was run."
    duration = format_duration(found["total_seconds"])
    text = f"{found['steps']} steps over {found['total_tokens']:,} tokens in {duration}."
    for key, label in (
        ("first_loss", "Loss of the first step"),
        ("last_loss", "of the last"),
        ("eval_loss", "evaluation"),
    ):
        if found.get(key) is not None:
            text += f" {label}: {found[key]:.4f};"
    return text.rstrip(";") + "."


def _compared(planned: Mapping[str, Number], found: Mapping[str, Number]) -> Iterator[tuple[str, ...]]:
    for key, label in COMPARED.items():
        plan, real = planned[key], found[key]
        if key in WIRE and not plan and not real:
            continue  # of one worker
        ratio = f"{real / plan:.3f}" if plan and real is not None else "-"
        yield label, _human(key, plan), _human(key, real), ratio


def _by_cause(planned: Mapping[str, Number], found: Mapping[str, Number]) -> Iterator[tuple[str, ...]]:
    whole = found.get("mean_seconds_per_step")
    for key, label in (CAUSES | {"mean_seconds_per_step": "**step**"}).items():
        plan, real = planned.get(key), found.get(key)
        if key in WIRE and not plan and not real:
            continue
        share = f"{real / whole:.1%}" if whole and real is not None else "-"
        yield label, _human(key, plan), _human(key, real), share


def _by_kind(sizes: Mapping[str, Mapping[str, int]]) -> Iterator[tuple[str, ...]]:
    for group, by_kind in sizes.items():
        for kind, nbytes in by_kind.items():
            yield group, kind, format_size(nbytes)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "".join("---:|" if head in FIGURES else "---|" for head in heads)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _human(key: str, value: Number) -> str:
    if value is None:
        return "-"
    return format_size(int(value)) if "bytes" in key else f"{value:,.3f}"


def format_duration(seconds: float) -> str:
    """Return seconds as people say them: "8.3 s", "4 min 10 s", "2 h 05 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _median(values: array[float]) -> float:
    return statistics.median(values) if values else math.nan


def _whole(value: float) -> float:
    return math.nan if math.isnan(value) else int(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity: strict readers refuse what Python would write for it."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_finite(record))


def _unwritable(path: Path, problem: OSError) -> StorageError:
    why = problem.strerror or problem
    return StorageError(f"{path} cannot be written: {why}. Make room, or choose another --out.")


def _replace(path: Path, pieces: Iterable[str]) -> None:
    """Put a whole file in place of `path`; under that name is the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        raise _unwritable(path, problem) from problem
    finally:
        partial.unlink(missing_ok=True)
