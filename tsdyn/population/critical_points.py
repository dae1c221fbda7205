"""Copy-average and perturbed-copy points: critical points of the population loss, constructed without random seeds.

A student of n nodes can assign to each node a group of the k nodes of a unit-orthonormal teacher: a group of one is
copied, a larger one averaged by the one-neuron optimum.  For erf every such point is critical, and the one of least
loss has groups (1, …, 1, k−n+1).  For tanh a critical point lies within 1e-3 of each; for σ that is not odd there is
one near the point of least loss.  In a perturbed copy, which exists for n < k only, every node copies one teacher node
and mixes in the others.  Perturbed points are found from reduced problems of a few parameters, whose critical points
are critical for the full problem (symmetric criticality).

Source: Simsek et al. (2023), sections 4 and 5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from tsdyn.arguments import NETWORK, SIGMA, WHOLE, takes
from tsdyn.flow.flows import gradient_flow
from tsdyn.flow.stationary import Loss, polish
from tsdyn.gaussian import interaction
from tsdyn.networks.network import Network, require_plain
from tsdyn.population.two_layer_loss import PopulationLoss

#: Largest deviation from orthonormality of a teacher that counts as orthonormal.
_ORTHONORMAL = 1e-10
_LARGEST_NORM = 50.0
#: Odd activations, for which a node and its outgoing weight may change sign together.
ODD = ("erf", "tanh", "identity")
#: Activations whose copy-average points are critical: those with E[σ'(r x)] a r/√m = E[σ'(x)] at the one-neuron optimum
#: (r, a) of every m, so that a node's error has no gradient in the other nodes.  It holds for erf and the identity, but
#: not for odd σ in general.
EXACT = ("erf", "identity")


@dataclass(frozen=True)
class OneNeuron:
    """The best single neuron against k unit-orthonormal teacher neurons, a σ(w·x) with w = norm · (1, …, 1)/√k.

    Attributes:
        norm: |w|; for piecewise linear σ, where only norm · outgoing matters, the balanced choice |w| = a.
        outgoing: a.
        loss: L*(k), without ½.
    """

    norm: float
    outgoing: float
    loss: float


@takes(activation=SIGMA, k=WHOLE)
@lru_cache(maxsize=256)
def one_neuron(activation: str, k: int, *, leak: float = 0.01) -> OneNeuron:
    """The one-neuron optimum against k unit-orthonormal teacher neurons of outgoing weight 1.

    For erf norm 1/√(2k−1), outgoing k, loss k/3 − (2k²/π) asin(1/2k); for piecewise linear σ also in closed form.  For
    any other the best outgoing weight is a = k g(r, 1, 1/√k)/g(r, r, 1), and r is found by one-dimensional search.

    Raises:
        ValueError: for k < 1, an unknown activation, or one whose optimum is not at a finite norm.

    Source: Simsek et al. (2023), Theorem 4.2; rederived (docs/theory).

    Examples:
        >>> from tsdyn import population
        >>> best = population.one_neuron("erf", 3)
        >>> bool(best.loss > 0), bool(best.outgoing > 1)
        (True, True)
    """
    if k < 1:
        raise ValueError(f"one_neuron: k={k}; a teacher has at least one neuron")
    kernel = interaction.interaction_of(activation, leak=leak)
    u = 1 / math.sqrt(k)

    def g(r1: float, r2: float, rho: float) -> float:
        return float(interaction.in_cosine(activation, r1, r2, rho, leak=leak))

    power = k * g(1.0, 1.0, 1.0) + k * (k - 1) * g(1.0, 1.0, 0.0)
    if activation == "erf":
        loss = k / 3 - (2 * k * k / math.pi) * math.asin(1 / (2 * k))
        return OneNeuron(1 / math.sqrt(2 * k - 1), float(k), loss if k > 1 else 0.0)
    if kernel.homogeneous:
        own = g(1.0, 1.0, 1.0)
        product = k * g(1.0, 1.0, u) / own
        return OneNeuron(math.sqrt(product), math.sqrt(product), power - product**2 * own if k > 1 else 0.0)

    def explained(log_r: float) -> float:
        r = math.exp(log_r)
        return -((k * g(r, 1.0, u)) ** 2) / g(r, r, 1.0)

    def slope(log_r: float) -> float:  # derivative of the log of the explained part of the loss, in log r
        r = math.exp(log_r)
        mixed = interaction.derivatives(activation, r, 1.0, u)
        own = interaction.derivatives(activation, r, r, 1.0)
        ahead = 2 * float(mixed.gradient[0] / mixed.value)
        return r * (ahead - float(own.gradient[0] + own.gradient[1]) / float(own.value))

    grid = np.linspace(math.log(1e-3), math.log(_LARGEST_NORM), 60)
    best = int(np.argmin([explained(x) for x in grid]))
    if best in (0, len(grid) - 1):
        raise ValueError(
            f"one_neuron: for {activation} and k={k} the loss falls towards norm {math.exp(grid[best]):.3g}; "
            "no finite optimum"
        )
    log_r = float(brentq(slope, grid[best - 1], grid[best + 1], xtol=1e-15, rtol=1e-15))
    r = math.exp(log_r)
    return OneNeuron(r, k * g(r, 1.0, u) / g(r, r, 1.0), power + explained(log_r) if k > 1 else 0.0)


@takes(k=WHOLE, n=WHOLE)
def partitions(k: int, n: int) -> Iterator[tuple[int, ...]]:
    """All ways to write k as a sum of n positive integers in increasing order: the possible group sizes of n nodes."""

    def rest(total: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
        if parts == 1:
            yield (total,)
            return
        for first in range(least, total // parts + 1):
            for others in rest(total - first, parts - 1, first):
                yield (first, *others)

    if 1 <= n <= k:
        yield from rest(k, n, 1)


@takes(activation=SIGMA, teacher=NETWORK)
def copy_average(activation: str, teacher: Network, groups: Sequence[int] | Sequence[Sequence[int]]) -> Network:
    """The student whose node i averages the i-th group of teacher nodes, or copies it if the group has one node.

    For erf and identity that point is critical, with loss Σ L*(size).  For another odd σ (tanh) the critical point
    nearby is returned, polished to |∇| ≤ 1e-12.  For σ that is not odd there may be no critical point nearby, and the
    construction itself is returned, which is not critical; `perturbed_copy_average` gives the critical point for groups
    (1, …, 1, k−n+1).

    Args:
        activation: The teacher's.
        teacher: Unit-orthonormal incoming weights, equal outgoing weights, no biases.
        groups: Sizes of groups of consecutive teacher nodes, or lists of the nodes of each group; every node once.

    Raises:
        ValueError: for any other teacher, an activation that is not the teacher's, groups that do not
            partition its nodes, or an odd σ with no critical point near.

    Source: Simsek et al. (2023), Theorem 5.1 (erf).

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import population
        >>> teacher = tsdyn.Network([torch.eye(3, 4).double(), torch.ones(1, 3).double()], activation="erf")
        >>> population.copy_average("erf", teacher, [[0], [1, 2]]).widths  # copies node 0, averages 1 and 2
        (4, 2, 1)
    """
    b = unit_orthonormal("copy_average", teacher)
    if activation != teacher.activation.name:
        raise ValueError(f"copy_average: activation={activation!r}, the teacher's is {teacher.activation.name!r}")
    k = teacher.widths[1]
    members = _groups(groups, k)
    leak = teacher.activation.leak
    rows, outgoing = [], []
    for group in members:
        best = one_neuron(activation, len(group), leak=0.01 if leak is None else leak)
        rows.append(best.norm / math.sqrt(len(group)) * teacher.weights[0][group].sum(0))
        outgoing.append(best.outgoing * b)
    made = Network([torch.stack(rows), torch.stack(outgoing, 1)], activation=activation, leak=leak or 0.0)
    return _critical(made, teacher, groups) if activation in ODD and activation not in EXACT else made


def _critical(near: Network, teacher: Network, groups: Sequence[int] | Sequence[Sequence[int]]) -> Network:
    """The critical point of the population loss that Newton's method finds from a network nearby."""
    loss = PopulationLoss(teacher, near.widths[1])
    end = polish(loss, loss.pack([near]))
    if end.kind[0] == "not stationary":
        raise ValueError(
            f"copy_average: for {teacher.activation.name} and groups={groups} there is no critical point near the "
            f"copy-average point (|∇| = {float(end.gradient_max[0]):.2g} where it was looked for)"
        )
    return loss.network(end.point[0])


