"""What was measured for prices is known the next time, as long as the machine is as fast as it was."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from models import tiny_model

from outsize.asked import Request
from outsize.machine.find import DESCRIBED, find_machine
from outsize.plan import Plan
from outsize.planner import samples, training
from outsize.planner.known_prices import TIMES, KnownPrices, Then, prices_file
from outsize.planner.meeting import Timed, seconds_of_meeting
from outsize.planner.prices import LEAST, MeasuredPrices, RatedPrices, Thrashed, yardsticks
from outsize.planner.rehearsal import rehearse
from outsize.planner.samples import COLD, Cooling, Pulse, usual_seconds
from outsize.planner.task import sample_batches
from outsize.planner.thrashed import STEP, thrashed
from outsize.train.optimizers import uniform_rule

LAPTOP = find_machine("laptop")
SPOILT = b'[{"yardsticks": [1.0], "seconds": {"mm": "soon"}}]'


def found(prices: KnownPrices, what: str, seconds: float | None) -> tuple[float | None, bool]:
    """What is said to take so long now, and whether it was measured for that."""
    measured = []

    def measure() -> float | None:
        measured.append(what)
        return seconds

    return prices.find(what, measure), bool(measured)


def test_what_was_measured_is_known_while_the_machine_is_as_fast(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "prices.json"
    prices = KnownPrices.read(path, [1.0, 2.0])
    assert found(prices, "mm", 0.5) == (0.5, True)
    assert found(prices, "unheard of", None) == found(prices, "unheard of", None) == (None, True)
    assert found(prices, "mm", 0.7) == (0.5, False)
    prices.keep()
    as_fast, slower = KnownPrices.read(path, [1.05, 1.9]), KnownPrices.read(path, [1.0, 2.3])
    assert found(as_fast, "mm", 0.7) == (0.5, False) and found(as_fast, "unheard of", None) == (None, True)
    assert found(as_fast, "add", 0.1) == (0.1, True)
    as_fast.keep()
    again = KnownPrices.read(path, [1.0, 2.0]).then
    assert again == Then([1.0, 2.0], {"mm": 0.5, "add": 0.1})
    assert found(slower, "mm", 0.7) == (0.7, True)


def test_one_planning_while_others_compute_loses_nothing(tmp_path: Path) -> None:
    """What is kept is bounded: of a machine that is never as fast as before, only the last times stay."""
    path = tmp_path / "prices.json"
    for busy in range(TIMES):
        prices = KnownPrices.read(path, [1.0 + busy])
        assert found(prices, "mm", 0.5 + busy) == (0.5 + busy, True)
        prices.keep()
    for busy in range(TIMES):
        assert found(KnownPrices.read(path, [1.05 + busy]), "mm", 9.0) == (0.5 + busy, False)
    another = KnownPrices.read(path, [0.1])
    assert found(another, "mm", 0.2) == (0.2, True)
    another.keep()
    assert [KnownPrices.read(path, [first]).then.seconds.get("mm") for first in (0.1, TIMES, 1.0)] == [0.2, 3.5, None]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'[{"yardsticks": ["fast"], "seconds": {}}]', bytes(range(256)), SPOILT]
)
def test_a_file_of_something_else_is_measured_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_bytes(content)
    assert KnownPrices.read(tmp_path / "prices.json", [1.0]).then.seconds == {}


def test_where_nothing_can_be_kept_all_is_measured(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    prices = KnownPrices.read(tmp_path / "cache" / "prices.json", [1.0])
    assert found(prices, "mm", 0.5) == (0.5, True)
    prices.keep()
    assert (tmp_path / "cache").read_text() == "no folder"


def test_another_probe_or_other_threads_are_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = set()
    for machine in ("two-cores", "laptop"):
        monkeypatch.setenv("OUTSIZE_MACHINE", str(DESCRIBED / f"{machine}.toml"))
        assert prices_file(LAPTOP) == prices_file(LAPTOP) and prices_file(LAPTOP).parent == tmp_path / "outsize"
        names.add(prices_file(LAPTOP))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        names.add(prices_file(LAPTOP))
    finally:
        torch.set_num_threads(threads)
    assert len(names) == 3


def test_a_second_planning_measures_nothing(tmp_path: Path) -> None:
    """Were anything measured again, it would take another nanosecond."""
    model = tiny_model("llama", tied=True, layers=4)
    rule = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})
    batches = sample_batches(model, Request(0, sequence_length=32))
    work = []
    for _ in range(2):
        prices = MeasuredPrices(RatedPrices(LAPTOP), 1e-6, known=KnownPrices.read(tmp_path / "prices.json", [1.0]))
        work.append(rehearse(model, Plan("mixed", 1 << 20), rule, prices, batches).work)
        prices.keep()
    assert work[0] == work[1]
    found = yardsticks(1e-6, Cooling(), Pulse())
    assert len(found) == 3 and all(each > 0 for each in found)


class Beats(Pulse):
    """As long as they are told, one each time that somebody looks; then steady."""

    def __init__(self, seconds: Iterable[float], patience: float) -> None:
        super().__init__(patience)
        self.next = chain(seconds, repeat(1.0))

    def _beat(self) -> float:
        return next(self.next)


def test_who_shares_a_core_is_waited_for() -> None:
    pulse = Beats([1.0, 1.3, 2.0, 1.3, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 3.0], patience=60.0)
    assert pulse.steady() and pulse.steady() and not pulse.steady(), "the faster of two beats, against the fastest"
    pulse.wait()
    assert next(pulse.next) == 3.0, "it waits for what is slow to end, and no longer"
    impatient = Beats(chain([1.0, 1.0], repeat(2.0)), patience=0.01)
    assert impatient.steady() and not impatient.steady()
    impatient.wait()
    assert impatient.patience <= 0 and impatient.steady(), "what there is counts, once it was waited enough"


def sampled(monkeypatch: pytest.MonkeyPatch, takes: list[float], pulse: Pulse) -> float:
    """`usual_seconds` of what takes so long, one time after the other."""
    now, left = [0.0], iter([0.0, *takes])
    monkeypatch.setattr(samples, "perf_counter", lambda: now[0])
    monkeypatch.setattr(samples, "_faults", lambda: 0)

    def work() -> None:
        now[0] += next(left)

    seconds = usual_seconds(work, lambda: None, pulse)
    assert not list(left), "fewer samples than there should be"
    return seconds


def test_samples_that_somebody_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two beats before each sample, and two after."""
    steady, ends_slow = [1.0] * 4, [1.0, 1.0, 2.0, 2.0]
    assert sampled(monkeypatch, [3.0, 3.5, 4.0], Beats([], 60.0)) == 3.5
    beats = chain(*[ends_slow] * 4, *[steady] * 3)
    assert sampled(monkeypatch, [9.0, 9.0, 9.0, 9.0, 3.0, 3.5, 4.0], Beats(beats, 60.0)) == 3.5
    once = chain(steady, *[ends_slow] * 7)
    assert sampled(monkeypatch, [3.0, *[9.0] * 7], Beats(once, 60.0)) == 3.0, "one is better than none"
    assert sampled(monkeypatch, [9.0, 8.0, 7.0, *[9.0] * 5], Beats(chain(*[ends_slow] * 8), 60.0)) == 8.0


