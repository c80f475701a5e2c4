"""What is at the end of a model: its own head and loss, or the head's table and the loss over its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from outsize.train.data import NOT_LEARNT
from outsize.train.loss import Head, blocked_cross_entropy, blocked_sums, next_tokens

Batch = dict[str, torch.Tensor]


Begin = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Counts:
    """Tokens to be learnt in a step: in each of this worker's micro-batches, and by all workers together."""

    by_lane: list[int]
    everyone: int


@dataclass(frozen=True)
class Ends:
    """Of some micro-batches: a part of the step's loss each, and where its backward begins, with what gradient."""

    parts: list[torch.Tensor]
    begins: list[Begin]


class Ending(Protocol):
    def forward(self, batch: Batch) -> torch.Tensor:
        """As far as the model is run within its units."""
        ...

    def ends(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch], counts: Counts, first: int = 0) -> Ends:
        """Of what `forward` gave for these micro-batches, of which the first is number `first` of the step's."""
        ...

    def total(self, parts: Sequence[torch.Tensor], counts: Counts) -> torch.Tensor:
        """The loss of all of them, in order."""
        ...

    def evaluate(self, batch: Batch) -> float:
        """The mean loss of a batch, without a gradient."""
        ...


class ModuleLoss:
    """The module's own head and loss, of which each micro-batch has its share of the learnt tokens. One that has none (a long
    prompt) learns a token for nothing: the mean of no losses is no number, and times zero it would not be one either."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        if not count_learnt(self._model, batch["labels"]):
            labels = batch["labels"].clone()
            labels[:, -1] = 0
            batch = {**batch, "labels": labels}
        return self._model(**batch).loss

    def ends(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch], counts: Counts, first: int = 0) -> Ends:
        lanes = counts.by_lane[first : first + len(outputs)]
        weighted = [loss * (count / counts.everyone) for loss, count in zip(outputs, lanes, strict=True)]
        return Ends([loss.detach() for loss in weighted], [(loss, None) for loss in weighted])

    def total(self, parts: Sequence[torch.Tensor], counts: Counts) -> torch.Tensor:
        return torch.as_tensor(sum(parts))

    def evaluate(self, batch: Batch) -> float:
        return float(self._model(**batch).loss)


class BlockedLoss:
    """The base model's hidden states, then head and loss over blocks of the vocabulary; backward from the hidden states.
    `head(lanes, count)` is the head for these of the `count` micro-batches of a step."""

    def __init__(self, model: nn.Module, head: Callable[[range, int], Head]) -> None:
        self._model, self._head = model, head

    def forward(self, batch: Batch) -> torch.Tensor:
        return hidden_states(self._model, batch)

    def ends(self, outputs: Sequence[torch.Tensor], batches: Sequence[Batch], counts: Counts, first: int = 0) -> Ends:
        picked = [next_tokens(o.detach(), batch["labels"]) for o, batch in zip(outputs, batches, strict=True)]
        head = self._head(range(first, first + len(picked)), len(counts.by_lane))
        sums, gradients = blocked_sums([p[0] for p in picked], [p[1] for p in picked], head, counts.everyone)
        begins: list[Begin] = []
        for output, gradient, (_, _, where) in zip(outputs, gradients, picked, strict=bool(gradients)):
            full = torch.zeros_like(output)
            full.view(-1, full.shape[-1])[where] = gradient
            begins.append((output, full))
        return Ends(sums, begins)

    def total(self, parts: Sequence[torch.Tensor], counts: Counts) -> torch.Tensor:
        return torch.stack(list(parts)).sum() / counts.everyone

    def evaluate(self, batch: Batch) -> float:
        hidden, targets, _ = next_tokens(self.forward(batch), batch["labels"])
        return float(blocked_cross_entropy([hidden], [targets], self._head(range(0), 0), gradient=False)[0])


def count_learnt(model: nn.Module, labels: torch.Tensor) -> int:
    """How many labels count in the loss: a decoder shifts them, and so loses the first; an encoder-decoder does not."""
    shifted = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return int(((labels[:, 1:] if shifted else labels) != NOT_LEARNT).sum())


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What the part of a transformers model below its head gives."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return base_model(model)(**inputs, use_cache=False).last_hidden_state


def base_model(model: nn.Module) -> nn.Module:
    """The part of a transformers model below its head."""
    get = getattr(model, "get_decoder", None)
    return get() if get is not None else model.base_model  # pyright: ignore[reportReturnType]