def _groups(groups: Sequence[int] | Sequence[Sequence[int]], k: int) -> list[list[int]]:
    sizes = [g for g in groups if isinstance(g, int)]
    if len(sizes) == len(groups):
        ends = np.cumsum([0, *sizes]).tolist()
        members = [list(range(low, high)) for low, high in itertools.pairwise(ends)]
    else:
        members = [[int(j) for j in g] for g in groups if not isinstance(g, int)]
    if sorted(j for g in members for j in g) != list(range(k)) or not all(members):
        raise ValueError(
            f"copy_average: groups={groups} do not partition the {k} teacher nodes; every node is in one group, and "
            "a student has at most as many nodes as the teacher"
        )
    return members


def unit_orthonormal(caller: str, teacher: Network) -> Float[Tensor, " output"]:
    """The common outgoing weight of a unit-orthonormal teacher; raises ValueError for any other teacher."""
    require_plain(caller, teacher)
    v, b = teacher.weights[0].detach(), teacher.weights[1].detach()
    eye = torch.eye(len(v), dtype=v.dtype, device=v.device)
    off = float((v @ v.T - eye).abs().max())
    spread = float((b - b[:, :1]).abs().max())
    if teacher.depth != 2 or off > _ORTHONORMAL or spread > _ORTHONORMAL:
        raise ValueError(
            f"{caller}: the teacher's incoming weights must be orthonormal (they are off by {off:.2g}) and its "
            f"outgoing weights equal (they spread by {spread:.2g}); the closed forms hold for no other"
        )
    return b[:, 0]


