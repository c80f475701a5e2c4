"""Several workers train like one: real processes over Gloo, compared number for number and byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workers import Case, Crew, Found, crew

from outsize.memory.block import ALIGNMENT
from outsize.memory.tier import PAGE


@pytest.fixture(scope="module")
def gang() -> Iterator[Crew]:
    with crew() as made:
        yield made


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


def moved(found: Found, rank: int, kind: str) -> tuple[int, int]:
    """Bytes sent and received over the wire."""
    counts = found.ledgers[rank]["moved"]
    return counts.get(("host", "peer", kind), 0), counts.get(("peer", "host", kind), 0)


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


@pytest.mark.parametrize("workers", [2, 4])
def test_state_is_there_once_in_all_workers_together(gang: Crew, tmp_path: Path, workers: int) -> None:
    case = Case(workers, hidden=256, steps=2, sequences=workers, precision="mixed", split=0)
    many, one = gang.run(case, tmp_path / "many"), gang.run(replace(case, workers=1), tmp_path / "one")
    rounding = 2 * (PAGE + 3 * ALIGNMENT) * len(one.weights)  # two extents of whole pages for each block
    for kind in ("weight", "master", "moment"):
        share = one.ledgers[0]["held"]["disk", kind] / workers
        for ledger in many.ledgers:
            assert share - rounding <= ledger["held"]["disk", kind] <= share + rounding
