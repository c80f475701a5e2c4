"""A pipeline of real processes over Gloo, beside one worker that has the whole model."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import VOCABULARY
from models import tiny_model
from workers import Case, Crew, Found

from outsize.asked import Request
from outsize.distributed.pipeline import BACKWARD, FORWARD, WEIGHTS, Turn, order_of, returning
from outsize.divided import HALVES, LOOP, V, leg_of, worker_of
from outsize.errors import OptionError
from outsize.machine.find import find_machine
from outsize.model.units import find_units
from outsize.planner.cluster import wire_of
from outsize.planner.legs import find_route
from outsize.planner.pipeline import even_legs, plan_line
from outsize.planner.task import Task
from outsize.planner.training import Place
from outsize.planner.workers import Worker
from outsize.train.recipe import rule_of


def alone(case: Case) -> Case:
    return replace(case, workers=1, legs=())


def assert_same(found: Found, expected: Found) -> None:
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert None in (found.evaluated, expected.evaluated) or found.evaluated == expected.evaluated
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


LINE = Case(legs=(2, 2), steps=2)


@pytest.mark.parametrize(
    "case",
    [
        LINE,
        replace(LINE, schedule="gpipe", placement="near", activations="keep"),
        Case(workers=3, legs=(2, 1, 1), precision="mixed", table_rows=40, family="qwen3", activations="move"),
        Case(legs=(1, 3), tied=True, table_rows=40, optimizer="muon", placement="mixed", activations="mixed"),
        Case(workers=4, legs=(1, 1, 1, 1), tied=True, table_rows=40, precision="mixed", sequences=5),
    ],
    ids=str,
)
def test_a_pipeline_gives_the_bits_of_one_worker(gang: Crew, tmp_path: Path, case: Case) -> None:
    expected = gang.run(alone(case), tmp_path / "one")
    assert_same(gang.run(case, tmp_path / "line"), expected)


LAPS = Case(legs=(1, 1, 1, 1), schedule="interleaved", steps=2)
VEE = replace(LAPS, legs_shape="v", schedule="v")
ZERO = replace(VEE, schedule=HALVES, activations="keep")


@pytest.mark.parametrize(
    "case",
    [
        LAPS,
        replace(LAPS, tied=True, table_rows=40, precision="mixed", sequences=5, placement="near", activations="keep"),
        replace(LAPS, layers=7, legs=(2, 1, 1, 3), optimizer="muon", placement="mixed", activations="move"),
        replace(LAPS, workers=3, layers=6, legs=(1,) * 6, family="qwen3", sequences=2, table_rows=40),
        VEE,
        replace(VEE, tied=True, table_rows=40, precision="mixed", sequences=5, placement="near", activations="keep"),
        replace(VEE, layers=7, legs=(2, 1, 1, 3), optimizer="muon", placement="mixed", activations="move"),
        replace(VEE, workers=3, layers=6, legs=(1,) * 6, family="qwen3", sequences=2, tied=True, table_rows=40),
        ZERO,
        replace(ZERO, tied=True, table_rows=40, precision="mixed", sequences=5, placement="near", optimizer="muon"),
        replace(ZERO, workers=3, layers=6, legs=(1,) * 6, family="qwen3", sequences=2, placement="mixed"),
        replace(ZERO, sequences=1),
    ],
    ids=str,
)
def test_several_legs_each_give_the_bits_of_one_worker(gang: Crew, tmp_path: Path, case: Case) -> None:
    """With two workers the one before is the one after; with fewer micro-batches than workers all wait."""
    assert_same(gang.run(case, tmp_path / "laps"), gang.run(alone(case), tmp_path / "one"))


SHARED = Case(workers=4, legs=(2, 2), steps=2)


@pytest.mark.parametrize(
    "case",
    [
        SHARED,
        replace(SHARED, zero=2, precision="mixed", tied=True, table_rows=40, placement="near", activations="keep"),
        replace(
            SHARED, legs=(1, 3), nodes=2, optimizer="muon", placement="mixed", activations="move", schedule="gpipe"
        ),
    ],
    ids=str,
)
def test_legs_that_workers_share_give_the_bits_of_as_many_who_share_the_model(
    gang: Crew, tmp_path: Path, case: Case
) -> None:
    """And of one worker, if each has one micro-batch."""
    assert_same(
        gang.run(case, tmp_path / "legs"), gang.run(replace(case, workers=2, legs=(), nodes=1), tmp_path / "two")
    )
    if not case.tied:  # one worker adds all micro-batches of the head first
        case = replace(case, sequences=2)
        assert_same(gang.run(case, tmp_path / "each"), gang.run(alone(replace(case, nodes=1)), tmp_path / "one"))


@pytest.mark.parametrize("how", ["a leg each", "shared legs", "several legs each", "a v", "no bubble"])
def test_clipping_by_the_norm_of_all_legs(gang: Crew, tmp_path: Path, how: str) -> None:
    """Squares are added by leg first: of n weights, the norm's relative difference is at most that of two sums of n terms
    in fp32, n eps. A step of gradient descent without momentum moves weights by no more than that differs. Gradients of
    shared legs wait whole."""
    case = replace(LINE, clip=0.1, optimizer="sgd", steps=1, tied=True, table_rows=40)
    plain = alone(case)
    if how == "several legs each":
        case = replace(case, legs=(1, 1, 1, 1), schedule="interleaved")
    if how == "a v":
        case = replace(case, legs=(1, 1, 1, 1), legs_shape="v", schedule="v")
    if how == "no bubble":
        case = replace(case, legs=(1, 1, 1, 1), legs_shape="v", schedule=HALVES, activations="keep")
    if how == "shared legs":
        case = replace(case, workers=4, zero=1)
        plain = replace(case, workers=2, legs=())
    expected, found = gang.run(plain, tmp_path / "one"), gang.run(case, tmp_path / "line")
    slack = len(expected.weights) * torch.finfo(torch.float32).eps
    assert found.norms == pytest.approx(expected.norms, rel=slack) and found.norms != [None]
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=2 * slack, atol=2 * slack * 0.1 * 0.05)
    assert gang.run(case, tmp_path / "again").norms == found.norms


@pytest.mark.parametrize("case", [LINE, LAPS, VEE], ids=str)
def test_what_goes_over_the_wire(gang: Crew, tmp_path: Path, case: Case) -> None:
    """Of each micro-batch its hidden states one way and their gradient the other, from leg to leg; of a tied table, its
    gradient both ways. Who has both ends of a v, and both legs at its bottom, sends nothing there."""
    case, vee = replace(case, tied=True, table_rows=40), case.legs_shape == V
    hidden, table = (len(case.legs) - 1 - vee) * 4 * 16 * 64 * 4, 4 * VOCABULARY * 64 * (not vee)
    for moved in (each["moved"] for each in gang.run(case, tmp_path / "line").ledgers):
        for way in (("host", "peer"), ("peer", "host")):
            assert moved[(*way, "activation")] == case.steps * hidden
            assert moved.get((*way, "gradient"), 0) == case.steps * table


def test_the_slowest_worker_gives_layers_away() -> None:
    """One at a time, as long as steps become shorter."""
    model = tiny_model("llama", tied=True, layers=6, hidden=512)
    machine = find_machine("laptop")
    place = Place(machine, 200 << 20, 1 << 40, wire_of(machine, 1))
    request = Request(8 << 30, sequence_length=32, accumulate=4, activations="keep")
    task = Task(model, find_units(model), rule_of("adamw", {}), request, source_dtype=torch.float32)
    route = find_route(model)
    assert even_legs(task, route, 2) == (3, 3) and even_legs(task, route, 6) == (1,) * 6
    with pytest.raises(OptionError, match="6 layers cannot be divided into 7 legs"):
        even_legs(task, route, 7)
    plans = plan_line([replace(task, request=request.in_line((5, 1), 2, 1))], [Worker(8 << 30, place)] * 2)
    assert [plan.legs for plan in plans] == [(3, 3)] * 2 and [plan.rank for plan in plans] == [0, 1]
    assert len({plan.predicted.seconds_per_step for plan in plans if plan.predicted is not None}) == 1


class Recorder:
    """What torch's schedules ask of a stage, without a model."""

    has_backward, device, submod, chunks = True, "cpu", None, 0

    def __init__(self, stages: int, stage: int) -> None:
        self.num_stages, self.stage_index = stages, stage
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.order: list[tuple[bool, int]] = []

    def forward_one_chunk(self, number: int, *given: Any, **named: Any) -> torch.Tensor:
        self.order.append((True, number))
        return torch.zeros(1)

    def backward_one_chunk(self, number: int, *given: Any, **named: Any) -> None:
        self.order.append((False, number))

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **named: []


