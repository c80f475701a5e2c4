"""From logits to the next token."""

from __future__ import annotations

from collections import Counter
from math import isnan

import torch

from outsize.serve.request import Chosen, Sampling, Sequence


def choose(logits: torch.Tensor, sequences: list[Sequence]) -> list[Chosen | None]:
    """One token for each row of `logits` [B, vocabulary]; None where they are not numbers. Rows that only want the
    likeliest token share one search; each of the others is worked out alone, so that nobody's draw depends on its
    neighbours."""
    highest, likeliest = (found.tolist() for found in logits.max(dim=-1))
    return [
        None
        if isnan(highest[row])
        else Chosen(likeliest[row])
        if sequence.request.sampling.plain
        else choose_one(logits[row], sequence)
        for row, sequence in enumerate(sequences)
    ]


def choose_one(logits: torch.Tensor, sequence: Sequence) -> Chosen:
    """A token by `logits` [vocabulary], the sequence's sampling parameters and its own generator."""
    sampling = sequence.request.sampling
    own = logits.float()
    scores = penalise(own.clone(), sequence)
    if sampling.temperature == 0:
        token = int(scores.argmax())
    else:
        token = draw(scores / sampling.temperature, sampling, sequence.generator)
    if sampling.logprobs is None:
        return Chosen(token)
    logprobs = torch.log_softmax(own, dim=-1)
    top = torch.topk(logprobs, sampling.logprobs)
    listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Chosen(token, float(logprobs[token]), tuple(listed))


def penalise(scores: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Add biases and take penalties off `scores` [vocabulary], in place. OpenAI's count only new tokens; the repetition
    penalty, as in transformers, those of the prompt too."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.tokens)), device=scores.device)
        found = scores[seen]
        scores[seen] = torch.where(found < 0, found * sampling.repetition_penalty, found / sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        counts = Counter(sequence.tokens[len(sequence.request.prompt) :])
        tokens = torch.tensor(list(counts), dtype=torch.long, device=scores.device)
        often = torch.tensor(list(counts.values()), dtype=scores.dtype, device=scores.device)
        scores[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * often
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    return scores


def draw(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """A token by the softmax of `scores` [vocabulary], after top-k, top-p and min-p, each of which leaves at least one."""
    kept = scores.numel() if sampling.top_k == 0 else min(sampling.top_k, scores.numel())
    if sampling.top_p < 1 or kept < scores.numel():
        values, tokens = torch.topk(scores, kept)
    else:
        values, tokens = scores, None
    probabilities = torch.softmax(values, dim=-1)
    if sampling.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before > sampling.top_p, 0.0)
        probabilities[0] = probabilities[0].clamp_min(torch.finfo(probabilities.dtype).tiny)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0.0)
    place = int(torch.multinomial(probabilities, 1, generator=generator))
    return place if tokens is None else int(tokens[place])
