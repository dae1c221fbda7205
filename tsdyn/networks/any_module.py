"""A user's own module in the place of a network: its output as the one layer, its parameters by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsdyn.networks.network import Trace


@dataclass(frozen=True)
class Own:
    """A module as what is measured: in evaluation mode, without layers that anything else knows of."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        self.module.eval()
        output: Tensor = self.module(x)
        return output

    def trace(self, x: Tensor) -> Trace:
        """The output alone: pre-activations and gates are a `Network`'s."""
        return Trace([], [], [self(x)])

    def to(self, target: torch.dtype | str) -> Own:
        return Own(self.module.to(target))

    def entries(self) -> Tensor:
        """All parameters and buffers, one after another, (entry,)."""
        tensors = _held(self.module)
        like = next(t for t in tensors.values() if t.is_floating_point())
        return torch.cat([t.detach().reshape(-1).to(like) for t in tensors.values()])


def _held(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
