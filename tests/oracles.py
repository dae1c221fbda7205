"""Slow twins: each obviously right, one sample or one member at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tsdyn import Network
from tsdyn.training import Rule


def forward(network: Network, x: Tensor) -> Tensor:
    """One sample at a time, through torch's own modules."""
    module = network.to_torch()
    return torch.stack([module(sample) for sample in x])


def correlation(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """np.corrcoef, pair by pair."""
    return np.array([[np.corrcoef(t, s)[0, 1] for s in student.T] for t in teacher.T])


def backpropagated_gradient(student: Network, target: Tensor, x: Tensor, layer: int) -> Tensor:
    """−∂(½‖f* − f‖²)/∂z_l by autograd, one sample: an offset added to z_l is differentiated at zero."""
    rows = []
    for sample, wanted in zip(x, target, strict=True):
        offset = torch.zeros(student.weights[layer - 1].shape[0], dtype=x.dtype, requires_grad=True)
        f = sample
        for i, (w, b) in enumerate(zip(student.weights, student.biases, strict=True), start=1):
            z = w @ f + (0 if b is None else b)
            z = z + offset if i == layer else z
            f = student.activation(z) if i < student.depth else z
        (gradient,) = torch.autograd.grad(0.5 * (wanted - f).square().sum(), offset)
        rows.append(-gradient)
    return torch.stack(rows)


def output_jacobian(network: Network, f: Tensor, layer: int) -> Tensor:
    """∂f_L/∂f_l of one sample by autograd, at its activation f of layer l; (output, node)."""

    def upper(f_l: Tensor) -> Tensor:
        for i in range(layer, network.depth):
            bias = network.biases[i]
            z = network.weights[i] @ f_l + (0 if bias is None else bias)
            f_l = network.activation(z) if i < network.depth - 1 else z
        return f_l

    jacobian: Tensor = torch.autograd.functional.jacobian(upper, f)
    return jacobian


def fanout_norms(network: Network, x: Tensor, layer: int) -> Tensor:
    """√E‖v_k‖² with V_l = ∂f_L/∂f_l by autograd, one sample at a time."""
    f = x
    for w, b in list(zip(network.weights, network.biases, strict=True))[:layer]:
        f = network.activation(f @ w.T + (0 if b is None else b))
    return torch.stack([output_jacobian(network, sample, layer) for sample in f]).square().sum(1).mean(0).sqrt()


def train(network: Network, batches: list[tuple[Tensor, Tensor]], rule: Rule) -> nn.Sequential:
    """One member through nn.Module and torch.optim."""
    module = network.to_torch()
    linears = [part for part in module if isinstance(part, nn.Linear)]
    for layer in rule.frozen:
        linears[layer - 1].requires_grad_(False)
    free = [p for p in module.parameters() if p.requires_grad]
    if not free:
        return module
    optimizer: torch.optim.Optimizer
    if rule.adam:
        optimizer = torch.optim.Adam(
            free, rule.learning_rate, (rule.beta_1, rule.beta_2), rule.epsilon, rule.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(free, rule.learning_rate, rule.momentum, weight_decay=rule.weight_decay)
    for x, y in batches:
        optimizer.zero_grad()
        (0.5 * (module(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        if rule.normalize:
            with torch.no_grad():
                for layer, part in enumerate(linears[:-1], start=1):
                    if layer not in rule.frozen:
                        part.weight /= part.weight.norm(dim=1, keepdim=True)
    return module
