"""Plans: found by search, kept in a file that can be edited, obeyed or refused, and compared with what then happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, combinations, islice
from pathlib import Path

import pytest
import torch
from models import tiny_model

import outsize
from outsize.asked import Request
from outsize.distributed.measure import Crowd
from outsize.errors import BudgetError, OptionError
from outsize.machine.find import find_machine
from outsize.machine.machine import Link
from outsize.model.units import find_units
from outsize.plan import KEEP, KEEP_ATTENTION, MOVE, RECOMPUTE, Activations, Plan, Predicted
from outsize.planner import needs, predict
from outsize.planner.check import check_plan, read_plan
from outsize.planner.needs import TENSORS
from outsize.planner.prices import CrowdedPrices, MeasuredPrices, RatedPrices
from outsize.planner.reasons import finished
from outsize.planner.rehearsal import rehearse
from outsize.planner.search import Placement, Search
from outsize.planner.task import Task, sample_batches
from outsize.planner.training import Place, Planning, plan_training
from outsize.planner.trial import left_behind
from outsize.train.optimizers import uniform_rule

LAPTOP = find_machine("laptop")
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})
REQUEST = Request(700 << 20, sequence_length=32)


def place() -> Place:
    return Place(LAPTOP, baseline_bytes=400 << 20, disk_free_bytes=1 << 40)


def task(request: Request, layers: int) -> Task:
    model = tiny_model("llama", tied=True, layers=layers, hidden=512)
    return Task(model, find_units(model), RULE, request)


def planned(request: Request = REQUEST, layers: int = 4) -> Plan:
    return plan_training(task(request, layers), place())


def checked(plan: Plan, request: Request = REQUEST, layers: int = 4) -> Plan:
    return check_plan(plan, task(request, layers), place())


# -- a plan is a file ---------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_its_file_as_it_was() -> None:
    plan = replace(planned(), activations=(("model.layers.0", MOVE), ("model.layers.1", Activations("products"))))
    assert Plan.from_json(plan.to_json()) == plan


def spoilt(change: Callable[[dict], object]) -> str:
    values = json.loads(Plan("mixed", 1 << 20, activations=(("model.layers.0", KEEP),)).to_json())
    change(values)
    with pytest.raises(OptionError) as refused:
        Plan.from_json(json.dumps(values), "my.json")
    return str(refused.value)


@pytest.mark.parametrize(("budget", "ceiling"), [(None, 1000), (1100, 1000), (1150, 1027), (5000, 1040)])
def test_the_process_gives_back_at_its_prediction_or_a_little_above_where_there_is_room(
    budget: int | None, ceiling: int
) -> None:
    predicted = Predicted(1000, 0, 0, 0, 0)
    plan = Plan("fp32", 0, headroom_bytes=100, memory_bytes=budget, predicted=predicted)
    assert plan.ceiling_bytes == ceiling


def test_what_is_wrong_in_a_plan_is_named() -> None:
    assert "my.json has no key 'arena'" in spoilt(lambda values: values.update(arena=1))
    assert "my.json lacks 'precision'" in spoilt(lambda values: values.pop("precision"))
    assert "arena_bytes cannot be -1" in spoilt(lambda values: values.update(arena_bytes=-1))
    assert "arena_bytes cannot be '1GiB'" in spoilt(lambda values: values.update(arena_bytes="1GiB"))
    assert "'sometimes' cannot be saved" in spoilt(
        lambda values: values.update(activations=[["model.layers.0", {"saved": "sometimes", "home": "near"}]])
    )
    assert "commit_every cannot be 0" in spoilt(lambda values: values.update(commit_every=0))
    assert "gradient_home cannot be 'moon'" in spoilt(lambda values: values.update(gradient_home="moon"))
    assert "lm_head.weight cannot be 0" in spoilt(lambda values: values.update(table_rows=[["lm_head.weight", 0]]))
    assert "clip cannot be nan" in spoilt(lambda values: values.update(clip=float("nan")))
    with pytest.raises(OptionError, match="is no JSON"):
        Plan.from_json("{", "my.json")


def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(bytes(range(256)))
    with pytest.raises(OptionError, match=r"plan\.json is no JSON"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(OptionError, match="none.json cannot be read"):
        read_plan(tmp_path / "none.json")


def test_a_plan_prints_itself() -> None:
    said = str(planned())
    for what in ("memory", "a step takes", "a step moves", "numbers", "near", "arena", "activations"):
        assert f"\n{what} " in f"\n{said}"
    assert all(len(line) <= 80 for line in said.splitlines())


# -- what a plan may say ------------------------------------------------------------------------------------------------


def test_an_edited_plan_is_taken_as_it_is_and_foretold_anew() -> None:
    plan = planned()
    edited = replace(plan, near_weights=frozenset(), near_states=frozenset(), arena_bytes=24 << 20, predicted=None)
    found = checked(edited)
    assert replace(found, predicted=None, reasons=()) == replace(edited, reasons=())
    assert plan.predicted is not None and found.predicted is not None
    assert found.predicted.bytes_read > plan.predicted.bytes_read == 0
    assert found.predicted.host_peak_bytes < plan.predicted.host_peak_bytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"near_weights": frozenset({"model.layers.9.mlp.up_proj.weight"})}, "near_weights names 'model.layers.9"),
        ({"activations": (("model.layers.7", KEEP),)}, "activations names 'model.layers.7'"),
        ({"precision": "fp32"}, "The plan says precision fp32, the command says mixed"),
        ({"accumulate": 2}, "The plan says accumulate 2"),
        ({"blocked_loss": False}, "contradict each other"),
    ],
)
def test_a_plan_of_another_job_is_refused(change: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        checked(replace(planned(), **change))


def test_what_the_c_library_keeps_is_foretold_as_the_plan_has_it() -> None:
    """The more it keeps of what is freed, the more a step's tensors take."""
    request = replace(REQUEST, memory_bytes=2 << 30, sequence_length=512)
    plan = planned(request)
    taken = []
    for recycle in (1 << 20, 32 << 20):
        found = checked(replace(plan, recycle_bytes=recycle), request)
        assert found.recycle_bytes == recycle and found.predicted is not None
        taken.append(dict(found.predicted.memory)[TENSORS])
    assert taken[0] < taken[1]


