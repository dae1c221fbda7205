"""A user's own module where measurements expect a network: it has one layer, its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsdyn.networks.network import Trace


@dataclass(frozen=True)
class Own:
    """A user's own module as a network to measure: in evaluation mode, with its output as the only layer."""

    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        self.module.eval()
        output: Tensor = self.module(x)
        return output

    def trace(self, x: Tensor) -> Trace:
        """A trace that holds the output alone: pre-activations and gates are known of a `Network` only."""
        return Trace([], [], [self(x)])

    def to(self, target: torch.dtype | str) -> Own:
        return Own(self.module.to(target))

    def entries(self) -> Tensor:
        """All numbers of the parameters and buffers in one vector, (entry,)."""
        tensors = held_tensors(self.module)
        like = next(t for t in tensors.values() if t.is_floating_point())
        return torch.cat([t.detach().reshape(-1).to(like) for t in tensors.values()])


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
