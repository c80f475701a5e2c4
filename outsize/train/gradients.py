"""Where gradients go: each is taken away the moment it exists.

With one micro-batch and no clipping it is applied at once (update in backward). Otherwise it is added up in a block of
its own, fp32, in the order in which micro-batches arrive. It is applied when the last one has come, or, when the global
norm must be known first or a user's own loop decides, *held* until `settle` and applied before the weight's next use.

Of several workers each gets the sum over all of them of its own share, and applies or holds that."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch

from outsize.distributed.pipeline import Pipeline
from outsize.errors import RunError
from outsize.memory.block import make_block
from outsize.memory.store import Lease, Store
from outsize.model.attach import Attachment, place_of
from outsize.model.vocabulary import Table
from outsize.model.weights import RowBlock, Weight
from outsize.train.update import PIECE, Updater

GRADIENT = "gradient"


@dataclass(frozen=True)
class Settled:
    """Gradients of a finished step, and what they are applied with: its hyper-parameters, and the clipping factor."""

    groups: list[dict[str, Any]]
    scale: float | None
    waiting: dict[str, RowBlock]


class Gradients:
    """Takes gradients of `weights`. `hold` keeps them until `settle`; `home` is the tier of those that must wait. With
    `exchange_late` (ZeRO 1) held gradients wait whole, and workers exchange them in `settle`; otherwise as they come. With
    `added_up` some workers have several micro-batches, if not all. `apart`: so many come one after the other,
    and between them sums go home; 0: all of them together, unit by unit. `pipeline`: what legs of the model are where."""

    def __init__(
        self,
        store: Store,
        attachment: Attachment,
        updater: Updater,
        home: str,
        hold: bool,
        exchange_late: bool = False,
        added_up: bool = False,
        apart: int = 0,
        pipeline: Pipeline | None = None,
    ) -> None:
        self.store, self.attachment, self.updater, self.hold = store, attachment, updater, hold
        self.group, self._late, self._added_up = updater.group, exchange_late, added_up
        self.groups: list[dict[str, Any]] = []
        self._home, self._apart, self._pipeline = home, apart, pipeline or Pipeline()
        self._arrived: dict[str, int] = {}
        self._open: dict[str, Lease] = {}
        self._partial: set[str] = set()  # blocks to whose gradient micro-batches are being added
        self._held: dict[str, RowBlock] = {}  # blocks whose gradient waits, in order of arrival
        self._norms: dict[str, torch.Tensor] = {}
        self._elsewhere: set[str] = set()  # blocks that the first leg has, too, and counts
        self._rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._settled: Settled | None = None
        attachment.take_gradient = self.take
        attachment.before_use = self.apply_weight

    # -- arriving ---------------------------------------------------------------------------------------------------

    def take(self, weight: Weight, gradient: torch.Tensor) -> None:
        """A whole weight's gradient of one micro-batch."""
        block, expected = weight.blocks[0], self._apart or self.attachment.lanes.count
        arrived = self._arrived[weight.name] = self._arrived.get(weight.name, 0) + 1
        if expected > 1:
            self._add(weight, block, gradient)
            if arrived == expected:
                self._complete(weight, block)
            elif self._apart or weight.name in self.attachment.in_parts:  # whose lanes come one after the other
                self.pause_block(block)
            return
        self._complete(weight, block, gradient)
        if not self.hold:
            self.attachment.release_early(weight)

    def complete_all(self, count: int) -> None:
        """All of a step's `count` micro-batches have come: of a weight that some have not used, the others gave the sum."""
        for name, arrived in self._arrived.items():
            if arrived < count:
                weight = self.attachment.weights[name]
                self._lease(weight, weight.blocks[0])
                self._complete(weight, weight.blocks[0])

    def take_block(self, table: Table, block: RowBlock, gradient: torch.Tensor, last: bool) -> None:
        """A table's gradient from the head, for one block and one micro-batch; `last` when no more will come to it,
        neither from the head nor from the embedding."""
        if last and block.name not in self._partial:
            self._complete(table.weight, block, gradient)
            return
        self._add(table.weight, block, gradient)
        if last:
            self._complete(table.weight, block)
        elif self._apart:
            self.pause_block(block)

    def pause_block(self, block: RowBlock) -> None:
        """No more comes to the block for now: its gradient may leave."""
        lease = self._open.pop(block.name, None)
        if lease is not None:
            lease.release()

    def take_rows(self, table: Table, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """An embedding's gradient of one micro-batch: it waits, small, until all have come."""
        self._rows.setdefault(table.weight.name, []).append((rows, gradient))

    def finish_table(self, table: Table) -> None:
        """All micro-batches are through the embedding: add its rows to the head's part, block by block."""
        arrived = self._rows.pop(table.weight.name, [])
        for block in table.weight.blocks:
            if block.name not in self._partial:
                self._add(table.weight, block, None)
            target = self._lease(table.weight, block).tensors[GRADIENT]
            with self._pipeline.both_ends(target) if table.heads else nullcontext():
                for rows, gradient in arrived:
                    inside = ((rows >= block.start) & (rows < block.stop)).nonzero().view(-1)
                    target.index_add_(0, rows[inside] - block.start, gradient[inside].to(target.dtype))
            self._complete(table.weight, block)
            if not self._pipeline.first:
                self._elsewhere.add(block.name)

    def _check_finite(self, weight: Weight, total: torch.Tensor) -> None:
        """Once for all micro-batches: where one's is not finite, neither is the sum."""
        if not isfinite(total.sum().item()):
            raise RunError(
                f"The gradient of {weight.name} is not finite. The weights of the last committed step are untouched; "
                "use a smaller learning rate, clipping, or other data."
            )

    # -- adding up --------------------------------------------------------------------------------------------------

    def _lease(self, weight: Weight, block: RowBlock, fresh: bool = False) -> Lease:
        """The block's gradient, near and writable, until `_complete` or `pause_block`."""
        lease = self._open.get(block.name)
        if lease is None:
            name, shape = f"{GRADIENT}:{block.name}", weight.block_shape(block)
            lease = self._open[block.name] = self._lease_of(name, shape, fresh)
        return lease

    def _lease_of(self, name: str, shape: tuple[int, ...], fresh: bool) -> Lease:
        if name not in self.store.entries:
            part = (GRADIENT, "gradient", torch.float32, shape)
            self.store.create(make_block(name, [part]), self._home, durable=False)
        lease = self.store.lease(name, fresh=fresh)
        lease.change()
        return lease

    def _add(self, weight: Weight, block: RowBlock, gradient: torch.Tensor | None) -> None:
        first = block.name not in self._partial
        target = self._lease(weight, block, fresh=first).tensors[GRADIENT]
        self._partial.add(block.name)
        if gradient is None:
            target.zero_()
        elif first:
            target.copy_(gradient)
        else:
            add_up(target, gradient)

    def _complete(self, weight: Weight, block: RowBlock, gradient: torch.Tensor | None = None) -> None:
        """This worker's sum is there: `gradient`, or what was added up. Apply the share of everyone's, or let it go home
        until it is settled."""
        lease = self._open.get(block.name)
        total = gradient if lease is None else lease.tensors[GRADIENT]
        assert total is not None, f"nothing came to {block.name}"
        self._check_finite(weight, total)
        self._open.pop(block.name, None)
        self._partial.discard(block.name)
        total = total.reshape(-1)
        if self.group.size > 1 and self._added_up:
            total = total.float()  # as the others send theirs
        part = total if self.hold and self._late else self.group.reduce(total, block.shares)
        if self.hold:
            self._wait(block, part, lease)
            return
        self._apply(weight, block, part, None, self.groups)
        if lease is not None:
            lease.drop()

    def _wait(self, block: RowBlock, part: torch.Tensor, lease: Lease | None) -> None:
        """Let the share, or the whole, of a gradient go home. It may lie in `lease` already."""
        if lease is None or place_of(part) != place_of(lease.bytes):
            if lease is not None:
                lease.drop()
            first = block.name not in self._held
            lease = self._lease_of(self._waiting(block), tuple(part.shape), fresh=first)
            target = lease.tensors[GRADIENT].view(-1)
            target.copy_(part) if first else add_up(target, part)
        self._norms[block.name] = torch.linalg.vector_norm(lease.tensors[GRADIENT])
        self._held[block.name] = block
        lease.release()

    def _waiting(self, block: RowBlock) -> str:
        """The name of the block in which its gradient waits."""
        share = "" if self._late or block.shares.all_own else f"@{block.shares.own.start}"
        return f"{GRADIENT}:{block.name}{share}"

    def _exchange(self, block: RowBlock) -> None:
        """Put the share of everyone's sum in its place in this worker's gradient, which has waited whole."""
        with self.store.lease(self._waiting(block)) as lease:
            lease.change()
            total, own = lease.tensors[GRADIENT].view(-1), block.shares.own
            share = self.group.reduce(total, block.shares)
            self._norms[block.name] = torch.linalg.vector_norm(share)
            total[own.start : own.stop] = share

    # -- applying ---------------------------------------------------------------------------------------------------

    def begin_step(self, groups: list[dict[str, Any]]) -> None:
        """Hyper-parameters for whatever is applied from now on. What a step that failed has left is forgotten."""
        self.groups = groups
        for lease in self._open.values():
            lease.drop()
        for left in (self._arrived, self._open, self._partial, self._rows):
            left.clear()

    def norm(self) -> torch.Tensor:
        """The global norm of what is held: of the norms by weight, as `torch.nn.utils.clip_grad_norm_` computes it; of
        several legs, of theirs."""
        order = [block.name for weight in self.attachment.weights.values() for block in weight.blocks]
        counted = self._norms.keys() - self._elsewhere
        own = torch.stack([self._norms[name] for name in order if name in counted]).tolist()
        return self._pipeline.norm(torch.linalg.vector_norm(torch.tensor(self.group.each(*own))))

    def settle(self, groups: list[dict[str, Any]], clip: float | None) -> float | None:
        """Held gradients belong to a step now: each is applied before its weight is next used. Returns their norm."""
        self._arrived.clear()
        if not self._held:
            return None
        if self._late:
            for block in self._held.values():
                self._exchange(block)
        norm = self.norm()
        scale = None if clip is None else float(torch.clamp(clip / (norm + 1e-6), max=1.0))
        assert self._settled is None, "the step before has not been applied"
        self._settled = Settled(groups, scale, self._held)
        self._held = {}  # from here on come gradients of the next step
        self._norms.clear()
        return float(norm)

    @property
    def settled(self) -> bool:
        """Held gradients of a finished step wait to be applied."""
        return self._settled is not None

    def apply_weight(self, weight: Weight) -> None:
        """Apply a weight's settled gradient, if any, block by block: it is about to be used."""
        if self._settled is not None:
            for block in weight.blocks:
                self._apply_held(weight, block, self._settled)

    def apply_all(self) -> None:
        """Apply every settled gradient now; weights that nothing is about to use come near one block at a time."""
        if self._settled is None:
            return
        for weight in self.attachment.weights.values():
            self.apply_weight(weight)
        assert not self._settled.waiting, f"gradients belong to no weight: {list(self._settled.waiting)}"
        self._settled = None

    def _apply_held(self, weight: Weight, block: RowBlock, settled: Settled) -> None:
        if settled.waiting.pop(block.name, None) is not None:
            held = self.store.lease(self._waiting(block))
            part, own = held.tensors[GRADIENT].view(-1), block.shares.own
            share = part[own.start : own.stop] if self._late else part
            self._apply(weight, block, share, settled.scale, settled.groups)
            held.drop()

    def _apply(
        self, weight: Weight, block: RowBlock, share: torch.Tensor, scale: float | None, groups: list[dict[str, Any]]
    ) -> None:
        self.attachment.ceiling.keep()
        lease = self.attachment.leased(weight) if weight.whole and not block.split else None
        if lease is not None:
            self.updater.update(block, share, lease, groups, scale)
            return
        with self.store.lease(block.home) as own:
            self.updater.update(block, share, own, groups, scale)


def add_up(target: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add to fp32 what may be narrower, in pieces: torch widens a tensor whole before it adds it to a wider one."""
    if target.is_contiguous() and gradient.is_contiguous():
        target, gradient = target.view(-1), gradient.view(-1)
    rows = max(PIECE // max(target[0].numel(), 1), 1) if len(target) else 1
    for into, part in zip(target.split(rows), gradient.split(rows), strict=True):
        into.add_(part)
