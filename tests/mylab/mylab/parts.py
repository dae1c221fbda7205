"""An activation, a loss, an optimizer, a law, a teacher, a start, an observable and a module."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import tsdyn
from tsdyn.engine.loss import Loss
from tsdyn.engine.rule import Optimizer
from tsdyn.networks.activations import Activation


class Sine(nn.Module):
    def forward(self, z):
        return torch.sin(z)


sine = Activation("sine", torch.sin, torch.cos, Sine)


def _log_cosh(output, target):
    off = (output - target).abs()
    return (off + F.softplus(-2 * off) - math.log(2)).sum(-1).mean()


log_cosh = Loss("log_cosh", _log_cosh, "J = E log cosh(f - f*), summed over outputs")


def _sign_step(rule, parameter, gradient, moments, rates, step):
    (mean,) = moments
    mean.mul_(rule.argument("memory", 0.9)).add_(gradient)
    parameter.sub_(rates * torch.sign(mean))


sign_sgd = Optimizer("sign_sgd", ("mean",), _sign_step)


def student_t(rng, samples, inputs, *, std, freedom=5.0):
    """Of standard deviation std, which Student's t has for more than two degrees of freedom."""
    if not freedom > 2:
        raise ValueError(f"data.arguments: freedom = {freedom}; the variance is finite above 2 only")
    return rng.standard_t(freedom, (samples, inputs)) * (std * math.sqrt((freedom - 2) / freedom))


def sparse(rng, nodes, inputs, *, teacher, lowest):
    """Rows with teacher.arguments.nonzero entries of +1 or -1, the others 0."""
    count = min((teacher.arguments or {}).get("nonzero", 2), inputs)
    rows = np.zeros((nodes, inputs))
    for row in rows:
        row[rng.choice(inputs, count, replace=False)] = rng.choice([-1.0, 1.0], count)
    return rows


def orthogonal(rng, shape, *, student, taught):
    """Orthonormal rows, or columns where there are fewer, times student.arguments.gain; biases 0."""
    rows, columns = shape[0], math.prod(shape[1:])
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))
    weight = (q if rows >= columns else q.T) * (student.arguments or {}).get("gain", 1.0)
    return torch.from_numpy(weight.reshape(shape).copy()), torch.zeros(rows, dtype=torch.float64)


def _entropies(m):
    shares = [w.flatten(1).square() for w in m.network.weights]
    shares = [s / s.sum(1, keepdim=True) for s in shares]
    return [torch.special.entr(s).sum(1) for s in shares]


weight_entropy = tsdyn.Observed(
    tsdyn.declare(
        "weight_entropy",
        ("seed", "epoch", "layer", "node"),
        units="1",
        long_name="entropy of a node's squared weights",
        source="mylab",
        conditions="NaN for a node without weights",
        deep=True,
    ),
    _entropies,
)


class Residual(nn.Module):
    """x → W (x + tanh(A x)) + b: through tsdyn.run(..., student=residual)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner, self.outer = nn.Linear(inputs, inputs), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.outer(x + torch.tanh(self.inner(x)))


def residual():
    return Residual(6, 2)
