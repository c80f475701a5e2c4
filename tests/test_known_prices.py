"""What was measured for prices is known the next time, as long as the machine is as fast as it was."""

from __future__ import annotations

from functools import partial
from itertools import chain, repeat
from itertools import count as counted
from pathlib import Path
from time import sleep

import pytest
import torch
from models import tiny_model

from outsize.asked import Request
from outsize.machine.find import DESCRIBED, find_machine
from outsize.plan import Plan
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

    def __init__(self, seconds: list[float], patience: float) -> None:
        super().__init__(patience)
        self._next = chain(seconds, repeat(1.0))

    def _beat(self) -> float:
        self._patience -= 1e-3
        return next(self._next)


def test_who_shares_a_core_is_waited_for_and_does_not_count() -> None:
    pulse = Beats([1.0, 1.3, 2.0, 1.3, 2.0, 2.0, 2.0, 2.0], patience=1.0)
    assert pulse.steady() and pulse.steady() and not pulse.steady(), "the faster of two beats, against the fastest"
    pulse.wait()
    assert next(pulse._next) == 1.0, "it did not wait for the slow beat to end"
    slow = [2.0] * 1000
    impatient = Beats([1.0, 1.0, *slow], patience=0.1)
    assert impatient.steady()
    impatient.wait()
    assert not impatient.steady(), "it waited without an end"
    # Before a sample and after: two beats each. The first sample begins steady and ends disturbed.
    disturbed = Beats([1.0, 1.0, 2.0, 2.0], patience=1.0)
    done = counted()
    took = chain([0.05], repeat(0.002))

    def work() -> None:
        if next(done):
            sleep(next(took))

    assert usual_seconds(work, lambda: None, disturbed) < 0.04
    assert next(done) >= 5, "the disturbed one was counted"


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
