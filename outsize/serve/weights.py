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
from outsize.serve.products import Product

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
    """Bring the weights of these units into the store as the plan says, without gradients or state, and attach the module.
    Weights of packed products are held by them alone, unless somebody else uses them too; those of other units by nobody."""
    device = torch.device("cpu")
    leave_meta(model, device)
    weights, rows = {}, dict(plan.table_rows)
    products = {name: len(users_of(model.get_parameter(name))) == 1 for group in plan.packed for name in group}
    own = {name for unit in units for name, _ in unit.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name not in own or products.get(name, False):
            continue
        home = "host" if name in plan.near_weights else "disk"
        weight = weights[name] = make_weight(name, parameter, parameter.dtype, home, rows.get(name))
        create_blocks(store, weight, durable=False)
        fill_blocks(store, weight, lambda start, stop, name=name: read(name, start, stop), plain_put)
        if progress is not None:
            progress(name)
    store.flush()
    near = {name for name in plan.near_weights if name in weights and name not in rows}
    attachment = Attachment(model, store, units, weights, near, plan, device)
    for group in plan.packed:
        attachment.until_detached(_product(model, group, store, read, users_of))
    for name in rows:
        Table(weights[name], store, users_of(weights[name].parameter), device)
    return attachment


def _product(
    model: nn.Module,
    names: tuple[str, ...],
    store: Store,
    read: Read,
    users_of: Callable[[nn.Parameter], list[nn.Module]],
) -> Product:
    parameters = [model.get_parameter(name) for name in names]
    users = [[user for user in users_of(parameter) if isinstance(user, nn.Linear)] for parameter in parameters]
    weights = [read(name, 0, parameter.shape[0]) for name, parameter in zip(names, parameters, strict=True)]
    product = Product(
        [user for (user,) in users], torch.cat([w.to(parameters[0].dtype) for w in weights]), store.ledger
    )
    for parameter in parameters:
        if len(users_of(parameter)) == 1:
            parameter.data = torch.full((), float("nan"), dtype=parameter.dtype).expand(parameter.shape)
    return product
