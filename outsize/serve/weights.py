"""A model's weights for running it forward only: those that stay near, and those that stream past once a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from outsize.memory.store import Store
from outsize.model.attach import Attachment
from outsize.model.units import Unit
from outsize.model.vocabulary import Table
from outsize.model.weights import create_blocks, fill_blocks, leave_meta, make_weight, plain_put
from outsize.plan import Plan

Read = Callable[[str, int, int], torch.Tensor]


def bind_for_inference(
    model: nn.Module,
    units: list[Unit],
    plan: Plan,
    store: Store,
    read: Read,
    users_of: Callable[[nn.Parameter], list[nn.Module]],
    progress: Callable[[str], None] | None = None,
) -> Attachment:
    """Bring a model's weights into the store as the plan says, without gradients or state, and attach the module."""
    device = torch.device("cpu")
    leave_meta(model, device)
    weights, rows = {}, dict(plan.table_rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        home = "host" if name in plan.near_weights else "disk"
        weight = weights[name] = make_weight(name, parameter, parameter.dtype, home, rows.get(name))
        create_blocks(store, weight, durable=False)
        fill_blocks(store, weight, lambda start, stop, name=name: read(name, start, stop), plain_put)
        if progress is not None:
            progress(name)
    store.flush()
    near = {name for name in plan.near_weights if name not in rows}
    attachment = Attachment(model, store, units, weights, near, plan, device)
    for name in rows:
        Table(weights[name], store, users_of(weights[name].parameter), device)
    return attachment
