"""Whether a run finds room for its leases is known while planning, of all units, though a long script is played over some."""

from dataclasses import replace

import pytest
import torch
from exactness import Setting, make_batches, make_model, make_plan

from outsize.asked import Request
from outsize.errors import BudgetError
from outsize.machine.find import find_machine
from outsize.memory.tier import PAGE
from outsize.model.units import find_units
from outsize.plan import KEEP, Plan
from outsize.planner.check import check_plan
from outsize.planner.clock import ways_of
from outsize.planner.forecast import forecast
from outsize.planner.needs import pinned_peak
from outsize.planner.play import play
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import homes, rehearse
from outsize.planner.room import need_room
from outsize.planner.task import Task
from outsize.planner.training import Place, Planning
from outsize.train.job import always_near
from outsize.train.optimizers import uniform_rule

LAPTOP = find_machine("laptop")
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})


def fits(look, *arguments) -> bool:
    try:
        look(*arguments)
    except BudgetError:
        return False
    return True


@pytest.mark.parametrize(
    "setting",
    [
        Setting(precision="mixed"),
        Setting(precision="mixed", activations=KEEP),
        Setting(clip=1.0),
        Setting(accumulate=3),
        Setting(table_rows=64, precision="mixed"),
    ],
    ids=["plain", "kept", "clipped", "three micro-batches", "blocks of the vocabulary"],
)
def test_leases_find_room_without_a_clock_where_they_find_it_when_played(setting: Setting) -> None:
    model = make_model("llama", layers=8)
    plan = make_plan(model, setting)
    rehearsed = rehearse(model, plan, RULE, RatedPrices(LAPTOP), make_batches(1, setting.accumulate)[0], torch.float32)
    home_of = homes(plan, always_near(find_units(model)))
    least = pinned_peak(rehearsed.script, home_of)
    for arena in range(least, 2 * least, least // 5):
        played = fits(play, rehearsed.whole, arena, home_of, ways_of(LAPTOP), 3)
        assert fits(need_room, rehearsed.asked, arena, home_of) == played, arena


def test_a_plan_is_refused_whose_run_would_find_no_room_in_a_unit_that_was_not_played(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """12 of 40 units are played, and 12 find room."""
    monkeypatch.setattr("outsize.planner.forecast.FEW_EVENTS", 1)
    monkeypatch.setattr("outsize.planner.forecast.MOST_EVENTS", 1)
    model = make_model("llama", layers=40)
    request = Request(2 << 30, sequence_length=16, clip=1.0, precision="fp32", loss="module", activations="recompute")
    task = Task(model, find_units(model), RULE, request)
    place = Place(LAPTOP, 400 << 20, 1 << 40)
    search = Planning(task, place).least
    least, always = search.needs.least_arena, always_near(task.units)
    plan = Plan("fp32", 0, clip=1.0, hold=True, activations=search.bare.activations)
    home_of = homes(plan, always)

    def only_seemingly(arena: int) -> bool:
        asked = fits(need_room, search.rehearsed.asked, arena, home_of)
        return not asked and fits(forecast, search.rehearsed, arena, home_of, ways_of(LAPTOP), True)

    arena = next(filter(only_seemingly, range(8 * least // 10 // PAGE * PAGE, 2 * least, 2 * PAGE)))
    assert not fits(play, search.rehearsed.whole, arena, home_of, ways_of(LAPTOP), 3)
    with pytest.raises(BudgetError, match="near compute"):
        check_plan(replace(plan, arena_bytes=arena), task, place)
