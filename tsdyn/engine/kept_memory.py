"""The step of relu ConvNets written out over memory that is kept from step to step; its bits are autograd's.

At ConvNets' sizes autograd takes new memory for every intermediate result, which costs as much as the convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from tsdyn.engine import convolution
from tsdyn.engine.ensemble import Ensemble, Named, layer_of
from tsdyn.engine.rule import Rule
from tsdyn.networks.network import Network


def claims(block: Ensemble, x: Tensor) -> bool:
    """Whether these members' step can be written out: relu, compiled convolutions, no BatchNorm."""
    network = block.architecture
    return (
        isinstance(network, Network)
        and network.convolutional
        and network.activation.name == "relu"
        and not any(norm is not None for norm in network.norms)
        and all(stride == 1 for stride in network.frame.strides)
        and convolution.serves(x)
    )


class Memory:
    """Tensors by name and shape, made at first use; those with an edge hold zeros there."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def of(self, name: str, shape: tuple[int, ...], like: Tensor, *, zeros: bool = False) -> Tensor:
        """The tensor of that name; zeros, if asked for, or any numbers, when it is new."""
        key = name, shape
        if key not in self._held:
            self._held[key] = like.new_zeros(shape) if zeros else like.new_empty(shape)
        return self._held[key]

    def framed(self, name: str, inner: Tensor, rows: int, columns: int) -> Tensor:
        """A copy of (member, channel, row, column, sample) in a frame of zeros."""
        if not (rows or columns):
            return inner
        members, channels, height, width, samples = inner.shape
        shape = (members, channels, height + 2 * rows, width + 2 * columns, samples)
        whole = self.of(name, shape, inner, zeros=True)
        whole[:, :, rows : rows + height, columns : columns + width].copy_(inner)
        return whole


def gradients(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, memory: Memory) -> Named:
    """Gradient of each member's loss in every parameter that is trained, name → (member, ...).

    Args:
        block: Members for which `claims` is true.
        x: (member, sample, input).
        y: Targets, (member, sample, output).
        rule: Its loss, and the layers that are frozen.
        memory: Kept from step to step.
    """
    network = block.architecture
    assert isinstance(network, Network)
    assert network.frame.image is not None
    weights, biases = block.layers(block.values)
    depth, members, samples = len(weights), len(x), x.shape[1]
    f = memory.of("inputs", (members, x.shape[2], samples), x).copy_(x.transpose(1, 2))
    f = f.unflatten(1, network.frame.image)
    below = []
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim == 5:
            edge = network.frame.paddings[i]
            f = memory.framed(f"edge {i}", f, edge, edge)
            size = [n - k + 1 for n, k in zip(f.shape[2:4], weight.shape[3:], strict=True)]
            z = memory.of(f"f {i}", (members, weight.shape[1], *size, samples), x)
            convolution.convolved(f, weight, bias, z)
        else:
            f = f.flatten(1, -2)
            z = memory.of(f"f {i}", (members, weight.shape[1], samples), x)
            if bias is None:
                torch.bmm(weight, f, out=z)
            else:
                torch.baddbmm(bias.unsqueeze(2), weight, f, out=z)
        below.append(f)
        f = z if i == depth - 1 else z.relu_()
    output = f.transpose(1, 2).detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(vmap(rule.loss.value)(output, y).sum(), output)
    return _backward(block, below, slope.transpose(1, 2), rule, memory)


def _backward(block: Ensemble, below: list[Tensor], g: Tensor, rule: Rule, memory: Memory) -> Named:
    network = block.architecture
    assert isinstance(network, Network)
    weights, biases = block.layers(block.values)
    found: Named = {}
    lowest = min((i for i in range(len(weights)) if i + 1 not in rule.frozen), default=len(weights))
    for i in range(len(weights) - 1, lowest - 1, -1):
        weight, f, free = weights[i], below[i], i + 1 not in rule.frozen
        linear = weight.ndim == 3
        if free:
            down = memory.of(f"weight {i}", tuple(weight.shape), weight)
            found[f"weight_{i + 1}"] = (
                torch.bmm(g, f.mT, out=down) if linear else convolution.weight_gradient(f, g, down)
            )
            if biases[i] is not None:
                found[f"bias_{i + 1}"] = g.sum(2) if linear else g.sum((2, 3, 4))
        if i == lowest:
            break
        if linear:
            g = torch.bmm(weight.mT, g, out=memory.of(f"g {i}", tuple(f.shape), f))
            g = g.view(len(f), *_shape_of(network, weights, below, i))
        else:
            rows, columns = weight.shape[3:]
            framed = memory.framed(f"g edge {i}", g, rows - 1, columns - 1)
            turned = weight.flip(3, 4).transpose(1, 2).contiguous()
            g = convolution.convolved(framed, turned, None, memory.of(f"g {i}", tuple(f.shape), f))
            edge = network.frame.paddings[i]
            if edge:
                g = g[:, :, edge:-edge, edge:-edge].contiguous()
        activation = below[i] if linear else memory.of(f"f {i - 1}", tuple(g.shape), g)
        torch.ops.aten.threshold_backward.grad_input(g, activation.view_as(g), 0.0, grad_input=g)
    return {name: found[name] for name in block.values if layer_of(name) not in rule.frozen}


def _shape_of(network: Network, weights: list[Tensor], below: list[Tensor], i: int) -> tuple[int, ...]:
    """Shape of one member's input of a linear layer, as the layer below puts it out."""
    if i == 0 or weights[i - 1].ndim == 3:
        return tuple(below[i].shape[1:])
    size = [n - k + 1 for n, k in zip(below[i - 1].shape[2:4], weights[i - 1].shape[3:], strict=True)]
    return (weights[i - 1].shape[1], *size, below[i].shape[-1])
