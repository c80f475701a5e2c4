"""Parameters as several micro-batches see them, each as leaves of its own.

Autograd goes back through all micro-batches at once, and adds up what comes to one leaf before anybody sees it. A loop over
micro-batches gets each one's gradient for itself; so each gets other leaves, which share the bytes. The first has the
module's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from outsize.model.weights import Weight

Hook = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Slot:
    """Where a module has a weight."""

    module: nn.Module
    name: str
    weight: Weight


def slots_in(modules: Iterable[nn.Module], weights: Iterable[Weight]) -> list[Slot]:
    """Of the trainable ones among `weights`; nobody asks for a gradient of the others."""
    by_parameter = {id(weight.parameter): weight for weight in weights if weight.trainable}
    return [
        Slot(module, name, by_parameter[id(parameter)])
        for module in modules
        for name, parameter in module._parameters.items()
        if id(parameter) in by_parameter
    ]


@dataclass
class Leaves:
    """The leaves of all lanes but the first; `hook(weight)` is what each of them calls when its gradient is there."""

    hook: Callable[[Weight], Hook]
    _made: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)

    def show(self, slots: list[Slot], lane: int) -> None:
        """Let the modules compute with what is this lane's, and now lies where the weights do."""
        if lane == 0 and not self._made:
            return
        for slot in slots:
            own = slot.weight.parameter if lane == 0 else self._of(slot.weight, lane)
            if own is not slot.weight.parameter:
                own.data = slot.weight.parameter.data
                own._backward_hooks = slot.weight.parameter._backward_hooks  # the user's own
            slot.module._parameters[slot.name] = own

    def _of(self, weight: Weight, lane: int) -> nn.Parameter:
        leaf = self._made.get((lane, weight.name))
        if leaf is None:
            leaf = self._made[lane, weight.name] = nn.Parameter(weight.parameter.data)
            leaf.register_post_accumulate_grad_hook(self.hook(weight))
        return leaf

    def forget(self) -> None:
        """No lanes come again."""
        self._made.clear()