def test_where_the_c_library_merges_what_is_freed_less_is_held_between_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    request, lines = replace(REQUEST, memory_bytes=2 << 30), []
    for merged in (False, True):
        for module in (needs, predict):
            monkeypatch.setattr(module, "merges", lambda merged=merged: merged)
        predicted = planned(request).predicted
        assert predicted is not None
        lines.append(dict(predicted.memory))
    buffers = "buffers of update and transfers"
    assert lines[0][buffers] - lines[1][buffers] == needs.SPREAD
    assert lines[0][needs.KEPT] == needs.PINNED and needs.KEPT not in lines[1]


def test_a_plan_that_the_command_contradicts_is_refused() -> None:
    plan = planned()
    assert plan.blocked_loss
    with pytest.raises(OptionError, match="The plan says loss blocked, the command says module"):
        checked(plan, replace(REQUEST, loss="module"))
    with pytest.raises(OptionError, match="The plan says commit_every 50, the command says 7"):
        checked(replace(plan, commit_every=50), replace(REQUEST, commit_every=7))
    with pytest.raises(OptionError, match="The plan says loss module, the command says blocked"):
        checked(replace(plan, blocked_loss=False, table_rows=()), replace(REQUEST, loss="blocked"))


@pytest.mark.parametrize("what", ["near_weights", "near_states"])
def test_memory_that_outlives_the_process_holds_all_or_nothing(what: str) -> None:
    """Else a crash would leave some blocks at the published step and others at the committed one."""
    request = replace(REQUEST, memory_bytes=2 << 30, keeper=True)
    plan = planned(request)
    assert plan.shared_bytes == checked(plan, request).shared_bytes > 0
    away = {what: getattr(plan, what) - {"model.layers.0.mlp.up_proj.weight"}}
    with pytest.raises(OptionError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' or its state is on disk"):
        checked(replace(plan, **away), request)
    assert checked(replace(plan, **away, shared_bytes=0, arena_bytes=32 << 20), replace(request, keeper=False))


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BudgetError, match="more than the 700.00 MiB allowed: .* the arena for what streams"):
        checked(replace(planned(), arena_bytes=1 << 30))
    with pytest.raises(BudgetError, match="No room near compute for block"):
        checked(replace(planned(), near_weights=frozenset(), near_states=frozenset(), arena_bytes=64 << 10))


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(BudgetError, match="Give --memory ([0-9]+)MiB") as refused:
        planned(replace(REQUEST, memory_bytes=300 << 20))
    enough = int(str(refused.value).partition("Give --memory ")[2].partition("MiB")[0]) << 20
    plan = planned(replace(REQUEST, memory_bytes=enough))
    assert plan.predicted is not None and plan.predicted.host_peak_bytes <= enough


def test_a_disk_that_is_too_small_is_named_before_anything_is_rehearsed() -> None:
    with pytest.raises(BudgetError, match="of disk .two extents of every block.* and 1.00 MiB are free"):
        plan_training(task(REQUEST, 4), Place(LAPTOP, 400 << 20, 1 << 20))


