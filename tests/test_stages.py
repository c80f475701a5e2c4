"""A model trained in stages, by real processes over Gloo, beside one worker that has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workers import Case, Crew, Found, crew


@pytest.fixture(scope="module")
def gang() -> Iterator[Crew]:
    with crew() as made:
        yield made


def alone(case: Case) -> Case:
    return replace(case, workers=1, legs=())


def assert_same(found: Found, expected: Found) -> None:
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


STAGED = Case(legs=(2, 2))


@pytest.mark.parametrize(
    "case",
    [
        STAGED,
        replace(STAGED, pipeline="gpipe", placement="near", activations="keep"),
        Case(workers=3, legs=(2, 1, 1), precision="mixed", table_rows=40, family="qwen3", activations="move"),
        Case(legs=(1, 3), tied=True, table_rows=40, optimizer="muon", placement="mixed", activations="mixed"),
        Case(workers=4, legs=(1, 1, 1, 1), tied=True, table_rows=40, precision="mixed", sequences=5),
    ],
    ids=str,
)
def test_stages_give_the_bits_of_one_worker(gang: Crew, tmp_path: Path, case: Case) -> None:
    expected = gang.run(alone(case), tmp_path / "one")
    assert_same(gang.run(case, tmp_path / "stages"), expected)