# --- reduced problems ----------------------------------------------------------------------------------------


class ReducedLoss:
    """A loss restricted to the subspace θ = basis @ s, as a loss of s.

    If the subspace is the set of fixed points of a symmetry of the loss, a critical point on it is critical for the
    whole loss (symmetric criticality).
    """

    def __init__(self, loss: Loss, basis: Float[Tensor, "parameter reduced"], flat_directions: int = 0) -> None:
        self.whole, self.basis = loss, basis
        self.parameters = basis.shape[1]
        self._flat_directions = flat_directions

    @property
    def dtype(self) -> torch.dtype:
        """Type of the whole loss."""
        return self.whole.dtype

    @property
    def flat_directions(self) -> int:
        """Number of zero eigenvalues from the symmetries that map the subspace to itself."""
        return self._flat_directions

    def value(self, parameters: Tensor) -> Tensor:
        """Value L(basis s)."""
        return self.whole.value(parameters @ self.basis.T)

    def gradient(self, parameters: Tensor) -> Tensor:
        """Gradient basisᵀ ∇L."""
        return self.whole.gradient(parameters @ self.basis.T) @ self.basis

    def hessian(self, parameters: Tensor) -> Tensor:
        """Hessian basisᵀ ∇²L basis."""
        return self.basis.T @ self.whole.hessian(parameters @ self.basis.T) @ self.basis

    def least_norm(self, parameters: Tensor) -> Tensor:
        """Distance of the whole loss's row from where that loss is not differentiable."""
        return self.whole.least_norm(parameters @ self.basis.T)

    def labelled(self, parameters: Tensor) -> Mapping[str, tuple[tuple[str, ...], Tensor]]:
        """Named parts of the whole loss's rows."""
        return self.whole.labelled(parameters @ self.basis.T)


def _subspace(loss: PopulationLoss, patterns: Sequence[tuple[list[int], np.ndarray]], b: Tensor) -> Tensor:
    """Basis of a subspace of students: one vector per pattern (nodes, C), then one per distinct set of nodes.

    A pattern's vector is C (node, teacher_node) times the teacher's weights v, as weights of the student; a set's
    vector has outgoing weight `b` at its nodes.
    """
    v = loss.teacher.weights[0]
    columns = []
    for _, pattern in patterns:
        w = torch.as_tensor(pattern, dtype=v.dtype, device=v.device) @ v
        columns.append(torch.cat([w.flatten(), w.new_zeros(loss.nodes * loss.outputs)]))
    for nodes in dict.fromkeys(tuple(nodes) for nodes, _ in patterns):
        a = v.new_zeros(loss.nodes, loss.outputs)
        a[list(nodes)] = b
        columns.append(torch.cat([v.new_zeros(loss.nodes * loss.inputs), a.flatten()]))
    return torch.stack(columns, 1)


def _solved(caller: str, loss: PopulationLoss, basis: Tensor, start: Sequence[float], flat: int) -> Network:
    reduced = ReducedLoss(loss, basis, flat)
    begin = torch.tensor([list(start)], dtype=loss.dtype, device=basis.device)
    flow = gradient_flow(reduced, begin, gradient_tolerance=1e-9)
    end = polish(reduced, torch.from_numpy(flow["final"].values))
    if end.kind[0] not in ("minimum", "degenerate"):
        raise ValueError(
            f"{caller}: no minimum of the reduced problem was reached from a copy of each node: the flow stopped by "
            f"{flow['stop_reason'].item()!r} at |∇| = {float(end.gradient_max[0]):.2g}"
        )
    return loss.network(basis @ end.point[0])


