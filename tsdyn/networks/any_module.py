"""A user's own module where measurements expect a network, and calls of it with other tensors than its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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


def called_with(
    module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], keywords: Mapping[str, Any] | None = None
) -> Any:
    """What a module gives with `tensors` in place of its own, by their names in ``named_parameters`` and buffers.

    Torch's ``functional_call`` replaces the tensors of a part that goes by two names twice, and so puts its
    replacements back in the end: here each part is visited once, and a tensor that several parts hold is replaced in
    each of them.
    """
    first = {id(own): name for name, own in held_tensors(module).items()}
    replaced = {}
    for path, part in module.named_modules():
        for key, own in (*part._parameters.items(), *part._buffers.items()):
            name = None if own is None else first.get(id(own))
            if name is not None and name in tensors:
                replaced[f"{path}.{key}" if path else key] = tensors[name]
    return functional_call(module, replaced, args, dict(keywords or {}), tie_weights=False)
