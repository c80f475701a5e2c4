"""Cross entropy of a language model's head over blocks of the vocabulary and of tokens.

The logits of a long sequence, and the head's gradient, are larger than any layer. Here neither ever exists whole: a
first pass over the head's blocks finds each token's log-sum-exp (online, as in arXiv 1805.02867), a second one
recomputes a block's logits and makes from them the block's gradient and its share of the hidden states' gradient.
The order of summation differs from the module's own head: `rounding`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

TOKENS = 512  # rows of hidden states whose logits against one block exist at once

HeadBlock = tuple[int, int]
"""Rows [start, stop) of the head's weight."""

Repeat = Callable[[Hashable, Callable[[], Any]], Any]
"""(key, work) -> what `work()` gives. Work with one key is done on tensors of the same shapes: a rehearsal does it once."""


def each_time(key: Hashable, work: Callable[[], Any]) -> Any:
    return work()


@dataclass(frozen=True)
class Head:
    """A head as blocks. `weight(block)` gives `[rows, hidden]` for as long as the context lasts;
    `take(block, lane, gradient)` receives each lane's gradient of it, fp32 or the weight's dtype."""

    blocks: Sequence[HeadBlock]
    weight: Callable[[HeadBlock], AbstractContextManager[torch.Tensor]]
    take: Callable[[HeadBlock, int, torch.Tensor], None] | None
    repeat: Repeat = each_time


@dataclass
class Lane:
    """One micro-batch at the head: `hidden` `[tokens, hidden]`, `targets` `[tokens]`, and what the passes find."""

    hidden: torch.Tensor
    targets: torch.Tensor
    log_sum: torch.Tensor
    chosen: torch.Tensor


def next_tokens(hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states `[batch, tokens, hidden]` that predict something, as `[n, hidden]`; their targets `[n]`; and where
    they stood in the flattened `[batch * tokens]`. Labels are as transformers has them: unshifted, -100 not learnt."""
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    where = (targets.view(-1) != -100).nonzero().view(-1)
    return hidden.reshape(-1, hidden.shape[-1])[where], targets.view(-1)[where], where


def blocked_cross_entropy(
    hiddens: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    head: Head,
    gradient: bool = True,
    count: int | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Mean cross entropy over all tokens of all lanes, and its gradient by each lane's hidden states. With a `count` the
    sum is divided by that instead: these are lanes of one worker, and the others have the rest of so many tokens.

    hiddens: `[tokens, hidden]` each; targets: `[tokens]` each. Returns (fp32 scalar, gradients like hiddens or [])."""
    count = count or sum(target.numel() for target in targets)
    losses, gradients = blocked_sums(hiddens, targets, head, count, gradient)
    return torch.stack(losses).sum() / count, gradients


def blocked_sums(
    hiddens: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], head: Head, count: int, gradient: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As `blocked_cross_entropy`, but of each lane the sum of its tokens' losses, which nothing has divided."""
    lanes = [_lane(hidden, target) for hidden, target in zip(hiddens, targets, strict=True)]
    for block in head.blocks:
        with head.weight(block) as weight:
            for lane in lanes:
                head.repeat(("sum", *_shape(lane, block)), partial(_sum_block, lane, weight, block))
    losses = [(lane.log_sum - lane.chosen).sum() for lane in lanes]
    if not gradient or not torch.isfinite(torch.stack(losses).sum()):
        return losses, []
    sums = [torch.zeros(lane.hidden.shape, dtype=torch.float32, device=lane.hidden.device) for lane in lanes]
    for block in reversed(head.blocks):  # the last block is still near
        with head.weight(block) as weight:
            for index, lane in enumerate(lanes):
                work = partial(_gradient_block, lane, weight, block, 1.0 / count, sums[index], head.take is not None)
                found = head.repeat(("gradient", *_shape(lane, block)), work)
                if head.take is not None:
                    head.take(block, index, found)
    return losses, [total.to(lane.hidden.dtype) for total, lane in zip(sums, lanes, strict=True)]


def _lane(hidden: torch.Tensor, targets: torch.Tensor) -> Lane:
    log_sum = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device=hidden.device)
    return Lane(hidden.detach(), targets, log_sum, torch.zeros_like(log_sum))


def _shape(lane: Lane, block: HeadBlock) -> tuple[int, int]:
    return lane.targets.numel(), block[1] - block[0]


def _token_spans(count: int) -> Iterator[slice]:
    for start in range(0, count, TOKENS):
        yield slice(start, min(start + TOKENS, count))


def _sum_block(lane: Lane, weight: torch.Tensor, block: HeadBlock) -> None:
    start, stop = block
    for span in _token_spans(lane.targets.numel()):
        logits = (lane.hidden[span] @ weight.T).float()
        lane.log_sum[span] = torch.logaddexp(lane.log_sum[span], logits.logsumexp(-1))
        inside, rows = _targets_inside(lane.targets[span], start, stop)
        lane.chosen[span][inside] = logits[inside, rows]


def _gradient_block(
    lane: Lane, weight: torch.Tensor, block: HeadBlock, scale: float, by_hidden: torch.Tensor, by_weight: bool
) -> torch.Tensor:
    """Adds to `by_hidden` in place; returns the gradient by `weight` (its dtype for one span of tokens, else fp32)."""
    start, stop = block
    total: torch.Tensor | None = None
    for span in _token_spans(lane.targets.numel()):
        logits = (lane.hidden[span] @ weight.T).float()
        share = logits.sub_(lane.log_sum[span, None]).exp_()
        inside, rows = _targets_inside(lane.targets[span], start, stop)
        share[inside, rows] -= 1.0
        by_logits = share.mul_(scale).to(weight.dtype)
        by_hidden[span] += by_logits @ weight
        if by_weight:
            found = by_logits.T @ lane.hidden[span]
            total = found if total is None else total.float().add_(found)
    return total if total is not None else torch.zeros_like(weight)


def _targets_inside(targets: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens have their target in rows [start, stop), and at which row of the block."""
    inside = ((targets >= start) & (targets < stop)).nonzero().view(-1)
    return inside, targets[inside] - start
