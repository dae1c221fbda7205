"""A user's own module where measurements expect a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsdyn.networks.network import Trace


@dataclass(frozen=True)
class Own:
    """A user's own module as a network to measure, in evaluation mode.

    Attributes:
        module: The module.
        layers: Names of its labelled layers, the lowest first; empty if its output is the only one.
    """

    module: nn.Module
    layers: tuple[str, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        self.module.eval()
        output: Tensor = self.module(x)
        return output

    def trace(self, x: Tensor) -> Trace:
        """A trace of the output alone; `tsdyn.observables.layers` has the labelled layers."""
        return Trace([], [], [self(x)])

    def to(self, target: torch.dtype | str) -> Own:
        """The same with the module moved to that type or device."""
        return Own(self.module.to(target), self.layers)

    @property
    def held(self) -> dict[str, Tensor]:
        """Parameters, then buffers, by name."""
        return held_tensors(self.module)

    def entries(self) -> Tensor:
        """All numbers of the parameters and buffers in one vector, (entry,)."""
        tensors = self.held
        like = next(t for t in tensors.values() if t.is_floating_point())
        return torch.cat([t.detach().reshape(-1).to(like) for t in tensors.values()])


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
