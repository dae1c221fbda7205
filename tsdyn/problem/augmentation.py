"""Training sets with points added so that the conditions of Tian's (2020) theorems hold."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from tsdyn.axes import Inputs
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.problem import inputs
from tsdyn.theory.alignments import boundary, regular


def _step(eps: float, c: float, nodes: int) -> float:
    if not (eps > 0 and c > 0 and nodes >= 1):
        raise ValueError(f"augmentation: eps={eps}, c={c}, nodes={nodes}; all must be above 0")
    return float(2 * eps / (c * nodes**1.5))


def augment_agnostic(x: Inputs, *, eps: float, nodes: int, c: float) -> Float[Tensor, "augmented input"]:
    """D' = D ∪ {x ± 2ε e_u/(c K^{3/2})} for every sample x and axis u: (2d+1) N samples.

    Args:
        x: (sample, input).
        eps: ε.
        nodes: K_1 = m_1 + n_1, teacher and student nodes of the lowest layer.
        c: The paper's constant, which its main text leaves open.

    Source: Tian (2020), Definition 7, teacher-agnostic.

    Raises:
        ValueError: if eps, nodes or c is not above 0.
    """
    step = _step(eps, c, nodes)
    axes = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    offsets = torch.cat([step * axes, -step * axes])
    return torch.cat([x, (x[:, None] + offsets).flatten(0, 1)])


def augment_aware(teacher: Network, x: Inputs, *, eps: float, nodes: int, c: float) -> Float[Tensor, "augmented input"]:
    """D' = D ∪ {x ± 2ε w*_j/(c K^{3/2})} for every teacher node j and every sample x within ε of its boundary.

    These are N + 2 Σ_j N[I_j(ε)] samples.  Arguments as in `augment_agnostic`.

    Source: Tian (2020), Definition 7, teacher-aware.

    Raises:
        ValueError: if eps, nodes or c is not above 0.
    """
    step = _step(eps, c, nodes)
    w, _ = regular(teacher)
    near = boundary(teacher, x, eps)
    moved = [x[near[:, j]] + sign * step * w[j] for j in range(len(w)) for sign in (1, -1)]
    return torch.cat([x, *moved])


def training_set(experiment: Experiment, seed: int, teacher: Network) -> Tensor:
    """One member's finite training inputs, augmented as the experiment says, on the teacher's device."""
    x = torch.from_numpy(inputs.training_inputs(experiment, seed)).to(teacher.weights[0].device)
    data = experiment.data
    nodes = experiment.student_widths[1] + teacher.widths[1]
    match data.augment:
        case "agnostic":
            return augment_agnostic(x, eps=data.augment_eps, nodes=nodes, c=data.augment_c)
        case "aware":
            return augment_aware(teacher, x, eps=data.augment_eps, nodes=nodes, c=data.augment_c)
        case "none" | "crop-flip":  # images are moved at every step
            return x
        case other:
            assert_never(other)
