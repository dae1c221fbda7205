"""Classifies the critical point that a small student has reached, and computes the phase boundaries from theory.

Source: Simsek et al. (2023), section 5 and Figure 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from tsdyn.arguments import NETWORK, WHOLE, takes
from tsdyn.flow.stationary import signature
from tsdyn.networks.network import Network, require_plain
from tsdyn.population.critical_points import ODD, copy_average, perturbed_copy, unit_orthonormal
from tsdyn.population.two_layer_loss import PopulationLoss

Kind = Literal["copy-average", "perturbed-copy", "other"]
#: The grounds on which a kind is decided, in the order in which they are tested; see `Classification.reason`.
Ground = Literal[
    "groups", "copies", "no-part", "wrong-sign", "pointing-away", "owning-nothing", "uneven", "groups-and-shared"
]

#: A node owns a teacher node if it has at least this share of all nodes' squared cosines with it.
OWNS = 0.8
#: A node averages the teacher nodes it owns if its least cosine with them is at least this share of the largest.
EVEN = 0.8
#: A node whose contribution to the output is below this share of the largest counts as having none.
_DEAD = 1e-6


@dataclass(frozen=True)
class Classification:
    """The kind of critical point a student is at, with the evidence.

    Attributes:
        kind: ``copy-average``: every node owns a group of teacher nodes, with equal cosines, and every teacher node has
            an owner; ``perturbed-copy``: every node owns exactly one and the rest are shared; ``other``.
        groups: Teacher nodes that each student node owns.
        cosine: Cosines of weights, (node, teacher_node), with the sign of the outgoing weights for odd σ.
        share: Each node's share of all squared cosines with a teacher node, (node, teacher_node); columns sum to 1.
        margin: Distance of the deciding number from its threshold; the larger, the clearer the case.
        ground: The deciding criterion, in a word.
        reason: The deciding criterion, in a sentence.
    """

    kind: Kind
    groups: tuple[tuple[int, ...], ...]
    cosine: Float[Tensor, "node teacher_node"]
    share: Float[Tensor, "node teacher_node"]
    margin: float
    ground: Ground
    reason: str


@takes(student=NETWORK, teacher=NETWORK)
def classify(student: Network, teacher: Network, *, owns: float = OWNS, even: float = EVEN) -> Classification:
    """Classify a student of one output as copy-average, perturbed copy, or other.

    A student node owns a teacher node if it has at least the share `owns` of all student nodes' squared cosines with
    it.  If σ is not odd, a node whose outgoing weight has the opposite sign of the teacher's can only work against the
    others, which makes the student ``other``.

    Args:
        student: Two layers, one output.
        teacher: Two layers, orthonormal incoming and equal outgoing weights.
        owns: Threshold on the share, above ½.
        even: Threshold on the ratio of the least to the largest cosine within a group.

    Raises:
        ValueError: for any other teacher, other widths, or thresholds out of range.

    Source: Simsek et al. (2023), section 5; the thresholds are ours.

    Examples:
        >>> import torch, tsdyn
        >>> from tsdyn import population
        >>> teacher = tsdyn.Network([torch.eye(3, 4).double(), torch.ones(1, 3).double()], activation="erf")
        >>> student = population.copy_average("erf", teacher, [[0], [1, 2]])
        >>> str(population.classify(student, teacher).kind)
        'copy-average'
    """
    unit_orthonormal("classify", teacher)
    require_plain("classify", student)
    if not (0.5 < owns < 1 and 0 < even < 1):
        raise ValueError(f"classify: owns={owns}, even={even}; 0.5 < owns < 1 and 0 < even < 1")
    if student.depth != 2 or (student.widths[0], student.widths[2]) != (teacher.widths[0], 1):
        raise ValueError(f"classify: {student} is not ({teacher.widths[0]}, n, 1)")
    w, a, v = student.weights[0].detach(), student.weights[1].detach()[0], teacher.weights[0].detach()
    norm = w.norm(dim=1)
    cosine = (w @ v.T) / norm.clamp(min=torch.finfo(w.dtype).tiny)[:, None]
    sign = torch.sign(a * teacher.weights[1].detach()[0, 0])
    odd = student.activation.name in ODD
    if odd:
        cosine = cosine * sign[:, None]
    share = cosine.square() / cosine.square().sum(0).clamp(min=torch.finfo(w.dtype).tiny)
    part = (a.abs() * norm) / (a.abs() * norm).max()
    best, owner = share.max(0)
    owned = best >= owns
    groups = tuple(tuple(j for j in range(len(v)) if owned[j] and owner[j] == i) for i in range(len(w)))

    def found(kind: Kind, margin: float, ground: Ground, reason: str) -> Classification:
        return Classification(kind, groups, cosine, share, margin, ground, reason)

    dead = (part < _DEAD).nonzero()[:, 0].tolist()
    if dead:
        return found("other", _DEAD - float(part.min()), "no-part", f"nodes {dead} have no part in the output")
    trapped = [] if odd else (sign < 0).nonzero()[:, 0].tolist()
    if trapped:
        said = f"nodes {trapped} are trapped: their outgoing weights have the wrong sign"
        return found("other", owns, "wrong-sign", said)
    pulls = [cosine[i, list(g)] for i, g in enumerate(groups)]
    wrong = [i for i, p in enumerate(pulls) if len(p) and (p.min() <= 0)]
    if wrong:
        return found("other", owns, "pointing-away", f"nodes {wrong} point away from what they own")
    empty = [i for i, g in enumerate(groups) if not g]
    if empty:
        spare = min(owns - float(share[i].max()) for i in empty)
        return found("other", spare, "owning-nothing", f"nodes {empty} own no teacher node")
    clear = float((best - owns).abs().min())
    if owned.all():
        ratios = [float(p.min() / p.max()) for p in pulls]
        if min(ratios) >= even:
            sizes = sorted(len(g) for g in groups)
            return found("copy-average", min(clear, min(ratios) - even), "groups", f"groups of {sizes}")
        return found("other", even - min(ratios), "uneven", "a group is not averaged evenly")
    if all(len(g) == 1 for g in groups):
        shared = int((~owned).sum())
        return found("perturbed-copy", clear, "copies", f"every node copies one teacher node, {shared} are shared")
    return found("other", clear, "groups-and-shared", "some teacher nodes are averaged, others shared")


@takes(k=WHOLE)
def phase_boundaries(k: int, *, activation: str = "erf", outside: int = 1) -> xr.Dataset:
    """Losses and signatures of both kinds of critical points for every n < k, which give the phases without seeds.

    Args:
        k: Number of nodes of the unit-orthonormal teacher.
        activation: Odd; its copy-average points are critical (erf), or critical points near them are used.
        outside: Number of input dimensions beyond the teacher's.

    Returns:
        Dataset over n (1 … k−1): ``loss_copy_average`` of (1, …, 1, k−n+1), ``loss_perturbed_copy``, and
        ``index_copy_average``, ``index_perturbed_copy``, the numbers of negative Hessian eigenvalues.  Attributes, 0
        for none: ``perturbed_copy_from``, the least n from which on the perturbed n-copy (P-n-C) is a minimum;
        ``copy_average_to``, the largest n up to which the copy-average point is one; ``perturbed_copy_below_from``, the
        least n from which on P-n-C has the smaller loss.

    Raises:
        ValueError: for k < 2, or an activation that is not odd.

    Source: Simsek et al. (2023), section 5 and Figure 4; the boundaries are computed here.
    """
    if k < 2:
        raise ValueError(f"phase_boundaries: k={k}; a student smaller than its teacher needs k >= 2")
    if activation not in ODD:
        raise ValueError(f"phase_boundaries: activation={activation!r} is not odd ({', '.join(ODD)} are)")
    eye = torch.eye(k, k + outside, dtype=torch.float64, device="cpu")
    teacher = Network([eye, eye.new_ones(1, k)], activation=activation)
    nodes = np.arange(1, k)
    rows = []
    for n in nodes.tolist():
        loss = PopulationLoss(teacher, n)
        points = loss.pack([copy_average(activation, teacher, [1] * (n - 1) + [k - n + 1]), perturbed_copy(teacher, n)])
        rows.append([*loss.value(points).tolist(), *signature(loss, points).negative.tolist()])
    average, perturbed, index_average, index_perturbed = np.array(rows).T
    names = ("loss_copy_average", "loss_perturbed_copy", "index_copy_average", "index_perturbed_copy")
    texts = (
        "loss of the copy-average point",
        "loss of the perturbed n-copy point",
        "negative Hessian eigenvalues at the copy-average point",
        "negative Hessian eigenvalues at the perturbed n-copy point",
    )
    columns = (average, perturbed, index_average.astype(int), index_perturbed.astype(int))
    source = "Simsek et al. 2023 (arXiv:2311.01644), section 5"
    return xr.Dataset(
        {
            name: ("n", column, {"units": "1", "long_name": text, "source": source})
            for name, column, text in zip(names, columns, texts, strict=True)
        },
        {"n": nodes},
        {
            "k": k,
            "activation": activation,
            "perturbed_copy_from": _from(nodes, index_perturbed == 0),
            "copy_average_to": _to(nodes, index_average == 0),
            # at n = 1 both points are the one-neuron optimum
            "perturbed_copy_below_from": _from(nodes, (perturbed < average) & (nodes > 1)),
        },
    )


def _from(nodes: np.ndarray, holds: np.ndarray) -> int:
    """Least entry of `nodes` from which on `holds` is true for all; 0 if it is false for the last."""
    last = np.flatnonzero(~holds)
    start = last[-1] + 1 if len(last) else 0
    return int(nodes[start]) if start < len(nodes) else 0


def _to(nodes: np.ndarray, holds: np.ndarray) -> int:
    first = np.flatnonzero(~holds)
    end = first[0] if len(first) else len(nodes)
    return int(nodes[end - 1]) if end else 0
