"""Where students start."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias, assert_never

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from tsdyn import archive, interaction
from tsdyn.activations import activation
from tsdyn.data import generator
from tsdyn.experiment import Experiment, ExperimentError
from tsdyn.networks import Network, require_plain
from tsdyn.node_pairs import is_winner
from tsdyn.teachers import draw_teacher, from_file, network_of, uniform_start


def draw_student(experiment: Experiment, seed: int, teacher: Network | None = None) -> Network:
    """The student of one member before training; its BatchNorm, where it has some, starts afresh.

    ``gaussian``: every weight N(0, scale²), biases 0 (Tian 2020, released code).  ``torch``: weights and biases
    uniform on ±1/√(inputs), as ``nn.Linear`` starts.  ``near-teacher``: the teacher's parameters plus N(0, scale²).
    ``same-direction``: the teacher's layers, each scaled to the Frobenius norm of one that starts as torch's.
    ``same-sign``: torch's start with the signs of the teacher's parameters (Tian et al. 2019, released code).
    ``file``: a state dict (`teachers.from_file`).  ``rewind``: the start of an earlier run of the same layers, whose
    archive ``student.path`` names, but only with its winners: of each hidden layer the nodes (channels) that at its end
    correlated best with some teacher node.  The others get no weight and bias, in or out, and then have no gradient.
    ``rewind-reinitialised``: the same nodes, started as torch does.

    ``toward_weakest`` turns rows of the lowest layer round where their product with the last teacher node's weight is
    positive (``adversarial``) or negative (``helped``).  Every parameter is then multiplied by ``shrink``.  With
    ``training.normalize`` the hidden rows start, as they stay, at unit norm.

    Args:
        experiment: Says which.
        seed: Names the draw.
        teacher: The member's, where it is at hand; drawn otherwise.

    Raises:
        ExperimentError: if a file or archive cannot be used.
    """
    student = experiment.student
    sign = {"free": 0.0, "adversarial": -1.0, "helped": 1.0}[student.toward_weakest]
    if teacher is None and (student.init in _NEAR or sign):
        teacher = draw_teacher(experiment, seed)
    match student.init:
        case "file":
            found = from_file(experiment, str(student.path), student, experiment.student_widths)
            return found.to(getattr(torch, experiment.dtype))
        case "gaussian" | "torch":
            weights, biases = _drawn(experiment, seed)
        case "rewind" | "rewind-reinitialised":
            weights, biases = _rewound(experiment, seed)
        case "near-teacher" | "same-direction" | "same-sign":
            assert teacher is not None
            pairs = zip(*_drawn(experiment, seed), teacher.weights, teacher.biases, strict=True)
            moved = [_NEAR[student.init](w, b, *_taught(w, b, w_star, b_star)) for w, b, w_star, b_star in pairs]
            weights, biases = [w for w, _ in moved], [b for _, b in moved]
        case other:
            assert_never(other)
    if sign:
        assert teacher is not None
        facing = weights[0].flatten(1) @ teacher.weights[0][-1].to(weights[0]).flatten()
        turned = (sign * facing < 0).view(-1, *([1] * (weights[0].ndim - 1)))
        weights[0] = torch.where(turned, -weights[0], weights[0])
    if experiment.training.normalize:
        weights[:-1] = [w / w.flatten(1).norm(dim=1).view(-1, *([1] * (w.ndim - 1))) for w in weights[:-1]]
    if student.shrink != 1.0:
        weights, biases = [w * student.shrink for w in weights], [b * student.shrink for b in biases]
    made = network_of(experiment, weights, [b if student.bias else None for b in biases], who=student)
    return made.to(getattr(torch, experiment.dtype))


def _drawn(experiment: Experiment, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that know no teacher, float64; for ``near-teacher`` the noise."""
    student, rng = experiment.student, generator(seed, "student")
    shapes = experiment.weight_shapes(experiment.student_widths)
    match student.init:
        case "gaussian":
            noisy = False
        case "near-teacher":
            noisy = True
        case "torch" | "same-direction" | "same-sign" | "rewind" | "rewind-reinitialised":
            return uniform_start(shapes, rng)
        case "file":
            raise ValueError("student.init = 'file' draws nothing")
        case other:
            assert_never(other)
    weights, biases = [], []
    for shape in shapes:
        weights.append(torch.from_numpy(rng.standard_normal(shape) * student.scale))
        bias = rng.standard_normal(shape[0]) * student.scale if noisy else np.zeros(shape[0])
        biases.append(torch.from_numpy(bias))
    return weights, biases


def winners(correlation: np.ndarray) -> np.ndarray:
    """Which student nodes correlate best with some teacher node, (node,) of (teacher_node, node); NaN never wins.

    Source: Tian et al. (2019), section 1 (lottery tickets).
    """
    return np.asarray(is_winner(correlation) == 1)


