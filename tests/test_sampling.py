"""Tokens are drawn as the parameters say, and text comes out whole."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from outsize.errors import OptionError
from outsize.serve.request import Request, Sampling, Sequence
from outsize.serve.sampling import choose, choose_one, penalise
from outsize.serve.text import TextStream

LOGITS = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]


def sequence(tokens: list[int] | None = None, prompt: int = 1, **options) -> Sequence:
    tokens = tokens or [0]
    request = Request(tuple(tokens[:prompt]), Sampling(**options), lambda event: None)
    return Sequence(request, 0, 0, tokens, torch.Generator().manual_seed(options.get("seed", 0)))


def drawn(**options) -> set[int]:
    one = sequence(temperature=1.0, **options)
    return {choose_one(LOGITS, one).token for _ in range(800)}


def allowed(warper) -> set[int]:
    scores = warper(torch.zeros(1, 1, dtype=torch.long), LOGITS.unsqueeze(0))[0]
    return set(torch.isfinite(scores).nonzero().flatten().tolist())


def test_filters_leave_what_those_of_transformers_leave() -> None:
    assert drawn(top_k=3) == allowed(TopKLogitsWarper(3))
    assert drawn(top_p=0.6) == allowed(TopPLogitsWarper(0.6))
    assert drawn(min_p=0.3) == allowed(MinPLogitsWarper(0.3))
    assert drawn(top_p=0.0) == drawn(top_k=1) == drawn(min_p=1.0) == {int(LOGITS.argmax())}


def test_draws_follow_the_distribution_and_the_seed() -> None:
    one, other = (sequence(temperature=0.7, seed=5) for _ in range(2))
    tokens = [choose_one(LOGITS, one).token for _ in range(4000)]
    assert tokens == [choose_one(LOGITS, other).token for _ in range(4000)]
    for token, probability in enumerate(torch.softmax(LOGITS / 0.7, 0).tolist()):
        deviation = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(Counter(tokens)[token] / 4000 - probability) < 5 * deviation


def test_penalties_and_biases() -> None:
    tokens = [1, 2, 3, 3, 4]
    found = penalise(LOGITS.clone(), sequence(tokens, 2, repetition_penalty=1.7))
    assert torch.equal(found, RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), LOGITS[None].clone())[0])
    found = penalise(LOGITS.clone(), sequence(tokens, 2, presence_penalty=0.5, frequency_penalty=0.25))
    taken = torch.tensor([0, 0, 0, 1.0, 0.75, 0, 0, 0, 0, 0, 0, 0])
    assert torch.allclose(LOGITS - found, taken, atol=1e-6)
    assert choose_one(LOGITS, sequence(logit_bias=((3, 100.0),))).token == 3


def test_logprobs_are_the_models_own() -> None:
    found = choose_one(LOGITS, sequence(temperature=2.0, logprobs=3))
    expected = torch.log_softmax(LOGITS, 0)
    assert found.logprob == pytest.approx(float(expected[found.token]))
    assert [token for token, _ in found.logprobs] == expected.topk(3).indices.tolist()


def test_likeliest_tokens_share_one_pass() -> None:
    rows = torch.stack([LOGITS, -LOGITS, LOGITS])
    found = choose(rows, [sequence(), sequence(), sequence(temperature=1.0, top_k=1)])
    assert [one.token for one in found] == rows.argmax(-1).tolist()


@pytest.mark.parametrize("name, value", [("temperature", -1), ("top_p", math.nan), ("n", 0), ("logprobs", 21)])
def test_a_bad_parameter_is_named(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=name):
        Sampling(**{name: value})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(BPE({letter: index for index, letter in enumerate(letters)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def pieces(tokenizer: PreTrainedTokenizerFast, text: str, *stop: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokenizer(text)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            return found, True
    return [*found, stream.finish()], False


def test_text_comes_out_whole_however_it_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "naïve 東京 🚀 end"
    found, stopped = pieces(tokenizer, text)
    assert "".join(found) == text and not stopped
    assert not any("\ufffd" in piece for piece in found)


def test_a_stop_string_over_several_tokens_is_found_and_never_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(pieces(tokenizer, "one two three", " t", "xyz")[0]) == "one"
    assert pieces(tokenizer, "abab abc", "abc") == (["", "", "ab", "", "ab ", "", "", ""], True)
    assert "".join(pieces(tokenizer, "almost sto", "stop")[0]) == "almost sto"


def test_bad_stop_strings_are_refused() -> None:
    with pytest.raises(OptionError, match="stop"):
        Sampling(stop=("",))