def test_a_slow_moment_is_waited_for_before_all_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "prices.json"
    known = KnownPrices(file, Then([1.0, 1.0, 1.0], {"meeting": 0.5}))
    known._kept = 0
    known.keep()
    monkeypatch.setattr(training, "prices_file", lambda machine: file)
    monkeypatch.setattr(training, "seconds_of_meeting", lambda cooling: 0.25)
    looks = iter([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [2.0, 1.0, 1.0], [1.05, 1.0, 1.0]])
    monkeypatch.setattr(training, "yardsticks", lambda *told: next(looks))
    assert training._measured(RatedPrices(LAPTOP), 0).meeting == 0.5 and not list(looks)
    monkeypatch.setattr(training, "yardsticks", lambda *told: [2.0, 1.0, 1.0])
    monkeypatch.setattr(training, "LOOKING", 0.05)
    found = training._measured(RatedPrices(LAPTOP), 0)
    assert found.meeting == 0.25 and found.pulse.patience == samples.PATIENCE


def test_what_streams_is_measured_apart() -> None:
    """Of an operation that gives the memory it writes to: with what it writes to in a cache, and out of it."""
    prices = MeasuredPrices(RatedPrices(LAPTOP), 1e-6)
    target, source = torch.zeros(LEAST), torch.ones(LEAST)
    copy = partial(prices.of, torch.ops.aten.copy_.default, (target, source), {}, target)
    assert copy() == copy() and copy(lambda tensor: tensor is target) == copy(lambda tensor: tensor is target)
    assert len(prices.known.then.seconds) == 2 and all(each > 0 for each in prices.known.then.seconds.values())
    add = partial(prices.of, torch.ops.aten.add.Tensor, (target[1:], 1.0), {}, target)
    assert add(lambda tensor: True) == add()
    assert len(prices.known.then.seconds) == 3
    more = torch.ones(LEAST)
    double = partial(prices.of, torch.ops.aten.add.Tensor, (source, source), {}, more)
    assert double() == double() and double(lambda tensor: tensor is more) == double(lambda tensor: tensor is more)
    assert len(prices.known.then.seconds) == 5, "into memory that was just used, and into other"


