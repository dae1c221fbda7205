"""Reference implementations: plainly right and slow, one sample or one member at a time.

Imports nothing from tsdyn: networks, activations, losses and rules come as arguments, of which only the plainest parts
are asked (parameters, `to_torch`, numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn


def forward(network: Any, x: Tensor) -> Tensor:
    """Outputs of one sample at a time, through torch's own modules."""
    module = network.to_torch()
    return torch.stack([module(sample) for sample in x])


def correlation(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """np.corrcoef, pair by pair."""
    return np.array([[np.corrcoef(t, s)[0, 1] for s in student.T] for t in teacher.T])


def backpropagated_gradient(student: Any, target: Tensor, x: Tensor, layer: int) -> Tensor:
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


def output_jacobian(network: Any, f: Tensor, layer: int) -> Tensor:
    """∂f_L/∂f_l of one sample by autograd, at its activation f of layer l; (output, node)."""

    def upper(f_l: Tensor) -> Tensor:
        for i in range(layer, network.depth):
            bias = network.biases[i]
            z = network.weights[i] @ f_l + (0 if bias is None else bias)
            f_l = network.activation(z) if i < network.depth - 1 else z
        return f_l

    jacobian: Tensor = torch.autograd.functional.jacobian(upper, f)
    return jacobian


def fanout_norms(network: Any, x: Tensor, layer: int) -> Tensor:
    """√E‖v_k‖² with V_l = ∂f_L/∂f_l by autograd, one sample at a time."""
    f = x
    for w, b in list(zip(network.weights, network.biases, strict=True))[:layer]:
        f = network.activation(f @ w.T + (0 if b is None else b))
    return torch.stack([output_jacobian(network, sample, layer) for sample in f]).square().sum(1).mean(0).sqrt()


def train(network: Any, batches: list[tuple[Tensor, Tensor]], rule: Any) -> nn.Sequential:
    """Train one member by nn.Module and torch.optim."""
    module = network.to_torch()
    linears = [part for part in module if isinstance(part, nn.Linear)]
    for layer in rule.frozen:
        linears[layer - 1].requires_grad_(False)
    free = [p for p in module.parameters() if p.requires_grad]
    if not free:
        return module
    optimizer: torch.optim.Optimizer
    if rule.name == "adam":
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


def gaussian_pair(activation: Any, r1: float, r2: float, u: float) -> float:
    """E[σ(r₁x) σ(r₂y)], x and y standard normal with correlation u, by Gauss–Legendre panels."""
    nodes, weights = np.polynomial.legendre.leggauss(20)

    def panels(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        half = np.diff(edges)[:, None] / 2
        return (edges[:-1, None] + half * (1 + nodes)).ravel(), (half * weights).ravel()

    def sigma(z: np.ndarray) -> np.ndarray:
        return np.asarray(activation(torch.from_numpy(z)))

    if activation.piecewise_linear:  # polar: the radius gives 2/2π, the angle is smooth between the kinks
        theta = np.arccos(u)
        kinks = np.array([np.pi / 2, 3 * np.pi / 2, theta + np.pi / 2, theta + 3 * np.pi / 2]) % (2 * np.pi)
        phi, w = panels(np.unique([0, 2 * np.pi, *np.linspace(0, 2 * np.pi, 9), *kinks]))
        return float((sigma(r1 * np.cos(phi)) * sigma(r2 * np.cos(phi - theta))) @ w / np.pi)
    z, w = panels(np.linspace(-9, 9, 55))
    density = w * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    y = u * z[:, None] + np.sqrt((1 - u) * (1 + u)) * z
    return float((density * sigma(r1 * z)) @ sigma(r2 * y) @ density)


def saad_solla(a: list[Any], kind: str = "erf") -> dict[str, Callable[..., float]]:
    """I2, I3, I4, J2 of erf(x/√2) or the identity as Saad & Solla print them; `a` the covariance of the fields."""
    pi, sqrt, asin = math.pi, math.sqrt, math.asin
    if kind == "identity":
        return {
            "I2": lambda i, j: a[i][j],
            "I3": lambda i, j, k: a[j][k],
            "I4": lambda i, j, k, n: a[k][n],
            "J2": lambda i, j: 1.0,
        }

    def L4(i: int, j: int) -> float:
        return (1 + a[i][i]) * (1 + a[j][j]) - a[i][j] ** 2

    def I3(i: int, j: int, k: int) -> float:
        return 2 / pi * (a[j][k] * (1 + a[i][i]) - a[i][j] * a[i][k]) / ((1 + a[i][i]) * sqrt(L4(i, k)))

    def I4(i: int, j: int, k: int, n: int) -> float:
        def own(c: int) -> float:
            crossed = 2 * a[i][j] * a[i][c] * a[j][c]
            return L4(i, j) * (1 + a[c][c]) - a[j][c] ** 2 * (1 + a[i][i]) - a[i][c] ** 2 * (1 + a[j][j]) + crossed

        L0 = L4(i, j) * a[k][n] - a[j][k] * a[j][n] * (1 + a[i][i]) - a[i][k] * a[i][n] * (1 + a[j][j])
        L0 += a[i][j] * a[i][k] * a[j][n] + a[i][j] * a[i][n] * a[j][k]
        return 4 / pi**2 * asin(L0 / sqrt(own(k) * own(n))) / sqrt(L4(i, j))

    return {
        "I2": lambda i, j: 2 / pi * asin(a[i][j] / sqrt((1 + a[i][i]) * (1 + a[j][j]))),
        "I3": I3,
        "I4": I4,
        "J2": lambda i, j: 2 / pi / sqrt(L4(i, j)),
    }


def order_parameter_slope(
    Q: np.ndarray, R: np.ndarray, T: np.ndarray, v: np.ndarray, A: np.ndarray, *,
    learning_rate: float, second_learning_rate: float, weight_decay: float, batch: float, noise: float, activation: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """dQ/dα, dR/dα, dv/dα, term by term as Goldt et al. write them."""
    K, M = R.shape
    C = np.block([[Q, R], [R.T, T]]).tolist()
    I2, I3, I4, J2 = saad_solla(C, activation).values()
    S, B = range(K), range(K, K + M)
    a = dict(zip(B, A, strict=True))
    eta, lam = learning_rate, weight_decay
    dQ, dR, dv = np.zeros((K, K)), np.zeros((K, M)), np.zeros(K)

    def drift(i: int, k: int) -> float:
        return v[i] * (sum(a[m] * I3(i, k, m) for m in B) - sum(v[j] * I3(i, k, j) for j in S))

    for i in S:
        for n in range(M):
            dR[i, n] = eta * drift(i, K + n) - lam * R[i, n]
        for k in S:
            spread = sum(a[n] * a[m] * I4(i, k, n, m) for n in B for m in B)
            spread -= 2 * sum(v[j] * a[n] * I4(i, k, j, n) for j in S for n in B)
            spread += sum(v[j] * v[s] * I4(i, k, j, s) for j in S for s in S)
            dQ[i, k] = eta * (drift(i, k) + drift(k, i)) - 2 * lam * Q[i, k]
            dQ[i, k] += eta**2 / batch * v[i] * v[k] * (spread + noise**2 * J2(i, k))
        if second_learning_rate:
            pulled = sum(a[n] * I2(i, n) for n in B) - sum(v[k] * I2(i, k) for k in S)
            dv[i] = second_learning_rate * pulled - lam * v[i]
    return dQ, dR, dv


def gradient_flow(
    loss: Any, initial: Tensor, *, end: float = 1e9, gradient_tolerance: float = 1e-7, times: Any = None
) -> Any:
    """Gradient flow of one member by SciPy's BDF, rtol 1e-8, with the exact Jacobian."""

    def slope(_t: float, y: np.ndarray) -> np.ndarray:
        return -np.asarray(loss.gradient(torch.from_numpy(y)))

    def arrived(t: float, y: np.ndarray) -> float:
        return float(np.abs(slope(t, y)).max() - gradient_tolerance)

    arrived.terminal = True  # type: ignore[attr-defined]
    return solve_ivp(
        slope,
        (0, end),
        initial.numpy(),
        "BDF",
        t_eval=times,
        events=arrived,
        rtol=1e-8,
        atol=1e-10,
        jac=lambda _t, y: -np.asarray(loss.hessian(torch.from_numpy(y))),
    )
