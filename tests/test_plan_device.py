"""Plans for a device: what lives in its memory, in its host's and on disk, and that both are walls."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from random import Random

import pytest
import torch
from models import tiny_model
from typer.testing import CliRunner

import outsize
from outsize.asked import Request
from outsize.cli import app
from outsize.errors import BudgetError, OptionError
from outsize.machine.devices import CONTEXT
from outsize.machine.find import find_machine
from outsize.machine.machine import Link, Machine
from outsize.model.units import find_units
from outsize.plan import INPUT_TO_HOST, KEEP, MOVE, MOVE_TO_HOST, RECOMPUTE, SPARE, Plan
from outsize.planner.beside import LIBRARIES
from outsize.planner.check import check_plan
from outsize.planner.clock import ways_of
from outsize.planner.search import Placement, Search
from outsize.planner.task import Task
from outsize.planner.training import Place, Planning, plan_training
from outsize.train.optimizers import uniform_rule

MIB = 1 << 20
CARD = find_machine("rtx-4090")
NODE = find_machine("h200-x8")
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3, "fused": True})
ROOMY = Request(4 << 30, sequence_length=32, device_bytes=2 << 30)


def place(machine: Machine = CARD) -> Place:
    return Place(machine, baseline_bytes=400 << 20, disk_free_bytes=1 << 40)


def task(request: Request, layers: int = 4) -> Task:
    model = tiny_model("llama", tied=True, layers=layers, hidden=512)
    return Task(model, find_units(model), RULE, request)


def planned(request: Request = ROOMY, layers: int = 4) -> Plan:
    return plan_training(task(request, layers), place())


@pytest.fixture(scope="module")
def tight() -> Request:
    """A device for about a half of what there is, and its host for a half of the rest."""
    search = Planning(task(replace(ROOMY, activations="recompute")), place()).search(RECOMPUTE)
    beside = search.needs.beside
    assert beside is not None
    half = search.everything // 2
    return replace(
        ROOMY,
        activations="recompute",
        device_bytes=int((search.needs.fixed + search.needs.good_arena + half) / (1 - SPARE)),
        memory_bytes=int((beside.fixed + half // 2) / (1 - SPARE)) + (8 << 20),
    )


# -- two walls ----------------------------------------------------------------------------------------------------------


def test_with_room_all_of_it_lives_on_the_device() -> None:
    plan = planned()
    predicted = plan.predicted
    assert predicted is not None and plan.device_bytes == 2 << 30 and plan.near == "device"
    assert plan.gradient_home == "device" and not plan.host_weights and not plan.host_states
    assert predicted.bytes_read == 0 and {source for source, *_ in predicted.moved} == {"device"}
    assert dict(predicted.device_memory)["the driver and its libraries, assumed"] == CONTEXT
    assert dict(predicted.memory)["CUDA's libraries, assumed"] == LIBRARIES


def test_both_walls_hold_and_their_causes_add_up(tight: Request) -> None:
    plan = planned(tight)
    predicted = plan.predicted
    assert predicted is not None
    assert sum(nbytes for _, nbytes in predicted.memory) == predicted.host_peak_bytes
    assert sum(nbytes for _, nbytes in predicted.device_memory) == predicted.device_peak_bytes
    assert 0.9 * tight.device_bytes < predicted.device_peak_bytes <= tight.device_bytes
    assert 0.9 * tight.memory_bytes < predicted.host_peak_bytes + plan.headroom_bytes <= tight.memory_bytes


def test_a_plan_names_what_lives_where(tight: Request) -> None:
    plan, sizes = planned(tight), Planning(task(tight), place()).least.job.sizes
    homes = {plan.home_of(name) for name in sizes} | {plan.home_of_state(name) for name in sizes}
    assert homes == {"device", "host", "disk"}
    assert not plan.near_weights & plan.host_weights and not plan.near_states & plan.host_states
    assert plan.predicted is not None
    moved = {(source, target) for source, target, *_ in plan.predicted.moved}
    assert moved == {(a, b) for a in ("device", "host", "disk") for b in ("device", "host", "disk") if a != b} - {
        ("disk", "host")
    }
    (said,) = [reason for reason in plan.reasons if reason.startswith("host: ")]
    assert "live in the memory of the device's host" in said and "live on disk alone" in said
    assert re.search(r"\ndevice +its memory peaks at [\d.]+ GiB of [\d.]+ GiB\n +1.00 GiB the driver", str(plan))


def test_keeping_is_not_rehearsed_where_what_must_pass_for_it_takes_longer() -> None:
    """And looked at all the same, it is slower."""
    links = tuple(replace(link, bytes_per_second=link.bytes_per_second / 20) for link in CARD.links)
    there, request = (
        place(replace(CARD, links=links)),
        replace(ROOMY, sequence_length=256, batch_size=16, commit_every=50),
    )
    wide = tiny_model("llama", tied=True, layers=6, hidden=1024)
    kept = Planning(Task(wide, find_units(wide), RULE, request), there).search(KEEP)
    assert kept.needs.beside is not None
    device = int((kept.needs.fixed + kept.needs.good_arena) / (1 - SPARE)) + MIB
    request = replace(request, memory_bytes=int(kept.needs.beside.fixed / (1 - SPARE)) + 64 * MIB)
    planning = Planning(Task(wide, find_units(wide), RULE, replace(request, device_bytes=device)), there)
    plan = planning.within(request.memory_bytes)
    assert plan.predicted is not None and plan.predicted.seconds_per_step is not None
    assert [how for how, *_ in planning._searches] == [RECOMPUTE]
    slower = planning.search(KEEP).within(request.memory_bytes)
    assert slower.fits and slower.best().cost > plan.predicted.seconds_per_step


def test_inputs_of_layers_move_to_the_host_where_the_device_has_no_room_for_them_all() -> None:
    request = replace(ROOMY, sequence_length=512, batch_size=16)
    roomy = planned(replace(request, activations="recompute"), layers=12)
    assert {how for _, how in roomy.activations} == {RECOMPUTE}
    with pytest.raises(BudgetError, match="of the device's memory are too few") as refused:
        planned(replace(request, device_bytes=CONTEXT + MIB), layers=12)
    (least,) = re.findall(r"--device-memory (\d+)MiB", str(refused.value))
    plan = planned(replace(request, device_bytes=int(least) * MIB), layers=12)
    assert {how for _, how in plan.activations} == {INPUT_TO_HOST} and plan.predicted is not None
    moved = sum(
        nbytes for *ways, kind, nbytes in plan.predicted.moved if (*ways, kind) == ("device", "host", "activation")
    )
    inputs = 12 * 512 * 16 * 512 * 2  # of layers, in 16 bits
    assert moved == inputs
    assert any("recomputed from the input, which moves to the host's memory" in reason for reason in plan.reasons)


def test_activations_move_to_the_hosts_memory_where_it_has_room_for_them() -> None:
    request = replace(ROOMY, activations="move", sequence_length=256, batch_size=8)
    plan = planned(request, layers=6)
    assert {how for _, how in plan.activations} == {MOVE_TO_HOST} and plan.predicted is not None
    moved = {tuple(ways): nbytes for *ways, nbytes in plan.predicted.moved}
    out = moved["device", "host", "activation"]
    assert 0 < moved["host", "device", "activation"] <= out  # the last unit's may be there still
    waiting = dict(plan.predicted.memory)["activations that wait there"]
    assert waiting >= out
    beside = Planning(task(request, 6), place()).search(MOVE_TO_HOST).needs.beside
    assert beside is not None
    small = int((beside.fixed - waiting // 2) / (1 - SPARE))
    on_disk = planned(replace(request, memory_bytes=small), layers=6)
    assert {how for _, how in on_disk.activations} == {MOVE}


def test_more_of_either_memory_is_never_slower(tight: Request) -> None:
    def seconds(request: Request) -> float:
        predicted = planned(request).predicted
        assert predicted is not None and predicted.seconds_per_step is not None
        return predicted.seconds_per_step

    here = seconds(tight)
    assert seconds(replace(tight, device_bytes=tight.device_bytes + (64 << 20))) <= 1.01 * here
    assert seconds(replace(tight, memory_bytes=tight.memory_bytes + (64 << 20))) <= 1.01 * here


def test_the_search_finds_what_trying_everything_finds(tight: Request) -> None:
    """Weights and states of each unit on the device, in its host's memory or on disk, in every combination that fits. The
    search is finer: it takes weight by weight."""
    search = Planning(task(tight, layers=2), place()).search(RECOMPUTE)
    beside = search.needs.beside
    assert beside is not None
    device = search.needs.fixed + search.needs.good_arena + search.everything // 5
    host = beside.fixed + search.everything // 10
    search.request = replace(tight, device_bytes=int(device / (1 - SPARE)), memory_bytes=int(host / (1 - SPARE)))
    best = search.best().forecast.seconds
    tried = [search.foretell(placement).seconds for placement in every(search)]
    assert len(tried) > 100
    assert best <= 1.02 * min(tried)
    assert best < max(tried) / 2


def slow(machine: Machine, link: float = 1e9, update: float = 4e9) -> Machine:
    """With a link of so many bytes a second to its device, and a host that updates so many weights a second."""
    links = tuple(_slowed(each, link) for each in machine.links)
    host, device = machine.processor("host"), machine.compute
    return replace(machine, links=links, processors=(replace(host, update=update, copy=28 * update), device))


def test_the_host_updates_as_much_as_makes_a_step_the_fastest(tight: Request) -> None:
    plan = plan_training(task(tight), place(slow(CARD)))
    none, all_of_it = (checked(plan_with(plan, names), tight, slow(CARD)) for names in (frozenset(), plan.host_states))
    found, *others = [each.predicted.seconds_per_step for each in (plan, none, all_of_it) if each.predicted is not None]
    assert plan.host_updates and found is not None and plan.exactness == "rounding"
    whole = replace(plan, blocked_loss=False, table_rows=())
    assert whole.exactness == "rounding" and replace(whole, host_updates=frozenset()).exactness == "exact"
    assert all(found <= 1.02 * seconds for seconds in others if seconds is not None) and found < 0.95 * (
        others[0] or 0.0
    )
    (said,) = [reason for reason in plan.reasons if reason.startswith("update on the host: ")]
    assert f"{len(plan.host_updates)} of the {len(plan.host_states)} weights" in said and "may round otherwise" in said
    assert plan.predicted is not None and dict(plan.predicted.memory)["buffers of the update there"] > 0
    assert plan.predicted.host_peak_bytes + plan.headroom_bytes <= tight.memory_bytes


def test_a_slow_host_updates_nothing(tight: Request) -> None:
    plan = plan_training(task(tight), place(slow(CARD, update=1e7)))
    assert not plan.host_updates and plan.exactness == "rounding"  # its loss is over blocks
    assert any(reason.startswith("update on the host: of nothing; with a part") for reason in plan.reasons)


def test_no_other_choice_of_updates_on_the_host_is_much_faster(tight: Request) -> None:
    """The search tries some of what is possible, evenly taken: within a tenth of the best of many."""
    search = Planning(task(tight), place(slow(CARD))).search(RECOMPUTE).within(tight.memory_bytes)
    best, draw = search.best(), Random(0)
    names = sorted(best.placement.host_states)
    chosen = [frozenset(draw.sample(names, draw.randrange(len(names) + 1))) for _ in range(60)]
    tried = [search.foretell(replace(best.placement, host_updates=some)).seconds for some in chosen]
    assert best.placement.host_updates and best.forecast.seconds <= 1.1 * min(tried)


def plan_with(plan: Plan, updates: frozenset[str]) -> Plan:
    return replace(plan, host_updates=updates, predicted=None)


def every(search: Search) -> Iterator[Placement]:
    """Placements by unit: any of them with its weights or its states on the device, and of the rest any in its host's
    memory."""
    groups: dict[str, list[str]] = {}
    for name in search.job.sizes.keys() - search.job.always:
        groups.setdefault(".".join(name.split(".")[:3]), []).append(name)
    things = [(group, what) for group in groups for what in (0, 1)]
    for near in subsets(things):
        held = sum(search.near_sizes(name)[what] for group, what in near for name in groups[group])
        arena = (search.room - held) // search.grain * search.grain
        if arena < search.needs.least_arena:
            continue
        for host in subsets([thing for thing in things if thing not in near]):
            sizes = search.job.sizes
            there = [
                (sizes[name].bytes, sizes[name].state_bytes)[what] for group, what in host for name in groups[group]
            ]
            if sum(there) <= search.host_room:
                chosen = [
                    frozenset(name for group, what in some if what == kind for name in groups[group])
                    for some in (near, host)
                    for kind in (0, 1)
                ]
                always = frozenset(search.job.always)
                near_placed = Placement(chosen[0] | always, chosen[1] | always, arena, "disk", "every")
                yield replace(near_placed, host_weights=chosen[2], host_states=chosen[3])


def subsets(things: list) -> Iterator[tuple]:
    return chain.from_iterable(combinations(things, count) for count in range(len(things) + 1))


# -- what is too small --------------------------------------------------------------------------------------------------


def test_a_device_that_is_too_small_is_refused_with_what_would_do() -> None:
    with pytest.raises(BudgetError, match="of the device's memory are too few: .*--device-memory 0") as refused:
        planned(replace(ROOMY, device_bytes=1 << 30))
    found = re.search(r"Give --device-memory (\d+)MiB", str(refused.value))
    assert found is not None
    enough = int(found[1]) << 20
    predicted = planned(replace(ROOMY, device_bytes=enough)).predicted
    assert predicted is not None and predicted.device_peak_bytes <= enough


def test_a_host_that_is_too_small_for_a_device_is_refused_with_what_would_do() -> None:
    with pytest.raises(BudgetError, match=r"too small for the host of a device: .* for CUDA's") as refused:
        planned(replace(ROOMY, memory_bytes=1 << 30))
    enough = refused.value.least
    assert enough is not None and f"--memory {enough >> 20}MiB" in str(refused.value)
    plan = planned(replace(ROOMY, memory_bytes=enough))
    assert plan.predicted is not None and plan.predicted.host_peak_bytes + plan.headroom_bytes <= enough


# -- a plan from a file -------------------------------------------------------------------------------------------------


def checked(plan: Plan, request: Request, machine: Machine = CARD) -> Plan:
    return check_plan(plan, task(request), place(machine))


def test_an_edited_plan_of_a_device_is_taken_as_it_is(tight: Request) -> None:
    plan = planned(tight)
    away = replace(plan, host_weights=frozenset(), host_states=frozenset(), predicted=None)
    found = checked(away, tight)
    assert replace(found, predicted=None, reasons=()) == replace(away, reasons=())
    assert found.predicted is not None and plan.predicted is not None
    assert found.predicted.host_peak_bytes < plan.predicted.host_peak_bytes
    assert found.predicted.bytes_read > plan.predicted.bytes_read


def test_an_edited_plan_that_contradicts_the_command_or_does_not_fit_is_refused(tight: Request) -> None:
    plan = planned(tight)
    with pytest.raises(OptionError, match="computes on a device, the command on the host. Give --device-memory"):
        checked(plan, replace(tight, device_bytes=0))
    with pytest.raises(OptionError, match="host_states names 'model.layers.9"):
        checked(replace(plan, host_states=frozenset({"model.layers.9"})), tight)
    with pytest.raises(BudgetError, match=r"of the device's memory, more than the .* allowed: .* for what streams"):
        checked(replace(plan, arena_bytes=plan.arena_bytes + (1 << 30)), tight)
    with pytest.raises(OptionError, match="host_updates names 'model.layers.9"):
        checked(plan_with(plan, frozenset({"model.layers.9"})), tight)
    away = next(name for name, _ in task(tight).model.named_parameters() if plan.home_of_state(name) == "disk")
    with pytest.raises(OptionError, match=f"host_updates names '{away}', whose state lives on the disk"):
        checked(plan_with(plan, frozenset({away})), tight)
    with pytest.raises(OptionError, match="no device computes"):
        checked(replace(plan, device_bytes=0), replace(tight, device_bytes=0))
    with pytest.raises(OptionError, match="--keeper holds what is in the host's memory"):
        planned(replace(tight, keeper=True))


# -- machines -----------------------------------------------------------------------------------------------------------


def test_what_comes_to_a_device_passes_its_link_and_what_all_of_them_share() -> None:
    alone, eight = ways_of(NODE), ways_of(NODE, 8)
    link, disk, limit = NODE.link("host", "device"), NODE.link("disk", "host"), NODE.limit("pcie")
    assert (alone["host"].read, eight["host"].read) == (link.bytes_per_second, limit / 8)
    assert eight["host"].both == limit / 8
    assert eight["disk"].read == disk.bytes_per_second / 8
    slower = slow(NODE)
    assert ways_of(slower)["disk"].read == ways_of(slower)["host"].read == 1e9  # the slower of both ways
    assert ways_of(NODE.hosted).keys() == {"disk"} and NODE.hosted.compute.tier == "host"


def _slowed(link: Link, rate: float) -> Link:
    return replace(link, bytes_per_second=rate) if "device" in (link.source, link.target) else link


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=True, layers=2, hidden=512).save_pretrained(folder)
    return str(folder)


def test_a_described_device_computes_unless_it_may_use_nothing(model: str) -> None:
    """With its own rates, and as much of its memory as it has."""
    asked = {"machine": "h200", "memory": "8GiB", "sequence_length": 1024, "batch_size": 16}
    device, host = (outsize.plan(model, device_memory=size, **asked) for size in (None, 0))
    assert device.device_bytes == find_machine("h200").capacity("device") and host.device_bytes == 0
    assert device.predicted is not None and host.predicted is not None
    assert device.predicted.device_peak_bytes > CONTEXT and host.predicted.device_peak_bytes == 0
    assert (device.predicted.tokens_per_second or 0) > 5 * (host.predicted.tokens_per_second or 0)
    assert dict(host.predicted.memory).keys() >= {"tensors of a step"}


def test_devices_of_a_node_share_its_memory(model: str) -> None:
    alone, eight = (outsize.plan(model, machine=NODE, workers=n, batch_size=8).memory_bytes for n in (1, 8))
    assert alone is not None and eight == alone // 8 <= NODE.capacity("host") // 8
    with pytest.raises(BudgetError, match=r"8 x 300.00 GiB are more than the 2.00 TiB of memory .* Give --memory"):
        outsize.plan(model, machine=NODE, workers=8, batch_size=8, memory="300GiB")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--machine", "h200", "--device-memory", "20XB"], "cannot read '20XB' as a size"),
        (["--machine", "h200", "--device-memory", "200GB"], "less than --device-memory 186.26 GiB"),
        (["--machine", "laptop", "--memory", "3GiB", "--device-memory", "20GB"], "has none. Leave it out"),
        (["--machine", "laptop"], "Give --memory, such as 3GiB"),
        (["--machine", "h200", "--task", "serve", "--device-memory", "1GB"], "is for training"),
    ],
)
def test_an_impossible_device_is_refused_by_name(model: str, options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", model, *options])
    assert isinstance(done.exception, OptionError) and said in str(done.exception)


def test_a_plan_of_a_device_is_saved_and_comes_back(model: str, tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["plan", "--model", model, "--machine", "rtx-4090", "--save", str(kept)])
    assert done.exit_code == 0, done.output
    plan = Plan.from_json(kept.read_text())
    assert str(plan) == done.stdout.strip() and plan.device_bytes == CARD.capacity("device")