def test_operations_of_several_threads_wait_for_each_other() -> None:
    alone, meeting = (MeasuredPrices(RatedPrices(LAPTOP), 1e-6, late, KnownPrices()) for late in (0.0, 9.0))
    for count, function, more in (
        (LEAST, torch.ops.aten.neg.default, 9.0),
        (LEAST - 1, torch.ops.aten.neg.default, 0.0),
    ):
        tensor = torch.ones(count)
        seconds = [prices.of(function, (tensor,), {}, tensor.clone()).seconds for prices in (alone, meeting)]
        assert seconds[1] - seconds[0] == pytest.approx(more, abs=1.0)
    assert meeting.of(torch.ops.aten.view.default, (torch.ones(LEAST), [-1]), {}, torch.ones(LEAST)).seconds < 1.0
    timed = Timed()
    timed.seconds = {"add": [1.0, 1.0, 1.0, 5.0], "mul": [2.0, 2.0]}
    assert timed.late() == pytest.approx(4.0 / 6)


def test_cold_operands_cost_more_while_blocks_stream() -> None:
    prices = MeasuredPrices(RatedPrices(LAPTOP), 1e-6, thrashed=Thrashed(longer=0.5, later=1e-6))
    tensor = torch.ones(LEAST)
    negated = partial(prices.of, torch.ops.aten.neg.default, (tensor,), {}, torch.ones(LEAST))
    assert negated().beside == 0.0
    cold = negated(lambda each: True)
    assert cold.beside == pytest.approx(0.5 * (cold.seconds - 1e-6))
    left, right = torch.ones(4, 8), torch.ones(8, 2)
    product = prices.of(torch.ops.aten.mm.default, (left, right), {}, torch.ones(4, 2))
    assert product.beside == pytest.approx(1e-6 * 4 * (4 * 8 + 8 * 2 + 4 * 2))


def test_what_streaming_costs_is_measured_once_and_within_the_room_there_is() -> None:
    known = KnownPrices()
    least = 2 * COLD + 2 * STEP
    assert thrashed(least - 1, known, Pulse()) == Thrashed() and not known.then.seconds
    first = thrashed(least, known, Pulse())
    assert len(known.then.seconds) == 2 and first.longer >= 0.0 and first.later >= 0.0
    known.then.seconds = dict.fromkeys(known.then.seconds, 0.25)
    assert thrashed(least, known, Pulse()) == Thrashed(0.25, 0.25)


def test_one_thread_waits_for_nobody() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert seconds_of_meeting(Cooling()) == 0.0
    finally:
        torch.set_num_threads(threads)


def test_the_nearest_of_several_times_alike_is_known(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    for yardstick in (1.0, 1.12):
        prices = KnownPrices.read(path, [yardstick])
        found(prices, "mm", yardstick)
        prices.keep()
    assert [KnownPrices.read(path, [now]).then.seconds["mm"] for now in (1.02, 1.08)] == [1.0, 1.12]
