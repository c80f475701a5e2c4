"""Several workers train like one: real processes over Gloo, compared number for number and byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exactness import make_model
from worker_child import batches_of, in_line, optimizer, plan_of
from workers import Case, Crew, Found

from outsize.distributed.ahead import Ahead
from outsize.distributed.arrangement import CLOSE, PEER, REMOTE, WIRE
from outsize.distributed.wire import Link
from outsize.machine.find import find_machine
from outsize.memory.block import ALIGNMENT
from outsize.memory.tier import PAGE
from outsize.model.units import find_units
from outsize.planner.clock import ways_of
from outsize.planner.play import play
from outsize.planner.prices import RatedPrices
from outsize.planner.rehearsal import Rehearsal, homes, rehearse
from outsize.planner.script import Event, Exchanged, Touched
from outsize.train.job import always_near

LAPTOP = find_machine("laptop")
LATENCY = 1e-3
WIRED = {CLOSE: Link(1e10, LATENCY), PEER: Link(1e9, LATENCY), REMOTE: Link(1e7, LATENCY)}


def assert_same(found: Found, expected: Found, rounds: bool = False) -> None:
    """The same bits; of losses over blocks of the vocabulary, each worker's part of which is divided before they are added,
    as many roundings as there are parts."""
    slack = len(found.ledgers) * torch.finfo(torch.float32).eps if rounds else 0
    assert found.losses == pytest.approx(expected.losses, rel=slack, abs=0)
    assert found.norms == expected.norms
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


@pytest.mark.parametrize(
    "case",
    [
        Case(workers=2, sequences=2),
        Case(workers=4, sequences=4, zero=2, placement="mixed"),
        Case(workers=2, sequences=2, precision="mixed", table_rows=40, family="qwen3"),
        Case(workers=2, sequences=2, optimizer="muon", placement="near"),
        Case(workers=3, sequences=3, family="handwritten", optimizer="sgd"),
        Case(workers=2, nodes=2, sequences=2),
    ],
    ids=str,
)
def test_workers_with_a_micro_batch_each_give_the_bits_of_one_with_all_of_them(
    gang: Crew, tmp_path: Path, case: Case
) -> None:
    """Sums of gradients are taken in the order of the workers, as one worker takes them in the order of micro-batches."""
    expected = gang.run(replace(case, workers=1), tmp_path / "one")
    assert_same(gang.run(case, tmp_path / "many"), expected, rounds=case.table_rows is not None)


@pytest.mark.parametrize("case", [Case(clip=0.1), Case(workers=4, tied=True, table_rows=40)], ids=str)
def test_zero_1_2_and_3_and_a_second_run_give_the_same_bits(gang: Crew, tmp_path: Path, case: Case) -> None:
    found = gang.run(case, tmp_path / "3")
    assert_same(gang.run(case, tmp_path / "again"), found)
    for zero in (1, 2):
        assert_same(gang.run(replace(case, zero=zero), tmp_path / f"{zero}"), found)


@pytest.mark.parametrize(
    "case",
    [
        Case(workers=4, tied=True, table_rows=40),
        Case(workers=3, sequences=5, batch=2, clip=0.5),
        Case(batch=2, tied=True),
        Case(workers=4, nodes=2, copies=2),
        Case(workers=4, close=2, copies=2),
    ],
    ids=str,
)
def test_other_micro_batches_and_tied_tables_differ_by_the_order_of_sums_alone(
    gang: Crew, tmp_path: Path, case: Case
) -> None:
    """Gradient descent, so that a weight differs by the learning rate times what its gradients do. These are sums of no more
    than `terms` products in either order; Higham (Accuracy and Stability, 2002, (3.5)) bounds their difference."""
    case = replace(case, optimizer="sgd", steps=1)
    one, many = gang.run(replace(case, workers=1), tmp_path / "one"), gang.run(case, tmp_path / "many")
    terms, eps = 16 * case.sequences, torch.finfo(torch.float32).eps
    assert many.losses == pytest.approx(one.losses, rel=2 * terms * eps)
    for name, weight in one.weights.items():
        torch.testing.assert_close(many.weights[name], weight, rtol=2 * terms * eps, atol=2 * terms * eps)


def moved(found: Found, rank: int, kind: str, tier: str = "peer") -> tuple[int, int]:
    """Bytes sent and received over the wire."""
    counts = found.ledgers[rank]["moved"]
    return counts.get(("host", tier, kind), 0), counts.get((tier, "host", kind), 0)


@pytest.mark.parametrize(("workers", "zero"), [(2, 1), (2, 3), (4, 2), (4, 3)])
def test_bytes_on_the_wire_are_those_of_the_zero_paper(gang: Crew, tmp_path: Path, workers: int, zero: int) -> None:
    """Every weight has a multiple of 64 * workers elements here, so that all shares are equal."""
    case = Case(workers, zero, hidden=256, steps=2, sequences=workers, precision="mixed", split=0)
    found = gang.run(case, tmp_path / "run")
    whole = sum(weight.nbytes for weight in found.weights.values())
    gathered = whole if zero < 3 else 2 * whole - found.weights["model.embed_tokens.weight"].nbytes
    for rank in range(workers):  # an embedding is not read again in backward
        assert moved(found, rank, "weight") == (gathered * (workers - 1) // workers * case.steps,) * 2
        assert moved(found, rank, "gradient") == (whole * (workers - 1) // workers * case.steps,) * 2
        numbers = 2 * 8 + 8  # tokens learnt and read, and the loss
        assert moved(found, rank, "number") == (numbers * (workers - 1) * case.steps,) * 2


ON_NODES = Case(workers=4, nodes=2, hidden=256, steps=2, sequences=4, precision="mixed", split=0)


@pytest.mark.parametrize("copies", [1, 2])
def test_only_added_gradients_and_updated_weights_cross_the_slow_link(gang: Crew, tmp_path: Path, copies: int) -> None:
    """Where each node has a copy of the weights, a lease gathers within the node. With N nodes of H workers each receives
    from other nodes (N-1)/N of a part of 1/H: of the gradients, added up in fp32 by then, and of the weights, after their
    update; where no node has a copy, of the weights at each lease instead."""
    case, half = replace(ON_NODES, copies=copies), 2
    found = gang.run(case, tmp_path / "run")
    whole = sum(weight.nbytes for weight in found.weights.values())
    leased = 2 * whole - found.weights["model.embed_tokens.weight"].nbytes  # which is not read again in backward
    for rank in range(case.workers):
        assert moved(found, rank, "weight") == (case.steps * leased // half,) * 2
        assert moved(found, rank, "gradient") == (case.steps * whole // half,) * 2
        assert moved(found, rank, "weight", "remote") == (case.steps * (leased if copies == 1 else whole) // 4,) * 2
        assert moved(found, rank, "gradient", "remote") == (case.steps * 2 * whole // 4,) * 2
    held = {kind: nbytes for (tier, kind), nbytes in found.ledgers[0]["held"].items() if tier == "disk"}
    rounding = 2 * (PAGE + 3 * ALIGNMENT) * len(found.weights)
    assert 2 * whole * copies // 4 <= held["weight"] <= 2 * whole * copies // 4 + rounding


def test_copies_of_weights_on_each_node_do_not_show_in_the_numbers(gang: Crew, tmp_path: Path) -> None:
    found = gang.run(replace(ON_NODES, copies=2), tmp_path / "copies")
    assert_same(gang.run(replace(ON_NODES, copies=1), tmp_path / "shares"), found)
    assert_same(gang.run(replace(ON_NODES, zero=2), tmp_path / "whole"), found)


ON_PAIRS = Case(workers=8, nodes=2, close=2, hidden=512, steps=2, sequences=8, precision="mixed", split=0)


@pytest.mark.parametrize("copies", [1, 4])
def test_the_faster_a_link_the_more_crosses_it(gang: Crew, tmp_path: Path, copies: int) -> None:
    """Two nodes of two pairs: at each level half of what a worker has at the one before is exchanged. Gradients are added up
    in fp32 after the first; weights are leased within a pair where each has a copy, and cross the others after the update."""
    found = gang.run(replace(ON_PAIRS, copies=copies), tmp_path / "run")
    whole = sum(weight.nbytes for weight in found.weights.values())
    leased = 2 * whole - found.weights["model.embed_tokens.weight"].nbytes
    for rank in range(ON_PAIRS.workers):
        for level, (tier, width) in enumerate({"close": 1, "peer": 2, "remote": 2}.items()):
            part, weights = 2 ** (level + 1), leased if tier == "close" or copies == 1 else whole
            assert moved(found, rank, "weight", tier) == (ON_PAIRS.steps * weights // part,) * 2
            assert moved(found, rank, "gradient", tier) == (ON_PAIRS.steps * width * whole // part,) * 2


@pytest.mark.parametrize(
    "case",
    [
        Case(workers=2, sequences=2, ahead=40_000),
        Case(clip=0.1, ahead=1 << 30),
        replace(ON_NODES, ahead=1 << 30),
        Case(workers=4, legs=(2, 2), steps=2, ahead=1 << 30),
    ],
    ids=str,
)
def test_what_is_gathered_ahead_shows_neither_in_the_numbers_nor_on_the_wire(
    gang: Crew, tmp_path: Path, case: Case
) -> None:
    found, expected = gang.run(case, tmp_path / "ahead"), gang.run(replace(case, ahead=0), tmp_path / "none")
    assert_same(found, expected)
    assert [on_wire(ledger["moved"]) for ledger in found.ledgers] == [on_wire(one["moved"]) for one in expected.ledgers]


@pytest.mark.parametrize(
    "case",
    [
        Case(clip=0.1, ahead=40_000),
        Case(sequences=2, precision="mixed", activations="keep"),
        Case(workers=4, legs=(1, 1, 1, 1), steps=2),
        Case(legs=(1, 1, 1, 1), legs_shape="v", schedule="zero-bubble", steps=2, activations="keep"),
    ],
    ids=str,
)
def test_layers_that_are_leased_by_parts_give_the_same_bits(gang: Crew, tmp_path: Path, case: Case) -> None:
    found = gang.run(replace(case, by_parts=True), tmp_path / "parts")
    assert_same(found, gang.run(case, tmp_path / "whole"))


def test_what_a_step_that_failed_has_gathered_ahead_is_let_go(gang: Crew, tmp_path: Path) -> None:
    """And nothing is learnt from it: the next one is as if it had not been."""
    case = Case(workers=2, sequences=2, ahead=1 << 30)
    found = gang.run(replace(case, fails=1), tmp_path / "failing")
    assert_same(found, gang.run(replace(case, ahead=0), tmp_path / "none"))


def test_who_leaves_does_not_wait_for_what_others_never_begin(gang: Crew, tmp_path: Path) -> None:
    gang.call("leave", 2, tmp_path, {})


def test_nodes_on_one_machine_know_that_they_share_it(gang: Crew, tmp_path: Path) -> None:
    gang.call("crowd", 2, tmp_path, {"nodes": 2})


UNEVEN = [
    Case(parts=(3, 1), hidden=256, split=0, precision="mixed"),
    Case(workers=4, nodes=2, copies=2, parts=(1, 5, 2, 4), table_rows=40, placement="mixed"),
    Case(workers=3, zero=2, parts=(1, 40, 1), optimizer="muon"),
]


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_shares_of_any_size_do_not_show_in_the_numbers(gang: Crew, tmp_path: Path, case: Case) -> None:
    found = gang.run(case, tmp_path / "uneven")
    assert_same(found, gang.run(replace(case, parts=()), tmp_path / "even"))
    held = [sum(of_rank["held"].get(("disk", kind), 0) for kind in ("master", "moment")) for of_rank in found.ledgers]
    if case is UNEVEN[0]:  # every block has a multiple of 64 * 4 elements: to a page or two each
        assert held[0] == pytest.approx(3 * held[1], abs=8 * PAGE * len(found.weights))
    assert held[case.parts.index(max(case.parts))] == max(held)


@pytest.mark.parametrize(
    "case",
    [
        *UNEVEN,
        ON_NODES,
        replace(ON_NODES, copies=2),
        Case(workers=2, zero=1, clip=0.5, precision="mixed"),
        Case(workers=3, sequences=5, batch=2, table_rows=40),
        Case(workers=4, nodes=2, zero=2, optimizer="muon"),
        Case(workers=3, sequences=4, precision="mixed"),
        Case(legs=(1, 3), tied=True, table_rows=40, precision="mixed"),
        Case(workers=4, legs=(2, 2), nodes=2),
        Case(workers=2, sequences=2, ahead=40_000),
        Case(workers=2, sequences=2, ahead=40_000, by_parts=True),
        replace(ON_NODES, ahead=1 << 30),
        replace(ON_PAIRS, copies=2),
        Case(legs=(1, 1, 1, 1), schedule="interleaved", steps=2, tied=True, table_rows=40),
        Case(legs=(1, 1, 1, 1), legs_shape="v", schedule="v", steps=2, tied=True, table_rows=40),
        Case(legs=(1, 1, 1, 1), legs_shape="v", schedule="zero-bubble", steps=2, activations="keep"),
    ],
    ids=str,
)
def test_what_is_planned_for_the_wire_is_what_crosses_it(gang: Crew, tmp_path: Path, case: Case) -> None:
    found = gang.run(case, tmp_path / "run")
    for rank in range(case.workers) if case.parts or case.legs else (0,):
        assert_planned_wire(case, rank, found.ledgers[rank]["moved"])


def assert_planned_wire(case: Case, rank: int, moved: Mapping[tuple[str, str, str], int]) -> None:
    model = make_model(case.family, case.tied, hidden=case.hidden)
    plan = replace(plan_of(model, case), rank=rank)
    if case.legs:
        plan = in_line(model, plan, rank)
    batches = list(batches_of(case, rank))
    rehearsed = rehearse(
        model, plan, optimizer(case.optimizer), RatedPrices(LAPTOP), batches[0], torch.float32, None, WIRED
    )
    home_of = homes(plan, always_near(find_units(model)))
    played = play(rehearsed.whole, plan.arena_bytes, home_of, ways_of(LAPTOP), case.steps)
    alike = {way: case.steps * nbytes for way, nbytes in on_wire(played.steps[-1].moved).items()}
    assert alike == on_wire(moved)
    step, script = played.steps[-1], rehearsed.whole.steps[-1]
    exchanges = [event for event in script if isinstance(event, Exchanged)]
    wired = sum(WIRED[e.tier].seconds(e.sent, e.received) for e in exchanges)
    if case.ahead:  # what is on the wire may wait for more
        assert any(event.ahead for event in exchanges)
        assert step.lanes["wire"] < wired <= (1 + 1e-9) * (step.lanes["wire"] + step.lanes["exchange"])
    else:
        assert step.lanes["wire"] == pytest.approx(wired)
    assert step.seconds >= (1 - 1e-9) * sum(step.lanes[lane] for lane in ("compute", "update", "wire"))


@pytest.mark.parametrize(
    "case",
    [
        Case(sequences=2, ahead=40_000, layers=8),
        Case(workers=4, nodes=2, copies=2, ahead=1 << 30, clip=0.1),
    ],
    ids=str,
)
def test_a_script_of_what_is_gathered_ahead_is_what_a_store_is_asked(case: Case) -> None:
    """Of a few units that stand for all, too."""
    model = make_model(case.family, case.tied, case.layers, case.hidden)
    given = (plan_of(model, case), optimizer(case.optimizer), RatedPrices(LAPTOP))
    batches = next(batches_of(case, 0))
    expected = rehearse(model, *given, batches, torch.float32).whole
    rehearsal = Rehearsal(model, *given, torch.float32)
    rehearsal.scribe._ahead = Ahead(case.ahead, lambda name: rehearsal.scribe.entries[name].block.nbytes)
    steps = [step for _ in range(3) for step in rehearsal.run(batches).steps]
    assert touched(steps[-1]) == touched(expected.steps[-1]) == touched(steps[-2])
    first = [name for what, name in touched(expected.steps[0]) if what == "fresh"]
    assert sorted(first) == sorted(name for what, name in touched(steps[-1]) if what == "fresh") and first


def touched(step: Iterable[Event]) -> list[tuple[str, str]]:
    return [(event.what, event.name) for event in step if isinstance(event, Touched)]


def on_wire(moved: Mapping[tuple[str, str, str], int]) -> dict[tuple[str, str, str], int]:
    return {key: nbytes for key, nbytes in moved.items() if nbytes and {*WIRE} & {*key}}


@pytest.mark.parametrize("workers", [2, 4])
def test_state_is_there_once_in_all_workers_together(gang: Crew, tmp_path: Path, workers: int) -> None:
    case = Case(workers, hidden=256, steps=2, sequences=workers, precision="mixed", split=0)
    many, one = gang.run(case, tmp_path / "many"), gang.run(replace(case, workers=1), tmp_path / "one")
    rounding = 2 * (PAGE + 3 * ALIGNMENT) * len(one.weights)  # two extents of whole pages for each block
    for kind in ("weight", "master", "moment"):
        share = one.ledgers[0]["held"]["disk", kind] / workers
        for ledger in many.ledgers:
            assert share - rounding <= ledger["held"]["disk", kind] <= share + rounding
