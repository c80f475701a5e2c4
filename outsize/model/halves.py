"""Backward in two halves: first what somebody else waits for, the gradient of what came in; then, when there is time, the
gradients of weights. As zero bubble pipelines need it (arXiv 2401.10241), for any module, along autograd's own graph.

A *use* is a node on the way from the outcome to what came in that has weights beside that way, such as a matrix product.
The first half goes that way alone, and notes with what gradient it comes by each use; the second runs each use again, for its
weights alone. So each gradient is what the same function makes of the same tensors as in one piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Uses = dict[Node, list[torch.Tensor]]
"""With their weights, the last in forward first."""


def in_halves(
    outcome: torch.Tensor, gradient: torch.Tensor | None, came: torch.Tensor
) -> tuple[torch.Tensor | None, Callable[[], None]]:
    """The gradient of `came`, and what finds those of the weights, to be called once. Till then all that autograd keeps
    stays, and a gradient for each use: about as much as the uses have given. Where a weight is used more than once, all is
    done at once."""
    assert outcome.grad_fn is not None, "nothing to go back by"
    uses = _uses(outcome.grad_fn, get_gradient_edge(came).node)
    if uses is None:
        torch.autograd.backward(outcome, gradient)
        return came.grad, lambda: None
    noted: dict[Node, tuple[torch.Tensor | None, ...]] = {}
    handles = [use.register_prehook(partial(noted.__setitem__, use)) for use in uses]
    try:
        (found,) = torch.autograd.grad(outcome, came, gradient, retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return found, partial(_weights, uses, noted)


def _weights(uses: Uses, noted: dict[Node, tuple[torch.Tensor | None, ...]]) -> None:
    while uses:
        use = next(iter(uses))
        weights, gradients = uses.pop(use), noted.pop(use)
        known = [(GradientEdge(use, place), given) for place, given in enumerate(gradients) if given is not None]
        torch.autograd.backward([edge for edge, _ in known], [given for _, given in known], inputs=weights)


def _uses(outcome: Node, came: Node) -> Uses | None:
    """None where some weight has several."""
    parents = _parents(outcome)
    way = _above([came], parents, set())
    uses: defaultdict[Node, list[torch.Tensor]] = defaultdict(list)
    for leaf in (node for node in parents if hasattr(node, "variable") and node is not came):
        beside = _above([leaf], parents, way)
        users = {parent for node in beside for parent in parents[node]} & way
        if len(users) != 1:
            return None
        uses[users.pop()].append(leaf.variable)  # pyright: ignore[reportAttributeAccessIssue]
    return {use: uses[use] for use in sorted(uses, key=lambda use: -use._sequence_nr())}


def _parents(outcome: Node) -> dict[Node, list[Node]]:
    """Of every node below the outcome, those that hand their gradients to it."""
    found: dict[Node, list[Node]] = {outcome: []}
    left = [outcome]
    while left:
        node = left.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in found:
                found[child] = []
                left.append(child)
            found[child].append(node)
    return found


def _above(nodes: list[Node], parents: dict[Node, list[Node]], until: set[Node]) -> set[Node]:
    """These, and all from which one comes to them, but for those of `until`."""
    found: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in found and node not in until:
            found.add(node)
            nodes.extend(parents[node])
    return found
