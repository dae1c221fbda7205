"""The hand-batched training step of fully connected networks: backpropagation written out as in-place batched products.

It serves every activation, the optimizers in `RULES`, and losses whose residual has a closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsdyn import memory
from tsdyn.engine.batches import Batches
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.networks.activations import TABLE, Activation

#: Optimizers whose updates need no value from the GPU on the host, so that a recorded graph can replay them.
RULES = ("sgd", "momentum", "nesterov", "adam", "adamw")
#: `Rule.options` that it serves; clipping needs the gradients of all layers before the first is updated.
OPTIONS = frozenset({"factors", "decay_biases"})


def claims(ensemble: Ensemble, rule: Rule) -> bool:
    """Whether the hand-batched step can train these members with this rule and loss."""
    known = rule.name in RULES and rule.options <= OPTIONS
    return ensemble.connected is not None and known and rule.loss.negative_gradient is not None


def block_size(ensemble: Ensemble, batch: int) -> int:
    """How many members' parameters, moments and batch buffers fit in a core's cache together; at least one."""
    return max(1, memory.cache() // (numbers(ensemble, batch) * ensemble.weights[0].element_size()))


def numbers(ensemble: Ensemble, batch: int) -> int:
    """How many numbers one member takes: parameters, moments, and the activations and gradients of a batch."""
    held = sum(p[0].numel() for p in ensemble.values.values()) * (1 + len(ensemble.moments))
    return held + 2 * batch * sum(w.shape[1] + w.shape[2] for w in ensemble.weights)


def advance(block: Ensemble, batches: Batches, rule: Rule, taken: int) -> None:
    """Take the steps of `batches` in place, after `taken` earlier ones."""
    for count, (x, y) in enumerate(batches, start=taken + 1):
        step(block, x, y, rule, count)


def step(block: Ensemble, x: Tensor, y: Tensor, rule: Rule, count: int | Tensor) -> None:
    r"""Take one step of every member, in place.

    Forward, then down the layers: ∂J/∂W_l = −(1/batch) g_l f_{l−1}ᵀ, g_{l−1} = (W_lᵀ g_l) ∘ σ'(z_{l−1}).
    """
    assert block.connected is not None
    activation = block.connected.activation
    weights, biases = block.layers(block.values)
    depth = len(weights)
    activations, gates = [x], []
    for i, weight in enumerate(weights):
        bias = biases[i]
        below = activations[-1]
        z = torch.bmm(below, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), below, weight.mT)
        if i < depth - 1:
            gates.append(z)
            activations.append(activation(z))
        else:
            activations.append(z)
    gradient = rule.loss.residual(activations.pop(), y)
    lowest = min((i for i in range(depth) if i + 1 not in rule.frozen), default=depth)
    for i in range(depth - 1, lowest - 1, -1):
        weight, below = weights[i], activations[i]
        # the gradient of the layer below needs W before its update
        passed = torch.bmm(gradient, weight) if i > lowest else None
        if i + 1 not in rule.frozen:
            _update_layer(block, i + 1, gradient, below, rule, count, top=i == depth - 1)
        if passed is not None:
            gradient = _through_gate(passed, activation, gates[i - 1], below)


def _through_gate(gradient: Tensor, activation: Activation, z: Tensor, f: Tensor) -> Tensor:
    if activation.name == "identity":
        return gradient
    if activation.name == "relu":  # f > 0 where z > 0
        torch.ops.aten.threshold_backward.grad_input(gradient, f, 0.0, grad_input=gradient)
        return gradient
    if activation is TABLE["tanh"]:  # whose gate, 1 - tanh(z)^2, is known from f to the last bit
        return gradient.mul_(f.square().neg_().add_(1))
    return gradient.mul_(activation.gate(z))


def _update_layer(
    block: Ensemble, layer: int, gradient: Tensor, below: Tensor, rule: Rule, count: int | Tensor, *, top: bool
) -> None:
    weight, bias, samples = block.values[f"weight_{layer}"], block.values.get(f"bias_{layer}"), gradient.shape[1]
    rates = rule.rates(weight, layer)
    if rule.name == "sgd":  # whose step is one product
        if rule.weight_decay:
            kept = 1 - rates * rule.weight_decay
            weight.mul_(kept)
            if bias is not None and rule.decay_biases:
                bias.mul_(kept.squeeze(2))
        gradient = gradient * (rates / samples)
        weight.baddbmm_(gradient.mT, below)
        if bias is not None:
            bias.add_(gradient.sum(1))
    else:
        moments = [block.moments[name] for name in rule.optimizer.moments]
        down = torch.bmm(gradient.mT, below).mul_(-1 / samples)
        rule.update(weight, down, [m[f"weight_{layer}"] for m in moments], rates, count)
        if bias is not None:
            down = gradient.sum(1).mul_(-1 / samples)
            rule.update(bias, down, [m[f"bias_{layer}"] for m in moments], rates.squeeze(2), count)
    if rule.normalize and not top:
        weight.div_(weight.norm(dim=2, keepdim=True))