@takes(teacher=NETWORK, nodes=WHOLE)
def perturbed_copy(teacher: Network, nodes: int) -> Network:
    """The perturbed n-copy (P-n-C): every node copies one teacher node and mixes in the others equally.

    w_i = p v_i + q Σ_{copied j ≠ i} v_j + t Σ_{not copied} v_j, a_i = a: the minimum of this 4-parameter problem that
    gradient flow from near exact copies reaches.  It is critical for the whole loss, but a minimum of it only from some
    n on (`critical_point_kinds.phase_boundaries`).

    Args:
        teacher: Unit-orthonormal incoming weights, equal outgoing weights, no biases.
        nodes: n < k, the nodes of the student.

    Raises:
        ValueError: for n ≥ k, another teacher, or if the flow reaches no minimum.

    Source: Simsek et al. (2023), section 5 (P-n-C).
    """
    b, k = unit_orthonormal("perturbed_copy", teacher), teacher.widths[1]
    _fewer("perturbed_copy", nodes, k)
    loss = PopulationLoss(teacher, nodes)
    every = list(range(nodes))
    own = np.eye(nodes, k)
    copied, other = (np.arange(k) < nodes) - own, np.ones((nodes, k)) * (np.arange(k) >= nodes)
    patterns = [(every, own), (every, other)] if nodes == 1 else [(every, own), (every, copied), (every, other)]
    # start with a small t of the right sign: the part of the others that a node of unit norm can explain
    start = [1.0, *([0.0] if nodes > 1 else []), 0.1, 1.0]
    return _solved("perturbed_copy", loss, _subspace(loss, patterns, b), start, _flat(loss, 1))


@takes(teacher=NETWORK, nodes=WHOLE)
def perturbed_copy_average(teacher: Network, nodes: int) -> Network:
    """The critical point near the copy-average point with groups (1, …, 1, k−n+1), for σ that makes the latter no
    critical point.

    w_i = p v_i + q Σ_{other copies} v_j + t Σ_rest v_j for the n−1 nodes that copy, and
    w_n = x Σ_copies v_j + y Σ_rest v_j.  For erf it is the copy-average point itself.

    Args:
        teacher: Unit-orthonormal incoming weights, equal outgoing weights, no biases.
        nodes: n < k, the nodes of the student.

    Raises:
        ValueError: for n ≥ k, another teacher, or if the flow reaches no minimum.

    Source: Simsek et al. (2023), section 5 and Figure 1 (relu).
    """
    b, k = unit_orthonormal("perturbed_copy_average", teacher), teacher.widths[1]
    _fewer("perturbed_copy_average", nodes, k)
    loss = PopulationLoss(teacher, nodes)
    copies = list(range(nodes - 1))
    average = np.zeros((nodes, k))
    average[-1, nodes - 1 :] = 1
    patterns = []
    best = one_neuron(teacher.activation.name, k - nodes + 1, leak=teacher.activation.leak or 0.0)
    start = []
    if nodes > 1:
        own, rest, onto = np.zeros((nodes, k)), np.zeros((nodes, k)), np.zeros((nodes, k))
        own[copies, copies] = 1
        rest[:-1, nodes - 1 :] = 1
        onto[-1, : nodes - 1] = 1
        patterns = [(copies, own), (copies, rest), ([nodes - 1], onto)]
        start = [1.0, 0.0, 0.0]
        if nodes > 2:
            among = np.zeros((nodes, k))
            among[:-1, : nodes - 1] = 1
            patterns.insert(1, (copies, among - own))
            start.insert(1, 0.0)
    patterns.append(([nodes - 1], average))
    start.append(best.norm / math.sqrt(k - nodes + 1))
    outgoing = [1.0, best.outgoing] if nodes > 1 else [best.outgoing]
    basis = _subspace(loss, patterns, b)
    return _solved("perturbed_copy_average", loss, basis, [*start, *outgoing], _flat(loss, len(outgoing)))


def _flat(loss: PopulationLoss, outgoing: int) -> int:
    return outgoing if loss.flat_directions else 0


def _fewer(caller: str, nodes: int, k: int) -> None:
    if not 1 <= nodes < k:
        raise ValueError(f"{caller}: nodes={nodes} for a teacher of {k}; it exists for 1 <= nodes < {k}")
