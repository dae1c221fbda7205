"""Integrates the approximate dynamics of Tian et al. (2019), "Luck Matters", with the bounds of Theorems 4 and 5.

Both theorems are about the update L*W*H* − LWH (`tsdyn.theory.luck_matters_updates`), not about SGD.  On Gaussian
inputs the overlaps of two nodes whose gates open beyond the same threshold, w·x > h‖w‖, depend only on their angle:

    ψ_d(θ) = P(both gates open),    ψ_l(θ) = E[f f'] of nodes of unit norm.

Both theorems assume small overlaps between different nodes; a high threshold makes them small, at h = 0 they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.special import ndtr, owens_t
from torch import Tensor

from tsdyn.arguments import NETWORK, takes
from tsdyn.networks.network import Network, require_plain
from tsdyn.theory.coupling_moments import Form, check_form, expectations
from tsdyn.theory.couplings import backpropagated_gradients, with_one_node
from tsdyn.theory.inputs import MEMORY, Samples, batches, check_pair

Array: TypeAlias = NDArray[np.float64]

#: Number of angles between unpaired teacher and student nodes at which Assumption 2's ratio is evaluated.
_GRID = 401


def gate_overlap(theta: Array | float, threshold: float = 0.0) -> Array:
    """Probability that both gates open, ψ_d(θ) = P(w·x > h, w'·x > h), for unit w, w' at angle θ, x ~ N(0, I).

    Φ(−h) − 2 T(h, tan θ/2) with Owen's T; (π − θ)/2π at h = 0.  Source: Tian et al. (2019), section 4.2.
    """
    theta = np.asarray(theta, float)
    return np.asarray(ndtr(-threshold) - 2 * owens_t(threshold, np.tan(theta / 2)))


def activation_overlap(theta: Array | float, threshold: float = 0.0) -> Array:
    """Expected product of activations, ψ_l(θ) = E[(w·x − h)₊ (w'·x − h)₊], for unit w, w' at angle θ, x ~ N(0, I).

    The arc-cosine kernel [sin θ + (π − θ) cos θ]/2π at h = 0.  Source: moments of the truncated binormal law
    (Rosenbaum 1961), with Tian et al. (2019), section 4.2.
    """
    theta, h = np.asarray(theta, float), threshold
    half = np.tan(theta / 2)
    density = np.exp(-h * h / 2) / np.sqrt(2 * np.pi)
    return np.asarray(
        (np.cos(theta) + h * h) * gate_overlap(theta, h)
        - 2 * h * density * ndtr(-h * half)
        # h²/(1 + cos θ) = h² / (2 cos² θ/2), written without the 0/0 at θ = π
        + np.sin(theta) / (2 * np.pi) * np.exp(-(h * h) * (1 + half**2) / 2)
    )


def angles(w: Array, w2: Array) -> Array:
    """Angles between rows, (node, node_2), as 2 atan2(‖u − v‖, ‖u + v‖) of unit u, v: exact for small angles too."""
    u, v = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (w, w2))
    apart, together = (np.linalg.norm(u[:, None] + sign * v, axis=2) for sign in (-1, 1))
    return np.asarray(2 * np.arctan2(apart, together))


# --- Theorem 4 -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProjectedRate:
    """Constants of Theorem 4: if γ > 0 and d̄ > 0, every angle obeys sin θ_j(t) ≤ exp(−d̄ γ t) sin θ_0.

    Attributes:
        theta0: Largest angle of a student node with its teacher node.
        K: Assumption 2's constant: |ψ(θ_1) − ψ(θ_2)| ≤ K ψ(θ_1) ‖w_1 − w_2‖ over the pairs that the proof
            compares.
        eps: Assumption 3: max over j ≠ j' of ψ_d between teachers, over ψ_d of a teacher with itself.
        M: (1 + K) (1 + 2 K s)² / cos(θ_0/2), s = sin(θ_0/2).
        gamma: cos θ_0 − (m − 1) eps M.
        d_bar: (1 − 2 K s) ψ_d(0).  The paper prints a plus here; its proof (Eq. 43) needs the minus.
    """

    theta0: float
    K: float
    eps: float
    M: float
    gamma: float
    d_bar: float


def projected_rate(teacher: ArrayLike, initial: ArrayLike, *, threshold: float = 0.0) -> ProjectedRate:
    """Theorem 4's constants for a student that starts at `initial`, node j near teacher node j.

    With δ = θ_j the angle of w_j with w*_j, r_j the pull and P the projection orthogonal to w_j,
    d sin θ_j/dt ≤ −cos θ_j d*_jj sin θ_j + Σ_{j'≠j} ‖d*_jj' w*_j' − d_jj' w_j'‖, and Assumption 2 bounds each term of
    the sum by (1 + K) d*_jj' sin θ_j' / cos(θ_j'/2), Assumption 3 then d*_jj' by eps (1 + 2Ks)² d*_jj.

    Args:
        teacher: (node, input), any norms; directions count.
        initial: The same shape.
        threshold: h of all gates.

    Source: Tian et al. (2019), Theorem 4 and its proof, Eqs. 41–43, rederived.

    Raises:
        ValueError: for shapes that differ, fewer than two nodes or zero weights.
    """
    w_star, w = _nodes("projected_rate", teacher, initial)
    theta0 = float(angles(w_star, w).diagonal().max())
    between = angles(w_star, w_star)[~np.eye(len(w), dtype=bool)]
    own = float(gate_overlap(0.0, threshold))
    s = np.sin(theta0 / 2)
    # θ_1 of the pairs compared: a student with its teacher, and with any other teacher
    others = np.linspace(max(theta0, between.min() - theta0), min(np.pi, between.max() + theta0), _GRID)
    k = _relative_slope(np.append(others, theta0), theta0, threshold)
    eps = float(gate_overlap(between, threshold).max() / own)
    m = (1 + k) * (1 + 2 * k * s) ** 2 / np.cos(theta0 / 2)
    gamma = np.cos(theta0) - (len(w) - 1) * eps * m
    return ProjectedRate(theta0, k, eps, float(m), float(gamma), float((1 - 2 * k * s) * own))


def _relative_slope(theta: Array, apart: float, threshold: float) -> float:
    """Assumption 2's K: the largest |ψ(θ_1) − ψ(θ_2)| / (ψ(θ_1) 2 sin|θ_1 − θ_2|/2) for θ_2 within `apart` of θ_1.

    ψ_d falls and is convex, ψ_d' = −exp(−h²/(1 + cos θ))/2π, so the steepest secant goes to θ_2 = θ_1 − apart.
    """
    apart = max(apart, 1e-6)  # the tangent, for a student that starts at the teacher
    psi, before = gate_overlap(theta, threshold), gate_overlap(np.maximum(theta - apart, 0), threshold)
    with np.errstate(divide="ignore", invalid="ignore"):  # nodes that never share a sample: no bound
        return float(np.nan_to_num((before - psi) / (psi * 2 * np.sin(apart / 2)), nan=np.inf).max())


def projected_dynamics(
    teacher: ArrayLike,
    initial: ArrayLike,
    times: Sequence[float] | Array,
    *,
    threshold: float = 0.0,
    rtol: float = 1e-10,
) -> xr.Dataset:
    """Integrate Theorem 4's dynamics of the lowest layer, w_j' = P⊥_{w_j} Σ_j' (d*_jj' w*_j' − d_jj' w_j').

    They assume L = I, β = 11ᵀ and norms of the weights that BatchNorm conserves.

    Args:
        teacher: (node, input); scaled to unit norm.
        initial: The same shape; scaled to unit norm; node j is compared with teacher node j.
        times: Output times, increasing, from 0; one unit is a learning rate of 1 per step.
        threshold: h, of all gates.
        rtol: Of the integration (DOP853).

    Returns:
        Dataset over (time, node): ``angle`` θ_j in radians, ``bound``, the arcsin of Theorem 4's envelope (NaN if γ ≤ 0
        or d̄ ≤ 0: the hypothesis is not met), ``drift`` |‖w_j‖ − 1|; ``weight`` over (time, node, input_node);
        attributes: the `ProjectedRate`.

    Source: Tian et al. (2019), Theorem 4.

    Raises:
        ValueError: as `projected_rate`, or for times that do not increase from 0.
    """
    w_star, w0 = _nodes("projected_dynamics", teacher, initial)
    rate = projected_rate(w_star, w0, threshold=threshold)

    def pull(w: Array) -> Array:
        r = gate_overlap(angles(w, w_star), threshold) @ w_star - gate_overlap(angles(w, w), threshold) @ w
        return np.asarray(r - (r * w).sum(1, keepdims=True) * w / (w * w).sum(1, keepdims=True))

    path = _integrated("projected_dynamics", pull, w0, times, rtol)
    angle = np.stack([angles(w_star, w).diagonal() for w in path])
    met = rate.gamma > 0 and rate.d_bar > 0
    when = np.asarray(times, float)
    bound = np.arcsin(np.exp(-rate.d_bar * rate.gamma * when) * np.sin(rate.theta0)) if met else when * np.nan
    return xr.Dataset(
        {
            "weight": (("time", "node", "input_node"), path),
            "angle": (("time", "node"), angle, {"units": "rad"}),
            "bound": (("time",), bound, {"units": "rad"}),
            "drift": (("time", "node"), np.abs(np.linalg.norm(path, axis=2) - 1)),
        },
        {"time": when},
        attrs=vars(rate) | {"threshold": threshold},
    )


# --- Theorem 5 -----------------------------------------------------------------------------------------------


def two_layer_dynamics(
    teacher: tuple[ArrayLike, ArrayLike],
    initial: tuple[ArrayLike, ArrayLike],
    times: Sequence[float] | Array,
    *,
    threshold: float = 0.0,
    rtol: float = 1e-10,
) -> xr.Dataset:
    """Integrate Theorem 5's dynamics of a two-layer student, V' = L* V* − L V and W' = H* W* − H W.

    H = (V Vᵀ) ∘ D and H* = (V V*ᵀ) ∘ D*, with rows for nodes, L_jj' = ‖w_j‖‖w_j'‖ ψ_l(θ_jj') and D_jj' = ψ_d(θ_jj').
    Teacher node j's lucky student u(j) is the node closest in direction at the start; all others are the rest r.  The
    theorem: w_u → w*, v_u → v*, v_r → 0, and w_r hardly moves.  The updates leave open how a node's scale is divided
    between ‖w‖ and ‖v‖, so what is compared are directions of w, and ‖w‖ v.

    Every term of w_r' carries v_r, so ‖w_r(t) − w_r(0)‖ ≤ ∫ c_r ‖v_r‖ dt,
    c_r = Σ_j' ‖v*_j'‖ d*_rj' ‖w*_j'‖ + Σ_j' ‖v_j'‖ d_rj' ‖w_j'‖: the bound returned, integrated along the path.
    Once the weights stand still, V decays by L alone, no slower than exp(−λ_min(L) t): the `rate` returned.

    Args:
        teacher: W* (node, input) and V* (node, output): row j of V* is the fan-out of node j.
        initial: W and V of the student, as many nodes or more.
        times: Output times, increasing, from 0.
        threshold: h of all gates, in units of ‖w‖.
        rtol: Of the integration (DOP853).

    Returns:
        ``weight`` (time, node, input_node), ``fanout`` (time, node, output); over (time, teacher_node): ``angle`` of
        w_u(j) with w*_j in radians and ``fanout_error`` ‖‖w_u‖ v_u − ‖w*_j‖ v*_j‖; over (time, node): ``fanout_norm``
        ‖w_k‖‖v_k‖, ``displacement`` ‖w_k(t) − w_k(0)‖ and ``displacement_bound``; over time: ``rate`` λ_min(L).
        Coordinates: ``lucky`` (teacher_node) the student u(j), ``rest`` (node) whether k is none of them.

    Source: Tian et al. (2019), Theorem 5 and Lemmas 5–7; the paper's envelopes need overlaps far smaller than a
    Gaussian teacher has, and are replaced by those above, which hold for every start.

    Raises:
        ValueError: for shapes that do not fit, zero weights, or two teacher nodes with one lucky student.
    """
    caller = "two_layer_dynamics"
    w_star, v_star, w0, v0 = _two_layers(caller, teacher, initial)
    lucky = angles(w_star, w0).argmin(1)
    if len(set(lucky)) < len(lucky):
        raise ValueError(
            f"{caller}: lucky students {lucky.tolist()} repeat: one student is the closest to two teacher nodes, which "
            "the theorem excludes; start from more students, or closer to the teacher"
        )
    nodes, inputs = w0.shape
    equations = _TwoLayerEquations(w_star, v_star, threshold)
    start = np.concatenate([w0, v0, np.zeros((nodes, 1))], 1)
    path = _integrated(caller, equations.derivative, start, times, rtol)
    w, v, bound = path[..., :inputs], path[..., inputs:-1], path[..., -1]
    rest = np.ones(nodes, bool)
    rest[lucky] = False
    regular = np.linalg.norm(w, axis=2, keepdims=True) * v
    target = np.linalg.norm(w_star, axis=1, keepdims=True) * v_star
    angle = np.stack([angles(now[lucky], w_star).diagonal() for now in w])
    rate = np.array([np.linalg.eigvalsh(equations.overlaps(now, now)[1])[0] for now in w])
    over = ("time", "node")
    return xr.Dataset(
        {
            "weight": ((*over, "input_node"), w),
            "fanout": ((*over, "output"), v),
            "angle": (("time", "teacher_node"), angle, {"units": "rad"}),
            "fanout_error": (("time", "teacher_node"), np.linalg.norm(regular[:, lucky] - target, axis=2)),
            "fanout_norm": (over, np.linalg.norm(regular, axis=2)),
            "displacement": (over, np.linalg.norm(w - w0, axis=2)),
            "displacement_bound": (over, bound),
            "rate": (("time",), rate),
        },
        {
            "time": np.asarray(times, float),
            "lucky": ("teacher_node", lucky),
            "rest": ("node", rest),
        },
        attrs={"threshold": threshold},
    )


def _two_layers(
    caller: str, teacher: tuple[ArrayLike, ArrayLike], initial: tuple[ArrayLike, ArrayLike]
) -> tuple[Array, Array, Array, Array]:
    """W*, V*, W and V, of shapes that fit together and without zero weight vectors."""
    w_star, v_star = (np.asarray(a, float) for a in teacher)
    w, v = (np.asarray(a, float) for a in initial)
    if any(a.ndim != 2 for a in (w_star, v_star, w, v)) or (
        w_star.shape[1] != w.shape[1] or v_star.shape[1] != v.shape[1] or len(w_star) != len(v_star)
        or len(w) != len(v)
    ):  # fmt: skip
        raise ValueError(
            f"{caller}: teacher {w_star.shape}, {v_star.shape} and student {w.shape}, {v.shape}; each is "
            "W (node, input) and V (node, output), of one input and one output width"
        )
    _no_zero(caller, w_star, w)
    return w_star, v_star, w, v


@dataclass(frozen=True)
class _TwoLayerEquations:
    """The equations of `two_layer_dynamics` for one teacher; a state is [W, V, bound], one row per student node."""

    w_star: Array
    v_star: Array
    threshold: float

    def overlaps(self, w: Array, w2: Array) -> tuple[Array, Array]:
        """D and L of the nodes `w` with the nodes `w2`."""
        theta = angles(w, w2)
        norms = np.linalg.norm(w, axis=1)[:, None] * np.linalg.norm(w2, axis=1)
        return gate_overlap(theta, self.threshold), norms * activation_overlap(theta, self.threshold)

    def derivative(self, state: Array) -> Array:
        """[W', V', c ‖v‖]."""
        w, v = np.split(state[:, :-1], [self.w_star.shape[1]], axis=1)
        (gates_star, joint_star), (gates, joint) = self.overlaps(w, self.w_star), self.overlaps(w, w)
        w_dot = (v @ self.v_star.T * gates_star) @ self.w_star - (v @ v.T * gates) @ w
        v_dot = joint_star @ self.v_star - joint @ v
        size = [np.linalg.norm(a, axis=1) for a in (w, v, self.w_star, self.v_star)]
        c = gates_star @ (size[2] * size[3]) + gates @ (size[0] * size[1])
        return np.concatenate([w_dot, v_dot, (c * size[1])[:, None]], 1)


# --- what may be asked ---------------------------------------------------------------------------------------


def _integrated(
    caller: str, derivative: Callable[[Array], Array], start: Array, times: Sequence[float] | Array, rtol: float
) -> Float[np.ndarray, "time node state"]:
    when = np.asarray(times, float)
    if when.ndim != 1 or len(when) < 2 or when[0] != 0 or not (np.diff(when) > 0).all() or not np.isfinite(when[-1]):
        raise ValueError(f"{caller}: times={when}; output times must increase from 0, at least two")
    found = solve_ivp(
        lambda _, y: derivative(y.reshape(start.shape)).ravel(),
        (0.0, when[-1]),
        start.ravel(),
        method="DOP853",
        t_eval=when,
        rtol=rtol,
        atol=rtol * 1e-3,
    )
    if not found.success:
        raise RuntimeError(f"{caller}: {found.message}")
    return np.asarray(found.y.T.reshape(-1, *start.shape))


def _nodes(caller: str, teacher: ArrayLike, initial: ArrayLike) -> tuple[Array, Array]:
    w_star, w = np.asarray(teacher, float), np.asarray(initial, float)
    if w_star.ndim != 2 or w_star.shape != w.shape or len(w) < 2:
        raise ValueError(
            f"{caller}: teacher {w_star.shape} and initial {w.shape}; both are (node, input) with as many nodes, "
            "two at least: the theorem pairs student node j with teacher node j"
        )
    _no_zero(caller, w_star, w)
    return w_star / np.linalg.norm(w_star, axis=1, keepdims=True), w / np.linalg.norm(w, axis=1, keepdims=True)


def _no_zero(caller: str, *weights: Array) -> None:
    for w in weights:
        if not (np.isfinite(w).all() and (np.linalg.norm(w, axis=1) > 0).all()):
            raise ValueError(f"{caller}: a weight vector is zero or not finite; it has no direction")


@dataclass(frozen=True)
class WeightUpdate:
    """The true update E[f_{l−1} g_lᵀ] of one layer and the theory's approximation, (node, input_node+1), bias last.

    Attributes:
        layer: l = 1..L.
        exact: The true negative gradient of J.
        approximate: L* W* H* − L W H.
        gap: ‖approximate − exact‖ / ‖exact‖.
        cosine: Cosine of the angle between the two.
    """

    layer: int
    exact: Tensor
    approximate: Tensor

    @property
    def gap(self) -> float:
        """‖approximate − exact‖ / ‖exact‖."""
        return float((self.approximate - self.exact).norm() / self.exact.norm())

    @property
    def cosine(self) -> float:
        """Cosine of the angle between `approximate` and `exact`."""
        a, b = self.exact.flatten(), self.approximate.flatten()
        return float(a @ b / (a.norm() * b.norm()))


@takes(student=NETWORK, teacher=NETWORK)
def luck_matters_updates(
    student: Network,
    teacher: Network,
    x: Samples,
    *,
    form: Form = "product",
    memory: int = MEMORY,
) -> list[WeightUpdate]:
    """Theorem 2's update L*_{l−1} W*_l H*_l − L_{l−1} W_l H_l and the true E[f_{l−1} g_lᵀ] of every layer l = 1..L.

    All matrices include the constant nodes, so that biases are exact.  The formula assumes E[β f'f' f f] =
    E[β f'f'] E[f f] (Assumption 1): it is exact at the top layer, where H is the identity, and an approximation below,
    whose `gap` should be reported and not assumed small.  Source: Tian et al. (2019), Theorem 2.

    Raises:
        ValueError: as `lemma1_residual`, or for another form.
    """
    caller = "luck_matters_updates"
    check_form(caller, form)
    require_plain(caller, student, teacher)
    check_pair(caller, student, teacher)
    for net in (student, teacher):
        if not net.activation.piecewise_linear:
            raise ValueError(f"{caller}: {net.activation.name} is smooth; the update needs σ(z) = σ'(z) z")
    means = _means(student, teacher, x, form=form, memory=memory)
    updates = []
    for layer in range(1, student.depth + 1):
        sides = []
        for star, net in (("*", teacher), ("", student)):
            weight = _augmented_weight(net, layer)
            if layer == student.depth:  # β is the identity, and so is the gate: the output itself, no constant node
                inner = weight[:-1]
            else:
                match form:
                    case "product":
                        h = means[f"β{star}"][layer - 1] * means[f"D{star}"][layer - 1]
                    case "joint":
                        h = means[f"βD{star}"][layer - 1]
                    case other:
                        assert_never(other)
                inner = h[:-1] @ weight  # rows of the student's own nodes; its constant node is not trained
            sides.append(inner @ means[f"L{star}"][layer - 1].T)
        updates.append(WeightUpdate(layer, means["exact"][layer - 1], sides[0] - sides[1]))
    return updates


def _means(student: Network, teacher: Network, x: Samples, *, form: Form, memory: int) -> dict[str, list[Tensor]]:
    """Means over all samples of what the update is made of, by layer, with the constant nodes."""
    caller = "luck_matters_updates"
    with_constant, taught_constant = _with_constant_nodes(student), _with_constant_nodes(teacher)
    means: dict[str, list[Tensor]] = {}
    samples = 0
    with torch.no_grad():
        numbers = 3 * (sum(student.widths) + sum(teacher.widths))
        for part in batches(caller, x, student, teacher, numbers=numbers, memory=memory):
            ones = with_one_node(part)
            found = expectations(with_constant, taught_constant, ones, form=form, memory=memory)
            own, taught = student.trace(part), teacher.trace(part)
            gradients = backpropagated_gradients(student, own, taught.output - own.output)
            below = [ones, *map(with_one_node, own.activations[:-1])]
            more = {
                "exact": [g.T @ f / len(part) for g, f in zip(gradients, below, strict=True)],
                "L": [ones.T @ ones / len(part), *found.L],
                "L*": [ones.T @ ones / len(part), *found.L_star],
                "β": found.B,
                "β*": found.A,
                "D": found.D,
                "D*": found.D_star,
                "βD": found.H,
                "βD*": found.H_star,
            }
            samples += len(part)
            share = len(part) / samples
            for name, layers in more.items():  # running means over all samples until now
                held = means.setdefault(name, layers)
                means[name] = [m + share * (own - m) for m, own in zip(held, layers, strict=True)]
    return means


def _with_constant_nodes(net: Network) -> Network:
    """The same function of [x; 1] without biases: every hidden layer has a constant node, which is 1, as its last."""
    weights = [_augmented_weight(net, layer) for layer in range(1, net.depth + 1)]
    weights[-1] = weights[-1][:-1]
    kind = net.activation
    return Network(weights, None, kind.name, leak=kind.leak or 0.0, gate_at_zero=net.gate_at_zero)


def _augmented_weight(net: Network, layer: int) -> Tensor:
    """Weight matrix with the constant node, [W̃, b; 0, 1], (node+1, input_node+1)."""
    weight, bias = net.weights[layer - 1], net.biases[layer - 1]
    column = weight.new_zeros(len(weight)) if bias is None else bias
    top = torch.cat([weight, column.unsqueeze(1)], 1)
    last = torch.zeros_like(top[:1])
    last[0, -1] = 1
    return torch.cat([top, last])
