"""Where students start."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tsdyn.data import generator
from tsdyn.experiment import Experiment
from tsdyn.networks import Network
from tsdyn.teachers import draw_teacher

#: Starts that need the teacher.
NEAR = ("near-teacher", "same-direction", "same-sign")


def draw_student(experiment: Experiment, seed: int, teacher: Network | None = None) -> Network:
    """The student of one member before training.

    ``gaussian``: every weight N(0, scale²), biases 0 (Tian 2020, released code).  ``torch``: weights and biases
    uniform on ±1/√(inputs), as ``nn.Linear`` starts.  ``near-teacher``: the teacher's parameters plus N(0, scale²).
    ``same-direction``: the teacher's layers, each scaled to the Frobenius norm of one that starts as torch's.
    ``same-sign``: torch's start with the signs of the teacher's parameters (Tian et al. 2019, released code).

    ``toward_weakest`` turns rows of the lowest layer round where their product with the last teacher node's weight is
    positive (``adversarial``) or negative (``helped``).  Every parameter is then multiplied by ``shrink``.  With
    ``training.normalize`` the hidden rows start, as they stay, at unit norm.

    Args:
        experiment: Says which.
        seed: Names the draw.
        teacher: The member's, where it is at hand; drawn otherwise.
    """
    student = experiment.student
    if teacher is None and (student.init in NEAR or student.toward_weakest != "free"):
        teacher = draw_teacher(experiment, seed)
    weights, biases = _drawn(experiment, seed)
    if teacher is not None:
        if student.init in NEAR:
            pairs = zip(weights, biases, teacher.weights, teacher.biases, strict=True)
            moved = [_near(student.init, w, b, w_star, b_star) for w, b, w_star, b_star in pairs]
            weights, biases = [w for w, _ in moved], [b for _, b in moved]
        if student.toward_weakest != "free":
            sign = -1.0 if student.toward_weakest == "adversarial" else 1.0
            facing = weights[0] @ teacher.weights[0][-1].to(weights[0])
            weights[0] = torch.where((sign * facing < 0)[:, None], -weights[0], weights[0])
    if experiment.training.normalize:
        weights[:-1] = [w / w.norm(dim=1, keepdim=True) for w in weights[:-1]]
    if student.shrink != 1.0:
        weights, biases = [w * student.shrink for w in weights], [b * student.shrink for b in biases]
    dtype = getattr(torch, experiment.dtype)
    return Network(
        [w.to(dtype) for w in weights],
        [b.to(dtype) if student.bias else None for b in biases],
        student.activation,
        leak=student.leak,
    )


def _drawn(experiment: Experiment, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that know no teacher, float64; for ``near-teacher`` the noise."""
    student, rng = experiment.student, generator(seed, "student")
    weights, biases = [], []
    for below, nodes in itertools.pairwise(experiment.student_widths):
        if student.init in ("gaussian", "near-teacher"):
            weights.append(rng.standard_normal((nodes, below)) * student.scale)
            noisy = student.init == "near-teacher"
            biases.append(rng.standard_normal(nodes) * student.scale if noisy else torch.zeros(nodes).double())
        else:
            edge = 1 / math.sqrt(below)
            weights.append(rng.uniform(-edge, edge, (nodes, below)))
            biases.append(rng.uniform(-edge, edge, nodes))
    return [torch.as_tensor(w) for w in weights], [torch.as_tensor(b) for b in biases]


def _near(init: str, weight: Tensor, bias: Tensor, taught: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """One layer moved towards the teacher's."""
    taught = taught.to(weight)
    offset = torch.zeros_like(bias) if offset is None else offset.to(bias)
    if init == "near-teacher":
        return taught + weight, offset + bias
    if init == "same-direction":
        ratio = weight.norm() / taught.norm()
        return taught * ratio, offset * ratio
    return torch.where(weight * taught < 0, -weight, weight), torch.where(bias * offset < 0, -bias, bias)