def test_planning_draws_from_nobodys_random_numbers() -> None:
    """Prices of operations are measured on numbers that are drawn: how often depends on the budget, and what a job with
    dropout learns must not."""
    prices = MeasuredPrices(RatedPrices(LAPTOP), passing=1e-6)
    model = tiny_model("gpt2", tied=True, layers=2)
    before = torch.get_rng_state()
    rehearse(model, Plan("mixed", 0), RULE, prices, sample_batches(model, REQUEST))
    assert prices.known.then.seconds
    assert torch.equal(torch.get_rng_state(), before)


def test_others_slow_products_and_what_passes_through_memory() -> None:
    rated = RatedPrices(LAPTOP)
    crowded, few, matrix = CrowdedPrices(rated, Crowd(products=3.0, memory=2.0)), torch.ones(100), torch.ones(8, 8)
    for function, args, slower in (
        (torch.ops.aten.add.Tensor, (few, few), 2.0),
        (torch.ops.aten.mm.default, (matrix, matrix), 3.0),
    ):
        alone, found = (each.of(function, args, {}, function(*args)) for each in (rated, crowded))
        assert found == replace(alone, seconds=slower * alone.seconds)


# -- the search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_computing_again_takes_is_told_without_a_rehearsal(family: str) -> None:
    """At least so much more than where all is kept, and not much less: a step's updates and head are not in it."""
    request = replace(REQUEST, sequence_length=512)
    model = tiny_model(family, tied=True, layers=6)
    task = Task(model, find_units(model), RULE, request)
    planning = Planning(task, place())
    kept, again = (planning.search(how).rehearsed.work for how in (KEEP, RECOMPUTE))
    left = left_behind(model, task.units, task.batches[0], RatedPrices(LAPTOP), torch.bfloat16)
    assert 0.7 * (again - kept) <= left.all.seconds <= again - kept


def test_what_cannot_be_faster_is_not_rehearsed() -> None:
    """And the plan is the one that is found where it has been."""
    planning = Planning(task(replace(REQUEST, sequence_length=512, batch_size=4), 6), place())
    kept = planning.search(KEEP)
    memory = int((kept.needs.fixed + 0.3 * kept.everything) / 0.98)
    plan = planning.within(memory)
    assert len(planning._searches) == 1 and "placements played" in plan.reasons[1]
    planning.search(RECOMPUTE)
    assert planning.within(memory) == plan


def test_results_of_attention_are_kept_where_they_are_dear() -> None:
    """Where even they have no room, all is recomputed."""
    request = replace(REQUEST, sequence_length=1024, batch_size=8)
    there = replace(place(), machine=LAPTOP.hosted)
    planning = Planning(task(request, 8), there)
    needs = {how: planning.search(how).needs for how in (KEEP, KEEP_ATTENTION, RECOMPUTE)}
    tensors, least = ({how: getattr(n, name) for how, n in needs.items()} for name in ("tensors", "least"))
    left = planning._left
    attention = left.attention
    assert 0 < attention.nbytes < left.all.nbytes and 0 < attention.seconds < left.all.seconds
    kept = tensors[KEEP_ATTENTION] - tensors[RECOMPUTE]
    assert 0.9 * attention.nbytes < kept < 0.25 * (tensors[KEEP] - tensors[RECOMPUTE])  # whatever holes the heap has
    spared = planning.search(RECOMPUTE).rehearsed.work - planning.search(KEEP_ATTENTION).rehearsed.work
    assert 0.5 * attention.seconds < spared <= attention.seconds  # what is kept comes from memory

    for how in (KEEP_ATTENTION, RECOMPUTE):
        plan = planning.within(int(least[how] / 0.97))
        assert {found for _, found in plan.activations} == {how}
    links = tuple(replace(link, bytes_per_second=link.bytes_per_second / 1000) for link in LAPTOP.hosted.links)
    tape = Planning(task(request, 8), replace(there, machine=replace(LAPTOP.hosted, links=links)))
    assert not tape._dear and tape._considered == planning._considered