@pytest.mark.parametrize(("schedule", "torchs"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
def test_micro_batches_come_in_the_order_of_torch_s_schedules(schedule: str, torchs: str) -> None:
    from torch.distributed.pipelining import schedules

    for stages, count in ((1, 1), (2, 4), (3, 3), (4, 7)):
        for stage in range(stages):
            asked: Any = Recorder(stages, stage)
            known = getattr(schedules, torchs)(asked, count, loss_fn=lambda output, target: output.sum())
            known._step_microbatches([()] * count, [{}] * count, [None] * count)
            assert [(forward, number) for forward, _, number in order_of(schedule, stages, stage, count)] == asked.order


def test_laps_come_in_the_order_of_torch_s_schedule() -> None:
    """Which refuses micro-batches that make no groups of one size."""
    from torch.distributed.pipelining import schedules

    for workers, laps, count in ((2, 2, 4), (2, 3, 6), (3, 2, 9), (4, 2, 6), (4, 3, 3)):
        for worker in range(workers):
            stages: Any = [Recorder(workers * laps, worker + lap * workers) for lap in range(laps)]
            for stage in stages:
                stage.group_size, stage.group_rank = workers, worker
            known = schedules.ScheduleInterleaved1F1B(stages, count, loss_fn=lambda output, target: output.sum())
            asked = [action for action in known.pipeline_order[worker] if action is not None]
            expected = [
                (a.computation_type.name == "FORWARD", a.stage_index // workers, a.microbatch_index) for a in asked
            ]
            assert order_of("interleaved", workers, worker, count, laps) == expected


def test_there_and_back_comes_in_the_order_of_torch_s_schedule() -> None:
    """Whose backward is in halves, of which the first passes something on."""
    from torch.distributed.pipelining import schedules

    for workers, count in ((2, 2), (2, 4), (3, 7), (4, 6), (4, 9)):
        for worker in range(workers):
            stages: Any = [Recorder(2 * workers, leg_of(worker, lap, workers, V)) for lap in range(2)]
            for stage in stages:
                stage.group_size, stage.group_rank = workers, worker
            known = schedules.ScheduleZBVZeroBubble(stages, count, loss_fn=lambda output, target: output.sum())
            asked = [action for action in known.pipeline_order[worker] if action is not None]
            kinds = {"FORWARD": FORWARD, "BACKWARD_INPUT": BACKWARD, "BACKWARD_WEIGHT": WEIGHTS}
            expected = [(kinds[a.computation_type.name], a.stage_index // workers, a.microbatch_index) for a in asked]
            assert order_of(HALVES, workers, worker, count, 2) == expected
            whole = [turn for turn in expected if turn[0] != WEIGHTS]
            assert order_of("v", workers, worker, count, 2) == whole


WAYS = [("1f1b", LOOP, 1), *(("interleaved", LOOP, laps) for laps in (2, 3, 4)), ("v", V, 2), (HALVES, V, 2)]


@pytest.mark.parametrize("workers", range(2, 7))
def test_no_worker_waits_for_ever(workers: int) -> None:
    """Whoever passes something on waits for nobody; but of gradients only so many may be on their way."""
    for (schedule, shape, laps), count in product(WAYS, range(1, 14)):
        orders = [order_of(schedule, workers, worker, count, laps) for worker in range(workers)]
        kinds = (BACKWARD, FORWARD, WEIGHTS) if schedule == HALVES else (BACKWARD, FORWARD)
        assert all(sorted(order) == sorted(product(kinds, range(laps), range(count))) for order in orders)
        done: set[Turn] = set()  # by leg
        at, moved = [0] * workers, True
        while moved:
            moved = False
            for worker, order in enumerate(orders):
                while at[worker] < len(order) and _may(order, at[worker], worker, workers, laps, shape, done):
                    what, lap, number = order[at[worker]]
                    done.add((what, leg_of(worker, lap, workers, shape), number))
                    at[worker], moved = at[worker] + 1, True
        assert at == [len(order) for order in orders], (schedule, workers, laps, count)


@pytest.mark.parametrize("workers", range(2, 7))
def test_there_and_back_all_hold_as_many_micro_batches(workers: int) -> None:
    """As many as there are workers, each with both legs; of laps the first holds more."""

    def held(schedule: str, worker: int) -> int:
        signs = (1 if forward else -1 for forward, _, _ in order_of(schedule, workers, worker, 4 * workers, 2))
        return max(accumulate(signs))

    assert {held("v", worker) for worker in range(workers)} == {2 * workers}
    assert held("interleaved", 0) > 2 * workers


def _may(order: list[Turn], at: int, worker: int, workers: int, laps: int, shape: str, done: set[Turn]) -> bool:
    """What the turn takes has been passed on, and of what the worker has passed back enough has been taken."""
    what, lap, number = order[at]
    leg = leg_of(worker, lap, workers, shape)
    if what == WEIGHTS:
        return (BACKWARD, leg, number) in done
    if what == FORWARD:
        return not leg or (FORWARD, leg - 1, number) in done
    sent = [(leg_of(worker, lap, workers, shape), number) for what, lap, number in order[:at] if what == BACKWARD]
    waited = sent[: max(len(sent) + 1 - returning(laps), 0)]
    away = ((leg - 1, number) for leg, number in waited if leg and worker_of(leg - 1, workers, shape) != worker)
    taken = all((BACKWARD, *passed) in done for passed in away)
    return taken and (leg == workers * laps - 1 or (BACKWARD, leg + 1, number) in done)
