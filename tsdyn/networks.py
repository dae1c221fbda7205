"""Networks as values: an architecture with its parameters.

A formula is written for one network and batched from outside with torch.func.vmap: every operation here
accepts leading dimensions through vmap and keeps gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn

from tsdyn import activations
from tsdyn.activations import Activation, AtZero
from tsdyn.memory import refuse_beyond


@dataclass(frozen=True)
class Trace:
    """One forward pass, layer by layer; index l−1 holds layer l = 1..L, each (sample, node).

    Attributes:
        preactivations: z_l = W_l f_{l−1} + b_l.
        gates: σ'(z_l); ones at the output layer, which has no σ.
        activations: f_l = σ(z_l); at the output layer f_L = z_L.
    """

    preactivations: list[Tensor]
    gates: list[Tensor]
    activations: list[Tensor]

    @property
    def output(self) -> Tensor:
        """f_L, (sample, output)."""
        return self.activations[-1]


class Network:
    """A fully connected network f_l = σ(W_l f_{l−1} + b_l), l = 1..L, with f_L linear.

    Args:
        weights: W_1..W_L, each (n_l, n_{l−1}) as torch stores them; arrays or tensors.
        biases: b_1..b_L, each (n_l,) or None; None for no biases at all.
        activation: Name registered in `tsdyn.activations`.
        leak: Slope below 0 of ``"leaky_relu"``.
        gate_at_zero: Gate at exactly 0: ``"torch"`` (autograd's) or ``"paper"`` (1).

    Tensors are kept as given, so gradients flow through them.

    Raises:
        ValueError: if shapes do not chain, dtypes or devices are mixed, or the activation is unknown.
    """

    def __init__(
        self,
        weights: Sequence[ArrayLike | Tensor],
        biases: Sequence[ArrayLike | Tensor | None] | None = None,
        activation: str = "relu",
        *,
        leak: float = 0.01,
        gate_at_zero: AtZero = "torch",
    ) -> None:
        self.weights: list[Tensor] = [torch.as_tensor(w) for w in weights]
        given = [None] * len(self.weights) if biases is None else list(biases)
        self.biases: list[Tensor | None] = [None if b is None else torch.as_tensor(b) for b in given]
        self.activation: Activation = activations.activation(activation, leak=leak)
        if gate_at_zero not in ("torch", "paper"):
            raise ValueError(f"Network: gate_at_zero={gate_at_zero!r}; it is 'torch' or 'paper'")
        self.gate_at_zero: AtZero = gate_at_zero
        _check_chain(self.weights, self.biases)

    @property
    def widths(self) -> tuple[int, ...]:
        """n_0..n_L, the input first."""
        return (self.weights[0].shape[-1], *(w.shape[-2] for w in self.weights))

    @property
    def depth(self) -> int:
        """L, the number of layers above the input."""
        return len(self.weights)

    def __call__(self, x: Float[Tensor, "sample input"]) -> Float[Tensor, "sample output"]:
        """f_L(x), (sample, output)."""
        for layer in range(self.depth):
            z = self._affine(layer, x)
            x = self.activation(z) if layer < self.depth - 1 else z
        return x

    forward = __call__

    def trace(self, x: Float[Tensor, "sample input"]) -> Trace:
        """Pre-activation, gate and activation of every layer, each (sample, node).

        Source: Tian (2020), section 3 (f_l, D_l = diag of the gate).
        """
        trace = Trace([], [], [])
        for layer in range(self.depth):
            z = self._affine(layer, x)
            last = layer == self.depth - 1
            x = z if last else self.activation(z)
            trace.preactivations.append(z)
            trace.gates.append(torch.ones_like(z) if last else self.activation.gate(z, at_zero=self.gate_at_zero))
            trace.activations.append(x)
        return trace

    def _affine(self, layer: int, x: Tensor) -> Tensor:
        weight, bias = self.weights[layer], self.biases[layer]
        if x.shape[-1] != weight.shape[-1]:
            raise ValueError(
                f"Network: inputs have {x.shape[-1]} features, layer {layer + 1} takes {weight.shape[-1]}; "
                "x is (sample, input)"
            )
        return nn.functional.linear(x, weight, bias)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        *,
        input_shape: tuple[int, int, int] | None = None,
        gate_at_zero: AtZero = "torch",
    ) -> Network:
        """The network an ``nn.Sequential`` of Linear or Conv2d layers and one kind of activation computes.

        The module's own parameters are kept, so gradients reach them.  BatchNorm in eval mode is an affine map of each
        node and is folded into the layer below it, or above it if it follows an activation.  A convolution becomes its
        matrix, (channel·row·column of the output, channel·row·column of the input), which only small images allow.

        Args:
            module: Sequential, nested or not.
            input_shape: (channel, row, column) of the images that a convolution takes; x is then
                (sample, channel·row·column).
            gate_at_zero: Gate at exactly 0: ``"torch"`` (autograd's) or ``"paper"`` (1).

        Raises:
            ValueError: naming the module that has no place here, BatchNorm in training mode, activations that differ
                between layers, an activation after the last layer, or a convolution without `input_shape`.
            MemoryError: if a convolution's matrix does not fit.
        """
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        found: list[Activation] = []
        pending: tuple[Tensor, Tensor] | None = None  # of a BatchNorm above an activation
        shape = input_shape
        for part in _leaves(module):
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                if len(found) < len(weights):
                    found.append(activations.activation("identity"))
                if isinstance(part, nn.Conv2d):
                    weight, bias, shape = _unrolled(part, shape)
                else:
                    weight, bias, shape = part.weight, part.bias, None
                if pending is not None:
                    scale, shift = pending
                    bias = weight @ shift if bias is None else bias + weight @ shift
                    weight, pending = weight * scale, None
                weights.append(weight)
                biases.append(bias)
                continue
            if isinstance(part, nn.Flatten):
                shape = None
                continue
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and weights and pending is None:
                scale, shift = _affine_of(part, len(weights[-1]))
                if len(found) < len(weights):
                    bias = biases[-1]
                    weights[-1] = scale[:, None] * weights[-1]
                    biases[-1] = shift if bias is None else scale * bias + shift
                else:
                    pending = scale, shift
                continue
            sigma = activations.from_module(part)
            if sigma is None or not weights or len(found) >= len(weights):
                raise ValueError(
                    f"from_torch: {part} has no place here; a Network is Linear or Conv2d, activation, ..., Linear"
                )
            found.append(sigma)
        if not weights or len(found) != len(weights) - 1 or pending is not None:
            raise ValueError(f"from_torch: {type(module).__name__} must end with a Linear layer and hold at least one")
        kinds = {(a.name, a.leak) for a in found}
        if len(kinds) > 1:
            raise ValueError(f"from_torch: activations differ between layers: {sorted(map(str, kinds))}; use one")
        name, leak = kinds.pop() if kinds else ("relu", None)
        return cls(weights, biases, name, leak=leak or 0.0, gate_at_zero=gate_at_zero)

    def to_torch(self) -> nn.Sequential:
        """An ``nn.Sequential`` with copies of the parameters, computing the same function."""
        parts: list[nn.Module] = []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            linear = nn.Linear(
                weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
            )
            with torch.no_grad():
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
            parts.append(linear)
            if layer < self.depth - 1:
                parts.append(self.activation.module())
        return nn.Sequential(*parts)

    def to(self, target: torch.dtype | str) -> Network:
        """The same network in another floating-point type or on another device; tensors already there are shared."""
        return self.with_parameters(
            [w.to(target) for w in self.weights], [None if b is None else b.to(target) for b in self.biases]
        )

    def with_parameters(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Network:
        """Other parameters with the same activation."""
        leak = self.activation.leak or 0.0
        return Network(weights, biases, self.activation.name, leak=leak, gate_at_zero=self.gate_at_zero)

    def __repr__(self) -> str:
        bias = "" if any(b is not None for b in self.biases) else ", no bias"
        return f"Network({'-'.join(map(str, self.widths))}, {self.activation.name}{bias}, {self.weights[0].dtype})"


def _leaves(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential):
        return [leaf for part in module for leaf in _leaves(part)]
    return [module]


Image: TypeAlias = tuple[int, int, int]


def _unrolled(layer: nn.Conv2d, shape: Image | None) -> tuple[Tensor, Tensor | None, Image]:
    """Matrix and bias of a convolution on images of one shape, and the shape it gives."""
    if shape is None or shape[0] != layer.in_channels:
        raise ValueError(
            f"from_torch: {layer} takes images of {layer.in_channels} channels and gets {shape or 'a flat vector'}; "
            "give input_shape=(channel, row, column)"
        )
    with torch.no_grad():
        after: Image = tuple(layer(layer.weight.new_zeros(1, *shape)).shape[1:])
    size, size_after = math.prod(shape), math.prod(after)
    refuse_beyond(
        "from_torch",
        2 * size * (size + size_after) * layer.weight.element_size(),
        layer.weight.device,
        "take smaller images: a convolution's matrix grows with the square of their size",
    )
    # column i is the response to the i-th unit image
    units = torch.eye(size, dtype=layer.weight.dtype, device=layer.weight.device).view(size, *shape)
    response = layer._conv_forward(units, layer.weight, None)
    bias = None if layer.bias is None else layer.bias.repeat_interleave(size_after // len(layer.bias))
    return response.flatten(1).T, bias, after


def _affine_of(norm: nn.BatchNorm1d | nn.BatchNorm2d, nodes: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of each node in eval mode; a channel has as many nodes as it has pixels."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"from_torch: {norm} normalizes by the batch, so it is no function of one sample; "
            "call module.eval() to use its running statistics"
        )
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.affine:
        scale = norm.weight * scale
    shift = -scale * norm.running_mean
    if norm.affine:
        shift = norm.bias + shift
    pixels = nodes // norm.num_features
    return scale.repeat_interleave(pixels), shift.repeat_interleave(pixels)


def _check_chain(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
    if not weights or len(biases) != len(weights):
        raise ValueError(
            f"Network: {len(weights)} weights and {len(biases)} biases; give one of each a layer, at least one"
        )
    below = None
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(
                f"Network: weight of layer {layer} is {weight.dtype} of shape {tuple(weight.shape)}; "
                "it must be floating point (node, input_node)"
            )
        if below is not None and weight.shape[1] != below:
            raise ValueError(
                f"Network: layer {layer} takes {weight.shape[1]} inputs, layer {layer - 1} has {below} nodes"
            )
        below = weight.shape[0]
        if bias is not None and bias.shape != (below,):
            raise ValueError(
                f"Network: bias of layer {layer} has shape {tuple(bias.shape)}, the layer has {below} nodes"
            )
        for tensor in (weight, bias):
            if tensor is not None and (tensor.dtype, tensor.device) != (weights[0].dtype, weights[0].device):
                raise ValueError(
                    f"Network: layer {layer} is {tensor.dtype} on {tensor.device}, layer 1 {weights[0].dtype} on "
                    f"{weights[0].device}; move all to one dtype and device"
                )
