"""Activation functions σ and their gates σ'.

The gate of a piecewise linear activation at exactly 0 is a convention, and it matters: with zero biases and a dead
lower layer, pre-activations of a third of the samples can be exactly 0.  The default is torch's, so that every
formula here equals autograd; ``at_zero="paper"`` is the papers' ``x >= 0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsdyn import registers

AtZero: TypeAlias = Literal["torch", "paper"]

# Beyond it log(1 + eᶻ) = z to the last bit of float64 (torch's own default, 20, is off by 2e-9).
_SOFTPLUS_THRESHOLD = 50.0
#: torch's default: taken for the function itself, from which it differs by less than 2.1e-9.
_LEAST_THRESHOLD = 20.0


class Erf(nn.Module):
    """erf(x/√2), which torch has no module for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x / math.sqrt(2.0))


@dataclass(frozen=True)
class Activation:
    """σ, its derivative and its torch module.

    Attributes:
        name: As the experiment file writes it.
        function: σ, elementwise.
        derivative: σ', elementwise; for piecewise linear σ the value at 0 is torch's.
        module: Makes the torch module.
        leak: Slope below 0 of a piecewise linear σ (relu: 0, identity: 1), None for a smooth one.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    module: Callable[[], nn.Module]
    leak: float | None = None

    @property
    def piecewise_linear(self) -> bool:
        """Whether σ(x) = σ'(x) x, which Lemma 1 of Tian (2020) needs."""
        return self.leak is not None

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z)

    def gate(self, z: Tensor, *, at_zero: AtZero = "torch") -> Tensor:
        """σ'(z), same shape and dtype as `z`; at exactly 0 torch's value or, with "paper", the value for z > 0.

        Raises:
            ValueError: for another convention.
        """
        check_gate("Activation.gate", "at_zero", at_zero)
        gate = self.derivative(z)
        match at_zero:
            case "torch":
                return gate
            case "paper":
                return torch.where(z == 0, torch.ones_like(z), gate) if self.piecewise_linear else gate
            case other:
                assert_never(other)


def check_gate(caller: str, key: str, at_zero: str) -> None:
    """Raise ValueError unless `at_zero`, which `caller` was given as `key`, is a convention of the gate at 0."""
    if at_zero not in ("torch", "paper"):
        raise ValueError(f"{caller}: {key}={at_zero!r}; it is 'torch' (autograd's gate at 0) or 'paper' (1)")


def _leaky(name: str, leak: float) -> Activation:
    def derivative(z: Tensor) -> Tensor:
        return torch.where(z > 0, torch.ones_like(z), leak)  # the other way round would be float32

    if name == "relu":
        return Activation(name, torch.relu, lambda z: (z > 0).to(z.dtype), nn.ReLU, 0.0)
    return Activation(name, lambda z: F.leaky_relu(z, leak), derivative, lambda: nn.LeakyReLU(leak), leak)


def _gaussian_density(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _gelu_derivative(z: Tensor) -> Tensor:
    normal_cdf: Tensor = torch.special.ndtr(z)
    return normal_cdf + z * _gaussian_density(z)


def _silu_derivative(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * torch.sigmoid(-z))


#: tsdyn's own, by name; leaky_relu here has torch's default slope.
TABLE: Mapping[str, Activation] = {
    a.name: a
    for a in (
        _leaky("relu", 0.0),
        _leaky("leaky_relu", 0.01),
        Activation("identity", lambda z: z, torch.ones_like, nn.Identity, 1.0),
        Activation("erf", Erf(), lambda z: 2 * _gaussian_density(z), Erf),
        Activation("tanh", torch.tanh, lambda z: 1 - torch.tanh(z) ** 2, nn.Tanh),
        Activation("sigmoid", torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), nn.Sigmoid),
        Activation(
            "softplus",
            lambda z: F.softplus(z, threshold=_SOFTPLUS_THRESHOLD),
            torch.sigmoid,
            lambda: nn.Softplus(threshold=_SOFTPLUS_THRESHOLD),
        ),
        Activation("gelu", F.gelu, _gelu_derivative, nn.GELU),
        Activation("silu", F.silu, _silu_derivative, nn.SiLU),
    )
}
NAMES = tuple(TABLE)


def activation(name: str, *, leak: float = 0.01) -> Activation:
    """The activation called `name`: tsdyn's own, or one that an installed package offers (`registers.ACTIVATIONS`).

    Args:
        name: As the experiment file writes it.
        leak: Slope of leaky_relu below 0; other activations ignore it.

    Raises:
        ValueError: if no activation has that name, the leak is negative, or a package offers something else under it.
    """
    if name == "leaky_relu":
        if not leak >= 0:
            raise ValueError(f"activation: leak={leak} is negative; the gate would not be monotone, use leak >= 0")
        return _leaky(name, leak)
    return registers.ACTIVATIONS.part(name, Activation)


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a torch module computes, or None if it is not one of tsdyn's own.

    Raises:
        ValueError: for a variant that differs from tsdyn's (an approximate GELU, a softplus scaled or cut off).
    """
    kind = type(module)  # a subclass may compute anything else
    if kind is nn.ReLU:
        return activation("relu")
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return activation("leaky_relu", leak=module.negative_slope)
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        if module.approximate != "none":
            raise ValueError(f"from_torch: {module} is approximate; use nn.GELU()")
        return activation("gelu")
    if isinstance(module, nn.Softplus) and kind is nn.Softplus:
        if module.beta != 1:
            raise ValueError(f"from_torch: {module} has beta != 1; scale the weights instead")
        if not module.threshold >= _LEAST_THRESHOLD:
            raise ValueError(
                f"from_torch: {module} is linear above {module.threshold}, which is another function; use nn.Softplus()"
            )
        return activation("softplus")
    return next((one for one in TABLE.values() if type(one.module()) is kind), None)
