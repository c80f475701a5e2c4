"""A model served by several workers: real processes, and the bits of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random_model, tiny_config, tiny_model
from serving import LONGEST, PROMPTS
from workers import Crew

from outsize.errors import ModelError, OptionError
from outsize.model.units import find_units
from outsize.planner.legs import divide, find_route
from outsize.serve.attention import use_paged_attention

GREEDY = {"max_new_tokens": LONGEST}
SHORT = {"max_new_tokens": 10}  # with few pages this takes many steps; some prompts still begin another page
SAMPLED = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 2}
PLENTY = {"pages": 200, "seats": 8, "step_tokens": 64}
SCARCE = {"pages": 9, "seats": 4, "step_tokens": 24}
MOVING = {"pages": 11, "seats": 3, "step_tokens": 24, "far_pages": 40}


def answers(
    gang: Crew, folder: Path, family: str, lengths: tuple[int, ...], sizes: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """What workers with so many layers each said; one, if there are no lengths."""
    own = folder / f"{family}-{len(lengths)}"
    own.mkdir()
    told = {"family": family, "lengths": lengths, "sizes": sizes, "prompts": PROMPTS, "tied": True, "streamed": False}
    gang.call("answer", max(1, len(lengths)), own, told | {"sampling": GREEDY} | more)
    return torch.load(own / "said", weights_only=False)


@pytest.mark.parametrize(
    "family, lengths, sizes, more",
    [
        ("llama", (2, 3), PLENTY, {"tied": False}),
        ("llama", (1, 4), SCARCE, {"sampling": SAMPLED, "streamed": True}),
        ("gpt2", (3, 2), SCARCE, {}),
        ("gpt2", (4, 1), MOVING, {"sampling": SHORT}),
        ("gemma2", (2, 2, 1), MOVING, {"sampling": SHORT}),
        ("mixtral", (2, 3), PLENTY, {"sampling": SAMPLED}),
    ],
)
def test_several_workers_give_the_bits_of_one(
    gang: Crew, tmp_path: Path, family: str, lengths: tuple[int, ...], sizes: dict[str, Any], more: dict[str, Any]
) -> None:
    alone = answers(gang, tmp_path, family, (), sizes, **more)
    found = answers(gang, tmp_path, family, lengths, sizes, **more)
    assert found["tokens"] == alone["tokens"] and found["cached"] == alone["cached"] > 0
    if sizes is not MOVING:  # when a page comes back depends on the disk, and with that who is in which step
        assert all(map(torch.equal, found["logits"], alone["logits"])) and len(found["logits"]) == len(alone["logits"])
        assert (found["preemptions"] > 0) == (sizes is SCARCE)
    assert found["recorded"] == alone["recorded"] == (family != "gpt2" and "streamed" not in more)
    assert (("host", "disk", "kv") in found["moved"]) == (("disk", "host", "kv") in found["moved"]) == (sizes is MOVING)


def test_what_goes_over_the_wire_is_counted(gang: Crew, tmp_path: Path) -> None:
    """Each token's hidden states go once from each worker to the next; those that want logits, from the last to the first."""
    found = answers(gang, tmp_path, "llama", (2, 3), PLENTY)
    ledgers = [torch.load(tmp_path / "llama-2" / f"ledger-{rank}", weights_only=False)["moved"] for rank in range(2)]
    wanted = sum(max(1, len(rows)) for rows in found["logits"])
    computed = sum(map(len, PROMPTS)) * 2 - found["cached"] + 2 * len(PROMPTS) * (LONGEST - 1)
    assert ledgers[0]["host", "peer", "activation"] == computed * 64 * 4 == ledgers[1]["peer", "host", "activation"]
    assert ledgers[1]["host", "peer", "activation"] == wanted * 64 * 4 == ledgers[0]["peer", "host", "activation"]
    assert ledgers[0]["host", "peer", "number"] == ledgers[1]["peer", "host", "number"] > 0


def test_pages_outlive_the_workers_but_for_those_of_which_one_has_lost_its_part(gang: Crew, tmp_path: Path) -> None:
    sizes = PLENTY | {"seats": 2, "far_pages": 60}
    found = []
    for number, damaged in enumerate((None, None, 1, 0)):
        if damaged is not None:
            with (tmp_path / "kv" / str(damaged) / "pages").open("r+b") as file:
                for position in range(100, file.seek(0, os.SEEK_END), 4096):
                    file.seek(position)
                    file.write(b"\xff\xff")
        (tmp_path / str(number)).mkdir()
        more = {"sampling": SHORT, "directory": str(tmp_path / "kv")}
        found.append(answers(gang, tmp_path / str(number), "llama", (2, 3), sizes, **more))
    assert all(said["tokens"] == found[0]["tokens"] for said in found)
    cold, warm, *damaged = (said["cached"] for said in found)
    assert warm > cold and max(damaged) < warm


def test_who_has_served_leaves_no_thread_behind(gang: Crew, tmp_path: Path) -> None:
    """One that still asks the meeting point when Python ends aborts the process: "terminate called"."""
    gang.call("join", 2, tmp_path, {})


def test_layers_are_divided_in_proportion_to_memory() -> None:
    model = tiny_model("llama", tied=False, layers=12)
    use_paged_attention(model)
    route, units = find_route(model), find_units(model)
    tables = 2 * model.get_input_embeddings().weight.nbytes  # pyright: ignore
    layer = sum(p.nbytes for p in model.get_submodule(route.repeated[0]).parameters())
    assert divide(route, units, [tables + 10 * layer, 10 * layer]) == (6, 6)
    assert divide(route, units, [tables + 3 * layer, 9 * layer]) == (3, 9)
    assert divide(route, units, [tables + 8 * layer, 2 * layer, 2 * layer]) == (8, 2, 2)
    assert divide(route, units, [0, 1 << 40]) == (1, 11) and divide(route, units, [1 << 40, 0]) == (11, 1)
    for more in (0, 1, 1 << 20):  # what a process holds differs by some pages each time it is started
        assert divide(route, units, [tables + (1 << 30), (1 << 30) + more]) == (6, 6)
        assert divide(route, units, [tables + (1 << 30) + more, 1 << 30, 1 << 30]) == (4, 4, 4)
    odd = tiny_model("llama", tied=False, layers=3)
    use_paged_attention(odd)
    route, units = find_route(odd), find_units(odd)
    even = [tables + (1 << 30), 1 << 30]
    assert divide(route, units, [even[0] + 4096, even[1]]) == divide(route, units, [even[0], even[1] + 4096])
    with pytest.raises(OptionError, match="3 layers cannot be divided among 13 workers"):
        divide(route, units, [1 << 30] * 13)


def test_a_model_whose_layers_are_given_more_than_hidden_states_is_refused() -> None:
    model = random_model(tiny_config("llama", False, 4, 64, 256))
    use_paged_attention(model)
    layers = model.model.layers
    layers[2].register_forward_pre_hook(
        lambda module, given, named: (given, named | {"cache_position": model.model.embed_tokens.weight.sum()}),
        with_kwargs=True,
    )
    with pytest.raises(ModelError, match=r"model.layers.2 is given more than hidden states"):
        find_route(model)