def _rewound(experiment: Experiment, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The earlier run's start, or a new one, on the nodes that won there."""
    student, path = experiment.student, str(experiment.student.path)
    if activation(student.activation)(torch.zeros(1)) != 0:
        raise ExperimentError(
            f"student.init = {student.init!r}: with student.activation = {student.activation!r} a node without weights "
            "is not silent, so those that lost would learn again; take one with σ(0) = 0"
        )
    try:
        ds = archive.open(path)
        first = ds[["weight", "bias"]].sel(seed=seed, epoch=0).load()
        last = ds["correlation"].sel(seed=seed).isel(epoch=-1).load()
    except KeyError as error:
        raise ExperimentError(
            f"student.path = {path!r}: the archive has no {error}; its run must hold seed {seed} and record weight and "
            "correlation"
        ) from None
    shapes = experiment.weight_shapes(experiment.student_widths)
    own = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    theirs = [
        (int(n), int(first["weight"].sel(layer=i).notnull().any("node").sum()))
        for i, n in enumerate(ds["width"].values, start=1)
    ]
    if own != theirs:
        raise ExperimentError(
            f"student.path = {path!r}: its students have (node, inputs) {theirs} a layer, these {own}; a rewound "
            "student has the same layers"
        )
    weights, biases = _drawn(experiment, seed)
    won = np.ones(1, bool)  # the input, all of it
    for i, (shape, (nodes, inputs)) in enumerate(zip(shapes, own, strict=True), start=1):
        if student.init == "rewind":
            held = first["weight"].sel(layer=i).values[:nodes, :inputs].reshape(shape)
            weights[i - 1] = torch.from_numpy(held.copy()).double()
            biases[i - 1] = torch.from_numpy(first["bias"].sel(layer=i).values[:nodes].copy()).double()
        below, won = won, np.ones(nodes, bool)
        if i < len(shapes):
            values = last.sel(layer=i).values[:, :nodes]
            won = winners(values[: experiment.layout.teacher_widths[i - 1]])
        # the numbers of one node below lie together: its row and column
        mask = torch.from_numpy(np.outer(won, np.repeat(below, inputs // len(below))).reshape(shape))
        weights[i - 1] = weights[i - 1] * mask
        biases[i - 1] = biases[i - 1] * torch.from_numpy(won)
    return weights, biases


Layer: TypeAlias = tuple[Tensor, Tensor]


def _taught(weight: Tensor, bias: Tensor, taught: Tensor, offset: Tensor | None) -> Layer:
    """The teacher's weight and bias as the student's are."""
    return taught.to(weight), torch.zeros_like(bias) if offset is None else offset.to(bias)


def _near_teacher(weight: Tensor, bias: Tensor, taught: Tensor, offset: Tensor) -> Layer:
    return taught + weight, offset + bias


def _same_direction(weight: Tensor, bias: Tensor, taught: Tensor, offset: Tensor) -> Layer:
    ratio = weight.norm() / taught.norm()
    return taught * ratio, offset * ratio


def _same_sign(weight: Tensor, bias: Tensor, taught: Tensor, offset: Tensor) -> Layer:
    return torch.where(weight * taught < 0, -weight, weight), torch.where(bias * offset < 0, -bias, bias)


#: Starts that need the teacher: one layer's weight and bias, moved towards the teacher's.
_NEAR: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Layer]] = {
    "near-teacher": _near_teacher, "same-direction": _same_direction, "same-sign": _same_sign,
}  # fmt: skip


def warm_start(teacher: Network, nodes: int) -> Network:
    """A smaller student made of its teacher by copy and average: the start that Simsek et al. (2023) suggest.

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
    kernel = interaction.of(teacher.activation)

    def overlaps(w: Tensor, z: Tensor) -> Tensor:
        return kernel(w.square().sum(1)[:, None], z.square().sum(1), w @ z.T)

    order = (v.norm(dim=1) * b.norm(dim=1)).argsort(descending=True, stable=True)
    copied, rest = order[: nodes - 1], order[nodes - 1 :]
    pull = b[rest] @ torch.linalg.svd(b[rest], full_matrices=False).Vh[0]
    odd = teacher.activation.name in ("erf", "tanh", "identity")
    mean = ((pull if odd else pull.abs())[:, None] * v[rest]).sum(0)
    mean = mean / mean.norm() if len(rest) > 1 else v[rest][0]

    def student(log_norm: float) -> tuple[Tensor, Tensor, float]:
        """Weights, best outgoing weights and the loss they explain."""
        w = torch.cat([v[copied], math.exp(log_norm) * mean[None]])
        mixed = overlaps(w, v) @ b
        a = torch.linalg.lstsq(overlaps(w, w), mixed).solution
        return w, a, float((a * mixed).sum())

    log_norm = 0.0
    if len(rest) > 1 and not kernel.homogeneous:
        log_norm = float(minimize_scalar(lambda x: -student(x)[2], bounds=(-5, 3), options={"xatol": 1e-10}).x)
    w, a, _ = student(log_norm)
    return Network([w, a.T.contiguous()], activation=teacher.activation.name, leak=teacher.activation.leak or 0.0)
