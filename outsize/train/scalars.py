"""What an optimizer remembers of a parameter besides tensors of several elements: step counts, for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def again(name: str, value: Any, group: dict[str, Any], device: torch.device) -> Any:
    """A scalar for the optimizer to change, where it wants that: torch's have their step on the host, unless kernels count
    it, and other tensors beside the parameter."""
    if not torch.is_tensor(value):
        return value
    counted = name != "step" or group.get("fused") or group.get("capturable")
    return value.to(device if counted else "cpu", copy=True)


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can say it."""
    return {
        name: {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        if torch.is_tensor(value)
        else value
        for name, value in sorted(values.items())
    }


def revived(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `plain`."""
    return {
        name: torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value
        for name, value in values.items()
    }
