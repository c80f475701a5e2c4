"""Plans of several workers on described machines: what crosses which link, how long that takes, and where weights lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import tiny_model
from transformers import AutoModelForCausalLM

import outsize
from outsize.asked import PipelineRequest, Request
from outsize.distributed.arrangement import Arrangement
from outsize.distributed.group import Several
from outsize.errors import BudgetError, OptionError
from outsize.machine.file import read_machine, write_machine
from outsize.machine.find import find_machine
from outsize.machine.machine import Close, Link, Machine, Nodes, Unlike, steady
from outsize.memory.tier import pages
from outsize.model.units import find_units
from outsize.plan import Plan
from outsize.planner.cluster import wire_of
from outsize.planner.pipeline import _Line, fullest, lines_of, plan_line
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import Rehearsal
from outsize.planner.task import Task, sample_batches
from outsize.planner.training import Place
from outsize.planner.workers import Worker, plan_workers
from outsize.train.optimizers import uniform_rule
from outsize.train.recipe import rule_of

LAPTOP = find_machine("laptop")
RULE = uniform_rule(torch.optim.AdamW, {"lr": 1e-3})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tied=True, layers=8, hidden=512).save_pretrained(folder)
    return str(folder)


def cluster(bytes_per_second: float, nodes: int = 2) -> Machine:
    return replace(LAPTOP, nodes=Nodes(nodes, bytes_per_second, 1e-4), links=(*LAPTOP.links, Link("host", "host", 5e9)))


def planned(model: str, machine: Machine, workers: int | None, zero: int = 3) -> Plan:
    memory = "8GiB"
    return outsize.plan(
        model, memory=memory, machine=machine, workers=workers, zero=zero, sequence_length=32, accumulate=4
    )


def received(plan: Plan, tier: str) -> int:
    assert plan.predicted is not None
    return sum(nbytes for source, _, _, nbytes in plan.predicted.moved if source == tier)


def test_a_slow_link_is_waited_for_and_each_node_gets_a_copy_of_the_weights(model: str) -> None:
    slow, fast = planned(model, cluster(1e8), 4), planned(model, cluster(1e11), 4)
    assert (slow.workers, slow.nodes, slow.weight_copies) == (4, 2, 2)
    assert slow.predicted is not None and fast.predicted is not None
    assert slow.predicted.wire_bytes == received(slow, "peer") + received(slow, "remote")
    least = received(slow, "remote") / (1e8 / 2)  # which the two workers of a node share
    assert slow.predicted.wire_wait_seconds is not None and slow.predicted.wire_wait_seconds >= least
    assert slow.predicted.seconds_per_step is not None and fast.predicted.wire_wait_seconds is not None
    assert slow.predicted.seconds_per_step >= slow.predicted.wire_wait_seconds > fast.predicted.wire_wait_seconds
    flat = planned(model, cluster(1e8, nodes=4), 4)
    assert received(flat, "peer") == 0 and received(flat, "remote") > 2 * received(slow, "remote")
    assert "each of 2 nodes has a copy" in str(slow) and "95.37 MiB/s" not in str(slow)
    assert "exchanging with other workers" in str(slow)


def test_pairs_have_links_of_their_own(model: str, tmp_path: Path) -> None:
    """Of weights each pair has a copy: leases gather over its links alone."""
    machine = replace(cluster(1e8), close=Close(2, 50e9, 1e-6))
    plan = outsize.plan(model, memory="8GiB", machine=machine, workers=8, sequence_length=32, accumulate=8)
    assert (plan.nodes, plan.close, plan.weight_copies) == (2, 2, 4)
    assert received(plan, "close") > received(plan, "peer") > received(plan, "remote") > 0
    assert "each of 4 groups of 2 workers has a copy" in str(plan)
    assert "46.57 GiB/s and 1 us to the workers that are close" in str(plan)
    served = outsize.plan(model, memory="8GiB", task="serve", machine=machine, workers=2, context=64)
    assert served.served is not None
    assert replace(find_machine("h200"), close=machine.close).hosted.close == Close(), "of devices"
    with pytest.raises(OptionError, match="plan of train has no option 'close'"):
        outsize.plan(model, memory="8GiB", close=2)
    odd = outsize.plan(model, memory="8GiB", machine=machine, workers=6, sequence_length=32, accumulate=8)
    assert odd.close == 1 and received(odd, "close") == 0
    write_machine(machine, tmp_path / "pairs.toml")
    assert read_machine(tmp_path / "pairs.toml") == machine


def test_a_cluster_has_a_worker_on_each_node_and_one_machine_a_single_one(model: str) -> None:
    assert planned(model, cluster(1e9, nodes=3), None).workers == 3
    alone = planned(model, LAPTOP, None)
    assert (alone.workers, alone.predicted.wire_bytes if alone.predicted else None) == (1, 0)
    assert "other workers" not in str(alone)


def test_what_cannot_be_divided_is_refused(model: str) -> None:
    for copies in (3, 4):
        with pytest.raises(OptionError, match=f"4 workers on 2 nodes cannot have {copies} copies"):
            Arrangement.of(0, 4, 2).stage_of(copies)
    with pytest.raises(OptionError, match="4 workers of a node cannot be groups of 3 that are close"):
        Arrangement.of(0, 8, 2, 3)
    with pytest.raises(OptionError, match="3 workers cannot be equally many on each of 2 nodes"):
        planned(model, cluster(1e9), 3)
    with pytest.raises(OptionError, match="A step of 4 sequences leaves nothing to do for some of 8 workers"):
        planned(model, cluster(1e9), 8)


def unlike(model: str, *budgets: int, disks: tuple[int, ...] = (), zero: int = 3) -> list[Plan]:
    """Plans of workers on a node each, whose arithmetic is free, so that what is read and written counts alone."""
    machine = cluster(1e11, nodes=len(budgets))
    fast = replace(
        machine.processors[0], matmul=(("bf16", steady(1e18)), ("fp32", steady(1e18))), elementwise=steady(1e18)
    )
    fast = replace(fast, update=1e18, copy=1e18, operation_seconds=0.0)
    machine = replace(machine, processors=(fast,))
    request = Request(0, sequence_length=32, accumulate=len(budgets), zero=zero)
    request = request.divided((1,) * len(budgets), len(budgets))
    module = AutoModelForCausalLM.from_pretrained(model)
    place = Place(machine, 200 << 20, 1 << 40, wire_of(machine, 1))
    task = Task(module, find_units(module), rule_of("adamw", {}), request)
    spaces = disks or (1 << 40,) * len(budgets)
    workers = [Worker(budget, place.beside(machine, disk)) for budget, disk in zip(budgets, spaces, strict=True)]
    return plan_workers(task, workers)


def states(plan: Plan) -> int:
    """Bytes of one extent of all there is, about."""
    assert plan.predicted is not None
    return plan.predicted.disk_bytes // 2


def test_workers_with_less_memory_have_smaller_shares_and_plans_of_their_own(model: str) -> None:
    large, small = 420 << 20, 360 << 20
    plans = unlike(model, large, small, large)
    assert [plan.rank for plan in plans] == [0, 1, 2] and len({plan.alike for plan in plans}) == 1
    first, second, third = plans[0].shares
    assert first == third > second
    assert states(plans[0]) > states(plans[1])
    for plan, budget in zip(plans, (large, small, large), strict=True):
        assert plan.predicted is not None and plan.predicted.host_peak_bytes <= budget == plan.memory_bytes
        assert f"worker 1 {second / sum(plan.shares):.1%} of what is divided" in " ".join(str(plan).split())
    even = unlike(model, small, small, small)
    assert {plan.shares for plan in even} == {()}
    slowest = [max(plan.predicted.seconds_per_step or 0 for plan in found if plan.predicted) for found in (plans, even)]
    assert slowest[0] < slowest[1]


def test_a_small_disk_has_what_it_holds_and_workers_alike_have_equal_shares(model: str) -> None:
    whole = states(unlike(model, 1 << 30, 1 << 30)[0])
    plans = unlike(model, 1 << 30, 1 << 30, disks=(1 << 40, int(1.5 * whole)))
    assert plans[0].shares[0] > plans[0].shares[1]
    assert plans[1].predicted is not None and plans[1].predicted.disk_bytes <= int(1.5 * whole)
    with pytest.raises(BudgetError, match="Worker 1: The state needs"):
        unlike(model, 1 << 30, 1 << 30, disks=(1 << 40, 1 << 20))
    with pytest.raises(BudgetError, match="Worker 1: A budget of 100.00 MiB is too small"):
        unlike(model, 1 << 30, 100 << 20)


def test_unlike_nodes_of_a_described_cluster_have_shares_of_their_own(model: str, tmp_path: Path) -> None:
    even = planned(model, cluster(1e9), None)
    assert even.predicted is not None
    small = Unlike(disk=int(0.75 * even.predicted.disk_bytes), host=4 << 30)
    machine = replace(cluster(1e9), unlike=(small,))
    write_machine(machine, tmp_path / "cluster.toml")
    assert read_machine(tmp_path / "cluster.toml") == machine
    found = outsize.plan(model, memory="8GiB", machine=tmp_path / "cluster.toml", sequence_length=32, accumulate=4)
    assert found.shares[0] > found.shares[1]
    told = " ".join(str(found).split())
    assert "worker 0 " in told and "of 8.00 GiB memory" in told
    assert (
        f"worker 1 {found.shares[1] / sum(found.shares):.1%} of what is divided" in told
        and "of 4.00 GiB memory" in told
    )


def test_a_pipeline_is_planned_for_workers_who_are_not_there(model: str) -> None:
    """What each has, holds and takes; and what goes over the wire: hidden states, and the gradient of a tied table."""
    asked = {"machine": cluster(1e9), "workers": 2, "sequence_length": 32, "accumulate": 4}
    plan = outsize.plan(model, memory="8GiB", pipeline=True, legs=2, **asked)
    assert len(plan.legs) == plan.workers == plan.nodes == 2 and sum(plan.legs) == 8 and plan.predicted is not None
    table = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    moved = {(source, kind): count for source, _, kind, count in plan.predicted.moved}
    assert moved["remote", "activation"] == 4 * 32 * 512 * 2
    assert moved["remote", "gradient"] == 4 * table.numel()
    said, first = " ".join(str(plan).split()), plan.legs[0]
    assert f"worker {plan.rank} of 2 peaks at" in said
    assert f"worker 0 model.embed_tokens, model.layers.0 to model.layers.{first - 1}, lm_head; peaks at" in said
    assert f"worker 1 model.embed_tokens, model.layers.{first} to model.layers.7, model.norm, lm_head; peaks at" in said
    assert 20 <= bubble_of(plan) < 40  # of equal legs a fifth: each passes a micro-batch four times and waits for one
    laps = outsize.plan(model, memory="8GiB", pipeline=True, legs=4, legs_shape="loop", **asked)
    assert len(laps.legs) == 4 and sum(laps.legs) == 8 and laps.schedule == "interleaved" and laps.predicted is not None
    moved = {(source, kind): count for source, _, kind, count in laps.predicted.moved}
    assert moved["remote", "activation"] == 3 * 4 * 32 * 512 * 2
    assert 11 <= bubble_of(laps) < bubble_of(plan)  # of equal legs a ninth
    assert "and model.layers." in " ".join(str(laps).split())
    vee = outsize.plan(model, memory="8GiB", pipeline=True, legs_shape="v", zero_bubble=False, **asked)
    assert len(vee.legs) == 4 and sum(vee.legs) == 8 and vee.schedule == "v" and vee.predicted is not None
    moved = {(source, kind): count for source, _, kind, count in vee.predicted.moved}
    assert moved["remote", "activation"] == 2 * 4 * 32 * 512 * 2 and ("remote", "gradient") not in moved
    said, first = " ".join(str(vee).split()), vee.legs[0]
    assert f"worker 0 model.embed_tokens, model.layers.0 to model.layers.{first - 1} and model.layers." in said
    assert "to model.layers.7, model.norm, lm_head; peaks at" in said and said.count("model.embed_tokens") == 1


def bubble_of(plan: Plan) -> int:
    """Percent."""
    return int(" ".join(str(plan).split()).partition("workers wait ")[2].partition("%")[0])


def test_legs_and_workers_must_divide_each_other_and_the_step() -> None:
    for legs, workers, nodes in (((4, 4), 3, 1), ((4, 4), 6, 1)):
        with pytest.raises(OptionError, match=f"{workers} workers cannot be equally many for each of 2 legs"):
            Request(0, accumulate=4).in_line(legs, workers, nodes)
    with pytest.raises(OptionError, match="3 workers of a leg cannot be alike on 3 nodes of 2 workers"):
        Arrangement.of(0, 6, 3).among(3)


def test_few_micro_batches_wait_for_each_lap(model: str) -> None:
    """In each lap the first has to come round; as many as there are workers fill it."""
    plan = outsize.plan(model, memory="8GiB", machine=LAPTOP, sequence_length=32)
    assert plan.predicted is not None
    own = replace(plan, predicted=replace(plan.predicted, seconds_per_step=4.0))

    def seconds(laps: int, micro_batches: int) -> float:
        schedule = "interleaved" if laps > 1 else "1f1b"
        found = (replace(own, accumulate=micro_batches, schedule=schedule),) * 4
        return _Line((1,) * 4 * laps, 1, (1,) * 4, found, ("",) * 4).seconds

    assert seconds(4, 1) == pytest.approx(16)  # one after the other
    assert seconds(2, 2) == pytest.approx(9)
    assert seconds(1, 4) == pytest.approx(4 + 3) and seconds(2, 4) == pytest.approx(4 + 3 / 2)


def test_layers_go_to_workers_who_have_room_for_them(model: str) -> None:
    """Whose memory is too small for an even leg has a smaller one; for whom none is small enough is named."""
    module = AutoModelForCausalLM.from_pretrained(model)
    place = Place(cluster(1e9), 200 << 20, 1 << 40, wire_of(cluster(1e9), 1))
    request = Request(0, sequence_length=1024, accumulate=2, activations="keep").in_line((4, 4), 2, 2)
    task = Task(module, find_units(module), rule_of("adamw", {}), request)
    with pytest.raises(BudgetError, match="Worker 0: A budget of 100.00 MiB is too small") as refused:
        plan_line([task], [Worker(100 << 20, place), Worker(8 << 30, place)], settled=True)
    assert refused.value.least is not None
    tight = refused.value.least - (24 << 20)  # a layer keeps more than that
    plans = plan_line([task], [Worker(tight, place), Worker(8 << 30, place)])
    assert plans[0].legs[0] < 4 and sum(plans[0].legs) == 8 and len({plan.alike for plan in plans}) == 1
    assert [plan.memory_bytes for plan in plans] == [tight, 8 << 30] and fullest(plans).rank == 0
    assert all(plan.predicted is not None and plan.predicted.host_peak_bytes <= plan.memory_bytes for plan in plans)


@pytest.mark.parametrize("link", [1e9, 1e7])
def test_the_fastest_pipeline_is_chosen(link: float) -> None:
    """As planning for each of them alone finds."""
    machine, module = cluster(link), tiny_model("llama", tied=True, layers=4, hidden=256)
    place = Place(machine, 200 << 20, 1 << 40, wire_of(machine, 1))
    request = Request(0, sequence_length=64, accumulate=2, activations="keep")
    task = Task(module, find_units(module), rule_of("adamw", {}), request, source_dtype=torch.float32)
    lines, workers = lines_of(task, 2, 2, PipelineRequest()), [Worker(8 << 30, place)] * 2
    assert [line.request.schedule for line in lines] == ["1f1b", "interleaved", "v", "zero-bubble"]
    found, *alone = (plan_line(tried, workers, settled=True)[0] for tried in (lines, *([line] for line in lines)))
    seconds = {plan.schedule: plan.predicted.seconds_per_step for plan in alone if plan.predicted is not None}
    assert seconds[found.schedule] == min(seconds.values())
    assert any(reason.startswith(f"schedule: {found.schedule};") for reason in found.reasons)


@pytest.mark.parametrize(
    "asked",
    [
        Request(0, workers=2, precision="mixed"),
        Request(0, workers=4, nodes=2, precision="mixed", clip=1.0),
        Request(0, workers=8, nodes=2, close=2, accumulate=2),
        Request(0, workers=3, zero=1, precision="mixed", clip=1.0),
        Request(0, workers=3, rank=1, precision="mixed", shares=(1, 4, 1)),
    ],
    ids=lambda asked: f"{asked.workers} on {asked.nodes}, rank {asked.rank}, zero {asked.zero}, clip {asked.clip}",
)
def test_what_comes_of_gradients_takes_as_much_as_foretold(asked: Request) -> None:
    """Here of four layers; with a head in blocks, whose gradients are in fp32."""
    asked = replace(asked, batch_size=1, sequence_length=32)
    made = tiny_model("llama", tied=True, layers=4, hidden=256)
    job = Task(made, find_units(made), RULE, asked).job
    plan = job.plan(asked, ())
    batches = sample_batches(made, asked)
    rehearsal = Rehearsal(made, plan, RULE, RatedPrices(LAPTOP), torch.bfloat16)
    rehearsal.run(batches)
    foretold, group = max(size.exchanged for size in job.sizes.values()), rehearsal.job.updater.group
    assert isinstance(group, Several) and group._scratch.numel() == pages(foretold) > 0
