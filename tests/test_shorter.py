"""Fewer calls, the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outsize.serve.recording import Recorder, record
from outsize.serve.shorter import shorter

HIDDEN, HEAD, SIZES = 48, 8, [32, 16, 16]
GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.randn((9, HIDDEN), generator=GENERATOR)
WEIGHT = torch.rand(HIDDEN, generator=GENERATOR)
PRODUCT = torch.randn((sum(SIZES), HIDDEN), generator=GENERATOR)


def norm(hidden: torch.Tensor, inside: torch.dtype | None) -> torch.Tensor:
    """As transformers' Llama has it, but for the precision `inside`."""
    wide = hidden.to(inside) if inside is not None else hidden
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return WEIGHT.to(hidden.dtype) * wide.to(hidden.dtype)


def turn(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads[..., : heads.shape[-1] // 2], heads[..., heads.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    return heads * cosine.unsqueeze(1) + turn(heads) * sine.unsqueeze(1)


class Layers:
    """Two of them, whose weights have `dtype`."""

    def __init__(self, dtype: torch.dtype, inside: torch.dtype | None) -> None:
        self.dtype, self.inside = dtype, inside

    def __call__(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        hidden, shape = TABLE.to(self.dtype)[tokens], (1, tokens.shape[1], -1, HEAD)
        angles = torch.outer(tokens[0].float(), TABLE[0, :HEAD]).unsqueeze(0)
        cosine, sine = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        for _ in range(2):
            given = norm(hidden, self.inside)
            parts = (given @ PRODUCT.to(self.dtype).T).split(SIZES, dim=-1)
            query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
            found = (query[:, :2] * key + value).transpose(1, 2).reshape(1, tokens.shape[1], -1)
            hidden = hidden + torch.cat((found, query.transpose(1, 2).flatten(2)[..., :32]), dim=-1)
        return hidden[:, wanted]


def trial(tokens: int, wanted: int) -> dict[str, Any]:
    ids, places = (
        torch.randint(0, most, size, generator=GENERATOR) for most, size in ((9, (1, tokens)), (tokens, (wanted,)))
    )
    return {"tokens": ids, "wanted": places}


def sizes(inputs: dict[str, Any]) -> tuple[int, int]:
    return inputs["tokens"].shape[1], inputs["wanted"].shape[0]


def names_of(forward: Layers) -> list[str]:
    with Recorder(inputs := trial(5, 2)) as recorder:
        forward(**inputs)
    return [call.name for call in shorter(recorder.calls)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_take_fewer_calls(dtype: torch.dtype) -> None:
    forward = Layers(dtype, torch.float32)
    program = record(forward, [trial(*size) for size in ((1, 1), (4, 2), (6, 4), (33, 3), (5, 3))], sizes)
    assert program is not None
    for size in ((1, 1), (2, 1), (7, 7), (300, 40)):
        assert torch.equal(program(**(inputs := trial(*size))), forward(**inputs)), size
    names = names_of(forward)
    assert names.count("roll") == 2 and names.count("turned") == 1 and names.count("unsqueeze") == 3
    assert not {"rsqrt", "pow", "neg"} & set(names)
    assert ("norm_as" in names) is (dtype is torch.bfloat16)  # else `to` gives back the same tensor


def test_a_norm_that_rounds_elsewhere_stays_as_it_is() -> None:
    forward = Layers(torch.bfloat16, None)
    assert "norm" in names_of(forward)  # it looks the same
    program = record(forward, [trial(*size) for size in ((1, 1), (4, 2), (6, 4), (33, 3), (64, 3))], sizes)
    assert program is not None and torch.equal(program(**(inputs := trial(200, 9))), forward(**inputs))


def with_heads(count: int, tokens: torch.Tensor) -> torch.Tensor:
    parts = TABLE[tokens][..., :32].split([16, 16], dim=-1)
    query, key = (part.view((1, tokens.shape[1], count, HEAD)).transpose(1, 2) for part in parts)
    angles = TABLE[tokens][..., :HEAD]
    return rotate(query, angles, angles) * rotate(key, angles, angles)


@pytest.mark.parametrize(("count", "rolls"), [(-1, 1), (2, 2)])
def test_heads_that_are_counted_are_rotated_apart(count: int, rolls: int) -> None:
    with Recorder(inputs := {"tokens": trial(5, 2)["tokens"]}) as recorder:
        with_heads(count, **inputs)
    assert [call.name for call in shorter(recorder.calls)].count("roll") == rolls


def three_alike(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    parts = TABLE[tokens].split([16, 16, 16], dim=-1)
    first, second, third = (part.view((1, tokens.shape[1], -1, HEAD)).transpose(1, 2) for part in parts)
    angles = TABLE[tokens][..., :HEAD]
    found = rotate(first, angles, angles) * rotate(second, angles, angles) * rotate(third, angles, angles)
    return found.transpose(1, 2)[:, wanted]


def test_of_three_neighbours_two_are_rotated_together() -> None:
    program = record(three_alike, [trial(*size) for size in ((1, 1), (4, 2), (6, 4), (33, 3), (5, 3))], sizes)
    assert program is not None and torch.equal(program(**(inputs := trial(20, 9))), three_alike(**inputs))
    with Recorder(inputs) as recorder:
        three_alike(**inputs)
    assert [call.name for call in shorter(recorder.calls)].count("roll") == 2
