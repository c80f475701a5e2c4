"""A forward written down as its calls: the same numbers for other sizes, or none at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from models import Family
from serving import PROMPTS, ask, bound, run

from outsize.serve.recording import record

TABLE = torch.randn(9, 6)


def sizes(inputs: dict[str, Any]) -> tuple[int, int]:
    return inputs["tokens"].shape[1], inputs["wanted"].shape[0]


def trial(tokens: int, wanted: int) -> dict[str, Any]:
    return {"tokens": torch.randint(0, 9, (1, tokens)), "wanted": torch.randint(0, tokens, (wanted,))}


def recorded(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    return record(forward, [trial(*size) for size in ((1, 1), (4, 2), (6, 4), (33, 3), (128, 9), (5, 3))], sizes)


def plain(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    count = tokens.shape[1]
    rows = TABLE[tokens].view(1, count, 2, 3).transpose(1, 2)
    first, second = rows.split([1, 1], dim=1)
    joined = torch.cat((-first, second), dim=1).contiguous()
    joined[..., 0] = 0.5
    joined.add_(torch.arange(2 * count).view(1, 2, count, 1)).mul_(torch.full((3,), 2.0, dtype=torch.float32))
    out = joined.transpose(1, 2).reshape(count, -1).to(torch.float32)
    return torch.nn.functional.silu(out)[wanted] + len(wanted)


def test_a_program_gives_the_same_for_other_sizes() -> None:
    program = recorded(plain)
    assert program is not None and program is not plain
    for size in ((1, 1), (2, 1), (7, 7), (300, 40)):
        inputs = trial(*size)
        assert torch.equal(program(**inputs), plain(**inputs)), size


def by_value(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return plain(tokens, wanted) * (2 if tokens.sum() > 10 else 3)


def by_mask(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    rows = TABLE[tokens[0]]
    return rows[rows > 0]


def by_list(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return plain(torch.tensor([tokens[0].tolist()]), wanted)


def alone(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return plain(tokens, wanted) if tokens.shape[1] > 1 else plain(tokens, wanted) + 1


def many(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return plain(tokens, wanted) if tokens.shape[1] <= 8 else plain(tokens, wanted) + 1


def padded(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(plain(tokens, wanted).sum(0), (0, -tokens.shape[1] % 8))


def of_another(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    first, second = plain(tokens, wanted), plain(tokens, wanted) + 1
    return first if tokens.shape[1] <= 8 else second


def by_bound(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return TABLE[: tokens[0, 0]]


def by_repeats(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.repeat_interleave(TABLE[tokens[0]], repeats=tokens[0], dim=0)


def by_condition(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.where(condition=tokens[0] > 3)[0]


def squared(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tokens.shape[1] ** 2)


def from_elsewhere(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return plain(tokens, wanted) + torch.from_numpy(numpy.array([len(wanted)], dtype="float32"))


REFUSED = [by_value, by_mask, by_list, alone, many, padded, of_another, by_bound, by_repeats, by_condition, squared]


@pytest.mark.parametrize("forward", [*REFUSED, from_elsewhere])
def test_what_depends_on_more_than_sizes_has_no_program(forward: Callable[..., torch.Tensor]) -> None:
    assert recorded(forward) is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma2", "phi3", "mixtral"])
def test_models_become_programs(family: Family) -> None:
    with bound(family) as served, served.engine(pages=40, seats=8, step_tokens=64) as engine:
        assert engine.runner.recorded
        heard = [ask(engine, prompt, max_new_tokens=5, ignore_end=True)[1] for prompt in PROMPTS[:4]]
        run(engine)
        assert [one.tokens() for one in heard] == [answer[:5] for answer in served.answers[:4]]


def test_weights_that_stream_need_the_module() -> None:
    with bound("llama", streamed=True) as served, served.engine(pages=40, seats=8, step_tokens=64) as engine:
        assert not engine.runner.recorded
