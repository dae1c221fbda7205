"""Alignment of student nodes with teacher nodes at the lowest layer, and the data conditions that force it.

The quantities of Tian (2020), Definitions 3–7.  A node is the pair (w, b) of its weight and bias, its boundary the
hyperplane w·x + b = 0.  The definitions assume regular nodes, ‖w‖ = 1; every function here first scales nodes to that.
A boundary has no orientation: (w, b) and (−w, −b) share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tsdyn.axes import Inputs, TeacherByStudent
from tsdyn.networks import node_pairs
from tsdyn.networks.network import Network, require_plain


def regular(network: Network, layer: int = 1) -> tuple[Tensor, Tensor]:
    """Weights and biases of a layer scaled to unit norm: w/‖w‖ (node, input) and b/‖w‖ (node,); NaN for a zero weight.

    Source: Tian (2020), Definition 1.
    """
    require_plain("regular", network)
    weight, bias = network.weights[layer - 1], network.biases[layer - 1]
    found: tuple[Tensor, Tensor] = node_pairs.regular(weight, weight.new_zeros(len(weight)) if bias is None else bias)
    return found


def _lowest(network: Network) -> tuple[Tensor, Tensor]:
    weight, bias = network.weights[0], network.biases[0]
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def alignment(teacher: Network, student: Network) -> TeacherByStudent:
    """Least ε at which teacher node j and student node k are ε-aligned, (teacher_node, node).

    ε_jk = max(sin ∠(w*_j, w_k), |b*_j − s b_k|) with s = sign cos ∠: 0 if both have the same boundary, in either
    orientation.  The sine is computed from the part of w_k orthogonal to w*_j, so that angles far below the square root
    of rounding are resolved.  NaN for a zero weight.  Source: Tian (2020), Definition 3.

    Raises:
        ValueError: if the two take inputs of different width.
    """
    _check_inputs("alignment", teacher, student)
    found: Tensor = node_pairs.epsilon(*_lowest(teacher), *_lowest(student))
    return found


def separation(teacher: Network) -> float:
    """Least alignment ε_0 = min_{j ≠ j'} ε_jj' between two of the teacher's own nodes.

    Infinite for a single node, NaN if all weights are zero.

    Source: Tian (2020), Assumption 3.
    """
    return float(node_pairs.separation(*_lowest(teacher)))


def boundary(network: Network, x: Inputs, eps: float) -> Tensor:
    """Whether each sample lies within ε of each node's boundary, I_w(ε) = {x : |w·x + b| ≤ ε}, (sample, node).

    Nodes are scaled to ‖w‖ = 1.  Source: Tian (2020), Definition 5.
    """
    w, b = regular(network)
    return (x @ w.T + b).abs() <= eps


def observers(teacher: Network, student: Network, x: Inputs, eps: float) -> TeacherByStudent:
    """Share of teacher node j's boundary samples where student node k is active, (teacher_node, node).

    κ_jk = N[I_j(ε) ∩ E_k] / N[I_j(ε)].  Student node k observes j if that is above 0; NaN where no sample lies within ε
    of the boundary.
    Source: Tian (2020), Definition 4 on a finite sample, κ of Theorem 3.

    Raises:
        ValueError: if the two take inputs of different width.
    """
    _check_inputs("observers", teacher, student)
    near = boundary(teacher, x, eps).to(x.dtype)
    weight, bias = student.weights[0], student.biases[0]
    on = (torch.nn.functional.linear(x, weight, bias) > 0).to(x.dtype)
    count = near.sum(0)
    return near.T @ on / torch.where(count > 0, count, torch.nan)[:, None]


def clusters(network: Network, tolerance: float) -> list[list[int]]:
    """Groups of nodes of the lowest layer whose boundaries coincide: ε-aligned within `tolerance`, linked in chains.

    Zero weights have no boundary and form no group.  Source: Tian (2020), Theorem 2 (co-linear students).
    """
    nodes = _lowest(network)
    close = node_pairs.epsilon(*nodes, *nodes) <= tolerance
    left = {int(k) for k in (~torch.isnan(regular(network)[0][:, 0])).nonzero().flatten()}
    found = []
    while left:
        group, front = set(), {min(left)}
        while front:
            group |= front
            front = {int(k) for j in front for k in close[j].nonzero().flatten()} & left - group
        left -= group
        found.append(sorted(group))
    return found


@dataclass(frozen=True)
class ClusterFanout:
    """One group of co-linear student nodes and their joint fan-out.

    Theorem 2: if the group is unaligned and observed often enough, `total` vanishes at a critical point.

    Attributes:
        nodes: Indices in the student's lowest layer.
        total: ‖Σ_k v_k ‖w_k‖‖ over the group, v_k column k of W_2.
        eps: Least ε to any teacher node.
    """

    nodes: list[int]
    total: float
    eps: float


def cluster_fanouts(teacher: Network, student: Network, tolerance: float) -> list[ClusterFanout]:
    """Joint fan-out Σ v ‖w‖ of every group of co-linear nodes of a two-layer student.  Source: Tian (2020), Theorem 2.

    Raises:
        ValueError: if the student is not two-layer, or inputs differ in width.
    """
    if student.depth != 2:
        raise ValueError(
            f"cluster_fanouts: {student!r} has {student.depth} layers; v_k is constant only in two-layer networks"
        )
    eps = alignment(teacher, student)
    scaled = student.weights[1] * student.weights[0].norm(dim=1)
    return [
        ClusterFanout(group, float(scaled[:, group].sum(1).norm()), float(eps[:, group].amin()))
        for group in clusters(student, tolerance)
    ]


def band_density(network: Network, x: Inputs, eps: float) -> Float[Tensor, " node"]:
    """Density of samples at each node's boundary, τ_j(ε) = N[I_j(ε)] / (ε N).  Source: Tian (2020), Assumption 3."""
    return boundary(network, x, eps).to(x.dtype).sum(0) / (eps * len(x))


def eta(networks: list[Network], x: Inputs, eps: float, *, directions: int = 1000, seed: int = 0) -> float:
    """Lower bound of Definition 5's η(ε), the largest density of samples at any hyperplane.

    η̂(ε) = max_w (N[I_w(ε)] − (d+1)) / (ε N), over the networks' nodes and random hyperplanes through samples instead of
    all w.  Source: Tian (2020), Definition 5.
    """
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(directions, x.shape[1], generator=draw, dtype=x.dtype, device="cpu").to(x.device)
    w /= w.norm(dim=1, keepdim=True)
    through = x[torch.randint(len(x), (directions,), generator=draw, device="cpu").to(x.device)]
    random = Network([w], [-(w * through).sum(1)])
    most = max(int(boundary(net, x, eps).sum(0).max()) for net in (*networks, random))
    return (most - (x.shape[1] + 1)) / (eps * len(x))


def mu(x: Inputs) -> float:
    """λ_max(E[x xᵀ]), a value of μ that always satisfies Definition 6 (Chebyshev).  Source: Tian (2020), Eq. 7."""
    return float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])


