"""The differential equation of the order parameters: online learning of two-layer networks in infinite dimension.

It needs only Gaussian moments of σ.  With the fields' covariance C, masses m = (v, −A) and the interaction
G(A, B, c) = E[σσ], Price's theorem gives

    I₂ = G,   J₂(a,b) = E[σ'_a σ'_b] = ∂G/∂c,   I₃(a,b,c) = E[σ'_a b σ_c] = 2 C_ab ∂G(a,c)/∂A + C_bc ∂G(a,c)/∂c,

so that every term but one is closed for every activation, and the drift costs two matrix products.  The exception is
the fluctuation of the update, E[σ'_i σ'_k (Δ² + noise²)].

Source: Saad & Solla (1995); Goldt et al. (2019), appendix; Price (1958).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from torch import Tensor

from tsdyn.arguments import NUMBER, NUMBERS, takes
from tsdyn.flow import overlap_matrices as order
from tsdyn.flow.overlap_matrices import Overlaps
from tsdyn.gaussian import interaction
from tsdyn.gaussian.orthants import gated_square
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation

#: Order parameters beyond this count as diverged.
_BEYOND = 1e12

#: (C (field, field), student nodes K) → E[σσ], ½E[σ''σ] and E[σ'σ'] of student with all fields, (K, field) each.
Pairs: TypeAlias = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
#: (C, masses (field,), K) → E[σ'_i σ'_k Δ²], (K, K).
Fluctuation: TypeAlias = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


@takes(Q=NUMBERS, R=NUMBERS, T=NUMBERS, v=NUMBERS, A=NUMBERS, learning_rate=NUMBER, alpha=NUMBERS)
def order_parameters(
    Q: ArrayLike | Tensor,
    R: ArrayLike | Tensor,
    T: ArrayLike | Tensor,
    v: ArrayLike | Tensor | None = None,
    A: ArrayLike | Tensor | None = None,
    *,
    learning_rate: float,
    alpha: ArrayLike,
    second_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    batch: int | float = 1,
    noise: float = 0.0,
    activation: str | Activation = "erf",
    seeds: Sequence[int] | None = None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
) -> xr.Dataset:
    r"""Order parameters over online time α = steps/N in the limit N → ∞, from the given ones at α = 0.

    .. math::
        \dot R_{in} &= \eta v_i E[\sigma'_i r_n \Delta] - \lambda R_{in}, \qquad
        \dot v_i = \eta_2 E[\sigma_i \Delta] - \lambda v_i \;(\eta_2 > 0) \\
        \dot Q_{ik} &= \eta v_i E[\sigma'_i l_k \Delta] + \eta v_k E[\sigma'_k l_i \Delta] - 2 \lambda Q_{ik}
            + \frac{\eta^2}{b} v_i v_k E[\sigma'_i \sigma'_k (\Delta^2 + \varsigma^2)]

    Args:
        Q: w·w/N, (node, node_2); any of Q, R, T, v, A may have a leading dimension with one row per seed.
        R: w·B/N, (node, teacher_node).
        T: B·B/N, (teacher_node, teacher_node_2).
        v: Outgoing weights of the student; ones unless given.
        A: Outgoing weights of the teacher; ones unless given.
        learning_rate: η of the first layer: w += η/√N v σ'(l) Δ x.
        alpha: Increasing times to report, not negative.
        second_learning_rate: η₂ of the second layer: v += η₂/N σ(l) Δ; 0 freezes v.
        weight_decay: λ; each step multiplies every learning weight by 1 − λ/N.
        batch: b, samples per step; ``math.inf`` is gradient flow on the population, for which any activation will do.
        noise: Standard deviation ς of the noise on the teacher's output.
        activation: ``erf`` (erf(x/√2)), ``identity`` or ``relu``; any registered one with an infinite batch.
        seeds: Labels of the leading dimension; 0, 1, … unless given.
        rtol: Allowed local error per step, relative to each order parameter, …
        atol: … and absolute; ``eg`` cannot be more accurate than this.

    Returns:
        Dataset over alpha (and seed): Q, R, v, ``eg`` = ½E[(φ − y)²] against the teacher without noise; T, A; the
        coordinate ``stop_reason``: ``time``, or ``diverged`` if an order parameter exceeded 1e12, with NaN from then
        on.

    Raises:
        ValueError: for shapes that do not fit, overlaps that belong to no weights, times that do not increase, rates,
            batch or noise out of range, and an activation whose fluctuation has no form here.

    Source: Saad & Solla (1995); Goldt et al. (2019).
    """
    sigma = activations.activation(activation) if isinstance(activation, str) else activation
    begin = order.checked("order_parameters", Q, R, T, v, A)
    times = checked_times("order_parameters", alpha)
    rates = Rates(learning_rate, second_learning_rate, weight_decay, batch, noise)
    rates.check("order_parameters")
    fluctuation = None if math.isinf(batch) else _fluctuation(sigma)
    lead = begin.R.shape[:-2]
    if len(lead) > 1 or (seeds is not None and tuple(lead) != (len(seeds),)):
        raise ValueError(f"order_parameters: leading dimensions {tuple(lead)} for seeds {seeds}; give at most one")
    members = [Overlaps(*(x[i] for x in begin)) for i in range(lead[0])] if lead else [begin]
    with torch.no_grad():
        found = [_integrated(member, times, sigma, rates, fluctuation, rtol, atol) for member in members]
        paths = [torch.stack(part) if lead else part[0] for part in zip(*(path for path, _ in found), strict=True)]
        reasons = [reason for _, reason in found]
        labels = None if not lead else list(range(lead[0]) if seeds is None else seeds)
        ds = order.labelled(
            Overlaps(paths[0], paths[1], begin.T, paths[2], begin.A),
            times,
            sigma,
            seeds=labels,
            attrs={"method": "DOP853", "rtol": rtol, "atol": atol, **rates.attrs()},
        )
    what = {"long_name": "why the integration ended"}
    return ds.assign_coords(stop_reason=("seed", reasons, what) if lead else ((), reasons[0], what))


@dataclass(frozen=True)
class Rates:
    """Learning rates, weight decay, batch and noise of online SGD; see `order_parameters`."""

    learning_rate: float
    second_learning_rate: float = 0.0
    weight_decay: float = 0.0
    batch: int | float = 1
    noise: float = 0.0

    def check(self, caller: str) -> None:
        """Raise ValueError for values out of range."""
        for name in ("learning_rate", "second_learning_rate", "weight_decay", "noise"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{caller}: {name}={value}; it is finite and not negative")
        if not self.batch >= 1:
            raise ValueError(f"{caller}: batch={self.batch}; a step sees one sample at least")

    def attrs(self) -> dict[str, float]:
        """The rates as attributes of a Dataset."""
        return {name: float(value) for name, value in vars(self).items()}


def checked_times(caller: str, alpha: ArrayLike) -> np.ndarray:
    """Output times as an array.

    Raises:
        ValueError: if there are none, they do not increase, are negative or not finite.
    """
    times = np.atleast_1d(np.asarray(alpha, dtype=float))
    if times.ndim != 1 or not len(times) or (np.diff(times) <= 0).any() or not np.isfinite(times).all() or times[0] < 0:
        raise ValueError(f"{caller}: alpha must be one or more increasing times from 0 on")
    return times


def _integrated(
    begin: Overlaps,
    times: np.ndarray,
    sigma: Activation,
    rates: Rates,
    fluctuation: Fluctuation | None,
    rtol: float,
    atol: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], str]:
    nodes, teacher_nodes = begin.R.shape
    ends = np.cumsum([nodes * nodes, nodes * teacher_nodes])
    C, A, pairs = begin.covariance.numpy().copy(), begin.A.numpy(), _PAIRS.get(sigma.name) or _pairs(sigma)

    def slope(_alpha: float, y: np.ndarray) -> np.ndarray:
        q, r, v = np.split(y, ends)
        C[:nodes, :nodes] = q.reshape(nodes, nodes)
        C[:nodes, nodes:] = r.reshape(nodes, teacher_nodes)
        C[nodes:, :nodes] = C[:nodes, nodes:].T
        return np.concatenate([x.ravel() for x in _slope(C, v, A, pairs, rates, fluctuation)])

    def within(_alpha: float, y: np.ndarray) -> float:
        return float(_BEYOND - np.abs(y).max())

    within.terminal = True  # type: ignore[attr-defined]
    y = torch.cat([begin.Q.flatten(), begin.R.flatten(), begin.v]).numpy()
    end = max(times[-1], np.finfo(float).tiny)
    solved = solve_ivp(slope, (0.0, end), y, "DOP853", t_eval=times, events=within, rtol=rtol, atol=atol)
    path = np.full((len(times), len(y)), np.nan)
    if len(solved.t):  # none, if it diverged before the first time
        path[: len(solved.t)] = solved.y.T
    q, r, v = (torch.from_numpy(x.copy()) for x in np.split(path, ends, axis=1))
    shaped = q.unflatten(-1, (nodes, nodes)), r.unflatten(-1, (nodes, teacher_nodes)), v
    return shaped, "time" if solved.status == 0 else "diverged"


def _slope(
    C: np.ndarray, v: np.ndarray, A: np.ndarray, pairs: Pairs, rates: Rates, fluctuation: Fluctuation | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives dQ/dα, dR/dα, dv/dα."""
    nodes, m = len(v), np.concatenate([v, -A])
    g, g_A, g_c = pairs(C, nodes)
    # E[σ'_i b Δ] = −Σ_z m_z I₃(i,b,z), of all i and b at once
    along = -(2 * (g_A @ m)[:, None] * C[:nodes] + (g_c * m) @ C)
    drift = rates.learning_rate * v[:, None] * along
    dQ = drift[:, :nodes] + drift[:, :nodes].T - 2 * rates.weight_decay * C[:nodes, :nodes]
    dR = drift[:, nodes:] - rates.weight_decay * C[:nodes, nodes:]
    if fluctuation is not None:
        spread = fluctuation(C, m, nodes)
        if rates.noise:
            spread = spread + rates.noise**2 * g_c[:, :nodes]
        dQ = dQ + rates.learning_rate**2 / rates.batch * np.outer(v, v) * spread
    if not rates.second_learning_rate:
        return dQ, dR, np.zeros_like(v)
    return dQ, dR, -rates.second_learning_rate * (g @ m) - rates.weight_decay * v


def _pairs(sigma: Activation) -> Pairs:
    """`Pairs` function of any activation, from its interaction."""
    kernel = interaction.interaction_of(sigma)

    def pairs(C: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        c = torch.from_numpy(C)
        own = c.diagonal()
        g = kernel.partials(*torch.broadcast_tensors(own[:nodes, None], own, c[:nodes]))
        return g.value.numpy(), g.A.numpy(), g.c.numpy()

    return pairs


def _erf_pairs(C: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`Pairs` function of erf, written out with only the needed terms: for arrays this small each call counts."""
    p, c = 1 + C.diagonal(), C[:nodes]
    root = np.sqrt(p[:nodes, None] * p - c * c)
    slope = (2 / math.pi) / root
    return (2 / math.pi) * np.arctan2(c, root), -slope * c / (2 * p[:nodes, None]), slope


_PAIRS: dict[str, Pairs] = {"erf": _erf_pairs}


def _fluctuation(sigma: Activation) -> Fluctuation:
    if sigma.name in _FLUCTUATIONS:
        return _FLUCTUATIONS[sigma.name]
    raise ValueError(
        f"order_parameters: the fluctuation E[σ'σ'σσ] of {sigma.name} has no form here (it has for "
        f"{', '.join(_FLUCTUATIONS)}). Without it, batch=math.inf is gradient flow on the population; with it, "
        "flow.online simulates in finite dimension"
    )


def _linear(C: np.ndarray, m: np.ndarray, nodes: int) -> np.ndarray:
    """Fluctuation of the identity, whose σ' = 1: E[Δ²] for all pairs."""
    return np.full((nodes, nodes), m @ C @ m)


def _erf(C: np.ndarray, m: np.ndarray, nodes: int) -> np.ndarray:
    """Fluctuation of erf, whose σ'_i σ'_k is a Gaussian factor that changes the fields' covariance.

    It is (2/π)/√L₄ times E[Δ²] at the covariance S = C − C_zq (1 + C_qq)⁻¹ C_qz, q = (i, k), with L₄ = det(1 + C_qq).
    S is L₀/L₄ of Saad & Solla, and 1 + S_cc their L₁/L₄.
    """
    i, k = _triangle(nodes)
    p, q, c = 1 + C[i, i], 1 + C[k, k], C[i, k]
    L4 = p * q - c * c
    both = C[np.stack([i, k], 1)]  # (pair, 2, field)
    inverse = np.stack([q, -c, -c, p], 1).reshape(-1, 2, 2) / L4[:, None, None]
    S = C - both.transpose(0, 2, 1) @ (inverse @ both)
    one = 1 + np.einsum("pzz->pz", S)
    angle = np.arctan2(S, np.sqrt(one[:, :, None] * one[:, None, :] - S * S))
    found = np.empty((nodes, nodes))
    found[i, k] = found[k, i] = (2 / math.pi) ** 2 * (angle @ m @ m) / np.sqrt(L4)
    return found


@lru_cache
def _triangle(nodes: int) -> tuple[np.ndarray, np.ndarray]:
    i, k = np.triu_indices(nodes)
    return i, k


_FLUCTUATIONS: dict[str, Fluctuation] = {"erf": _erf, "identity": _linear, "relu": gated_square}
