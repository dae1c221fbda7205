"""Students that start from a given teacher."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from tsdyn.arguments import NETWORK, WHOLE, takes
from tsdyn.gaussian import interaction
from tsdyn.networks.network import Network, require_plain


@takes(teacher=NETWORK, nodes=WHOLE)
def warm_start(teacher: Network, nodes: int) -> Network:
    """A smaller student built from its teacher by copying and averaging, the start that Simsek et al. (2023) suggest.

    The n−1 strongest teacher nodes, by ‖b_j‖ ‖v_j‖, are copied; one node averages the rest: its direction is their sum
    weighted by outgoing weights, its norm and all outgoing weights those of least population loss on x ~ N(0, I).  For
    a unit-orthonormal teacher and odd σ this is the copy-average point of least loss.

    Args:
        teacher: Two layers, no biases.
        nodes: n of the student, at most the teacher's.

    Raises:
        ValueError: for another depth, biases, or n not in 1..m.

    Source: Simsek et al. (2023), Theorem 5.3 and section 6.
    """
    require_plain("warm_start", teacher)
    if teacher.depth != 2 or any(b is not None and bool((b != 0).any()) for b in teacher.biases):
        raise ValueError(f"warm_start: {teacher} must have two layers and no biases")
    v, b = teacher.weights[0].detach(), teacher.weights[1].detach().T
    if not 1 <= nodes <= len(v):
        raise ValueError(f"warm_start: nodes={nodes}; a student of the teacher's nodes has 1 to {len(v)}")
    kernel = interaction.interaction_of(teacher.activation)

    def overlaps(w: Tensor, z: Tensor) -> Tensor:
        return kernel(w.square().sum(1)[:, None], z.square().sum(1), w @ z.T)

    order = (v.norm(dim=1) * b.norm(dim=1)).argsort(descending=True, stable=True)
    copied, rest = order[: nodes - 1], order[nodes - 1 :]
    pull = b[rest] @ torch.linalg.svd(b[rest], full_matrices=False).Vh[0]
    odd = teacher.activation.name in ("erf", "tanh", "identity")
    mean = ((pull if odd else pull.abs())[:, None] * v[rest]).sum(0)
    mean = mean / mean.norm() if len(rest) > 1 else v[rest][0]

    def student(log_norm: float) -> tuple[Tensor, Tensor, float]:
        """Weights with the averaging node of this norm, best outgoing weights, and the loss that these explain."""
        w = torch.cat([v[copied], math.exp(log_norm) * mean[None]])
        mixed = overlaps(w, v) @ b
        a = torch.linalg.lstsq(overlaps(w, w), mixed).solution
        return w, a, float((a * mixed).sum())

    log_norm = 0.0
    if len(rest) > 1 and not kernel.homogeneous:
        log_norm = float(minimize_scalar(lambda x: -student(x)[2], bounds=(-5, 3), options={"xatol": 1e-10}).x)
    w, a, _ = student(log_norm)
    return Network([w, a.T.contiguous()], activation=teacher.activation.name, leak=teacher.activation.leak or 0.0)