def jumps(teacher: Network, student: Network, *, tolerance: float) -> Float[Tensor, "teacher_node node"]:
    """Jump of g_k across teacher node j's boundary, for a two-layer pair.

    It is α_kj − Σ_k' β_kk' over the student nodes k' co-linear with teacher node j, and zero for every observer k at a
    critical point.  Nodes are scaled to ‖w‖ = 1, and fan-outs by ‖w‖.  Source: Tian (2020), proof of Theorem 1.

    Args:
        teacher, student: Two-layer, relu or leaky relu.
        tolerance: ε below which a student node counts as co-linear.

    Raises:
        ValueError: if one is not two-layer, or inputs differ in width.
    """
    require_plain("jumps", teacher, student)
    for net in (teacher, student):
        if net.depth != 2:
            raise ValueError(
                f"jumps: {net!r} has {net.depth} layers; the jump is a single number only in two-layer networks"
            )
    v = student.weights[1] * student.weights[0].norm(dim=1)
    v_star = teacher.weights[1] * teacher.weights[0].norm(dim=1)
    colinear = (alignment(teacher, student) <= tolerance).to(v.dtype)
    found: Tensor = (v_star - v @ colinear.T).T @ student.weights[1]
    return found


def _check_inputs(caller: str, teacher: Network, student: Network) -> None:
    require_plain(caller, teacher, student)
    if teacher.widths[0] != student.widths[0]:
        raise ValueError(
            f"{caller}: the teacher takes {teacher.widths[0]} inputs, the student {student.widths[0]}; they must agree"
        )
