"""The random numbers that a step draws, where it draws them."""

from __future__ import annotations

import torch


def random_state(device: torch.device) -> torch.Tensor:
    """Of the host's generator, and after it of the `device`'s where that has one of its own (1-D uint8)."""
    host = torch.get_rng_state()
    return torch.cat([host, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else host


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """The inverse of `random_state`; what was drawn on the host goes on there, and on a device as it happens to."""
    size = torch.get_rng_state().numel()
    torch.set_rng_state(state[:size])
    if device.type == "cuda" and state.numel() > size:
        torch.cuda.set_rng_state(state[size:], device)
