"""Where students start."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tsdyn import archive
from tsdyn.data import generator
from tsdyn.experiment import Experiment, ExperimentError
from tsdyn.teachers import AnyNetwork, draw_teacher, from_file, network_of, uniform_start

#: Starts that need the teacher.
NEAR = ("near-teacher", "same-direction", "same-sign")
#: Starts from the winners of an earlier run.
REWOUND = ("rewind", "rewind-reinitialised")


def draw_student(experiment: Experiment, seed: int, teacher: AnyNetwork | None = None) -> AnyNetwork:
    """The student of one member before training; a `DeepNetwork` with convolutions or BatchNorm, which starts afresh.

    ``gaussian``: every weight N(0, scale²), biases 0 (Tian 2020, released code).  ``torch``: weights and biases
    uniform on ±1/√(inputs), as ``nn.Linear`` starts.  ``near-teacher``: the teacher's parameters plus N(0, scale²).
    ``same-direction``: the teacher's layers, each scaled to the Frobenius norm of one that starts as torch's.
    ``same-sign``: torch's start with the signs of the teacher's parameters (Tian et al. 2019, released code).
    ``file``: a state dict (`teachers.from_file`).  ``rewind``: the start of an earlier run of the same widths, whose
    archive ``student.path`` names, but only with its winners: of each hidden layer the nodes that at its end
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
    if student.init == "file":
        found = from_file(experiment, str(student.path), student, experiment.student_widths)
        return found.to(getattr(torch, experiment.dtype))
    if teacher is None and (student.init in NEAR or student.toward_weakest != "free"):
        teacher = draw_teacher(experiment, seed)
    weights, biases = _rewound(experiment, seed) if student.init in REWOUND else _drawn(experiment, seed)
    if teacher is not None:
        if student.init in NEAR:
            pairs = zip(weights, biases, teacher.weights, teacher.biases, strict=True)
            moved = [_near(student.init, w, b, w_star, b_star) for w, b, w_star, b_star in pairs]
            weights, biases = [w for w, _ in moved], [b for _, b in moved]
        if student.toward_weakest != "free":
            sign = -1.0 if student.toward_weakest == "adversarial" else 1.0
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
    if student.init not in ("gaussian", "near-teacher"):
        return uniform_start(shapes, rng)
    weights, biases = [], []
    for shape in shapes:
        weights.append(torch.from_numpy(rng.standard_normal(shape) * student.scale))
        noisy = student.init == "near-teacher"
        bias = rng.standard_normal(shape[0]) * student.scale if noisy else np.zeros(shape[0])
        biases.append(torch.from_numpy(bias))
    return weights, biases


def winners(correlation: np.ndarray) -> np.ndarray:
    """Which student nodes correlate best with some teacher node, (node,) of (teacher_node, node); NaN never wins.

    Source: Tian et al. (2019), section 1 (lottery tickets).
    """
    alive = correlation[~np.isnan(correlation).all(1)]
    won = np.zeros(correlation.shape[1], bool)
    won[np.nanargmax(alive, axis=1)] = True
    return won


def _rewound(experiment: Experiment, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The earlier run's start, or a new one, on the nodes that won there."""
    student, path = experiment.student, str(experiment.student.path)
    try:
        ds = archive.open(path)
        first = ds[["weight", "bias"]].sel(seed=seed, epoch=0).load()
        last = ds["correlation"].sel(seed=seed).isel(epoch=-1).load()
    except KeyError as error:
        raise ExperimentError(
            f"student.path = {path!r}: the archive has no {error}; its run must hold seed {seed} and record weight and "
            "correlation"
        ) from None
    own, theirs = list(experiment.student_widths[1:]), [int(n) for n in ds["width"].values]
    if own != theirs or experiment.deep:
        raise ExperimentError(
            f"student.path = {path!r}: its students have widths {theirs}, these {own}; a rewound student has the same "
            "layers, all fully connected and without BatchNorm"
        )
    weights, biases = _drawn(experiment, seed)
    kept = [np.ones(experiment.student_widths[0], bool)]
    for i, weight in enumerate(weights, start=1):
        nodes, below = weight.shape
        if student.init == "rewind":
            weights[i - 1] = torch.from_numpy(first["weight"].sel(layer=i).values[:nodes, :below].copy()).double()
            biases[i - 1] = torch.from_numpy(first["bias"].sel(layer=i).values[:nodes].copy()).double()
        hidden = i < len(weights)
        values = last.sel(layer=i).values[:, :nodes]
        kept.append(winners(values[: experiment.layout.teacher_widths[i - 1]]) if hidden else np.ones(nodes, bool))
        weights[i - 1] = weights[i - 1] * torch.from_numpy(np.outer(kept[i], kept[i - 1]))
        biases[i - 1] = biases[i - 1] * torch.from_numpy(kept[i])
    return weights, biases


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