def test_the_search_finds_what_trying_everything_finds() -> None:
    """One layer's weights and states, near or not, in every combination that fits beside the arena it leaves."""
    request = replace(REQUEST, activations="recompute")
    search = Planning(task(request, layers=2), place()).search(KEEP)
    search.needs = replace(search.needs, baseline=400 << 20)  # else the room depends on what other tests have left
    search.request = replace(request, memory_bytes=search.needs.least + 4 * search.job.everything // 5)
    best = search.best().forecast.seconds
    tried = [search.foretell(placement).seconds for placement in every(search)]
    assert len(tried) > 30
    assert best <= 1.02 * min(tried)
    assert best < max(tried)


def test_no_placement_is_faster_than_what_must_move() -> None:
    """Told by the script of either way, and no small part of the fastest where the disk is slow."""
    slow = replace(place(), machine=replace(LAPTOP, links=tuple(_slower(link) for link in LAPTOP.links)))
    planning = Planning(task(replace(REQUEST, sequence_length=64), layers=2), slow)
    ways = [planning.search(how).within(REQUEST.memory_bytes) for how in (KEEP, RECOMPUTE)]
    for search in ways:
        least = search.needs.least + search.job.everything // 3
        search.request = replace(search.request, memory_bytes=int(least / 0.98))
        seconds = [search.foretell(placement).seconds for placement in islice(every(search), 0, None, 5)]
        for told in ways:
            assert len(seconds) > 3 and 0.25 * min(seconds) < told.moving(search.room) <= min(seconds)


def _slower(link: Link) -> Link:
    return replace(link, bytes_per_second=link.bytes_per_second / 10)


def test_a_small_arena_must_be_clearly_faster() -> None:
    """Or a disk that is faster than it was measured has nothing to do while compute goes on."""
    search = Planning(task(replace(REQUEST, memory_bytes=600 << 20), 4), place()).least
    search.best()
    good = [choice for choice in search.tried if choice.placement.arena_bytes >= search.needs.good_arena]
    small = [choice for choice in search.tried if choice not in good]
    assert good and small and not any(choice.tight for choice in good) and all(choice.tight for choice in small)
    one, other = good[0], small[0]
    slow = one.forecast.seconds
    for seconds, expected in ((0.96 * slow, one), (0.94 * slow, other)):
        search.tried = [one, replace(other, forecast=replace(other.forecast, seconds=seconds))]
        chosen = min(search.tried, key=lambda choice: choice.cost)
        assert chosen.tight == expected.tight
        (why,) = [reason for reason in finished(search, chosen).reasons if reason.startswith("near")]
        assert (f"the fastest takes {seconds:.2f} s instead of {slow:.2f}" in why) != chosen.tight
        assert ("the fastest of 2 placements played" in why) == chosen.tight


def every(search: Search) -> Iterator[Placement]:
    """Placements by unit: any of them with its weights near, any with its states near."""
    sizes = search.job.sizes
    groups: dict[str, list[str]] = {}
    for name in sizes.keys() - search.job.always:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    for weights in subsets(groups):
        for states in subsets(groups):
            held = sum(sizes[n].bytes for g in weights for n in groups[g])
            held += sum(sizes[n].state_bytes for g in states for n in groups[g])
            arena = (search.room - held) // 4096 * 4096
            if arena >= search.needs.least_arena:
                near = frozenset(n for g in weights for n in groups[g]) | search.job.always
                state = frozenset(n for g in states for n in groups[g]) | search.job.always
                yield Placement(near, state, arena, "disk", "every")


def subsets(names: dict[str, list[str]]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))


def test_more_memory_is_never_slower() -> None:
    found = [planned(replace(REQUEST, memory_bytes=size << 20)).predicted for size in (560, 600, 700)]
    seconds = [predicted.seconds_per_step for predicted in found if predicted is not None]
    assert all(later <= 1.01 * earlier for earlier, later in zip(seconds, seconds[1:], strict=False))


# -- outsize.plan -------------------------------------------------------------------------------------------------------


def test_a_machine_that_is_not_here_can_be_planned_for(tmp_path: Path) -> None:
    tiny_model("llama", tied=True).save_pretrained(tmp_path)
    plan = outsize.plan(str(tmp_path), memory="8GiB", machine="laptop", sequence_length=32)
    assert isinstance(plan.predicted, Predicted) and plan.predicted.seconds_per_step
    with pytest.raises(OptionError, match="there is no machine 'abacus'"):
        outsize.plan(str(tmp_path), memory="8GiB", machine="abacus")
    with pytest.raises(OptionError, match="plan of train has no option 'sequence'"):
        outsize.plan(str(tmp_path), memory="8GiB", sequence=32)


def test_a_module_that_looks_at_its_token_ids_is_planned_for() -> None:
    model = tiny_model("gpt2", tied=True, layers=8)
    model.config.pad_token_id = 0
    task = Task(model, find_units(model), RULE, REQUEST)
    left = left_behind(model, task.units, task.batches[0], RatedPrices(LAPTOP), torch.bfloat16)
    assert left.all.nbytes > 0 and left.all.seconds > 0
    found = plan_training(task, place())
    assert found.predicted is not None
