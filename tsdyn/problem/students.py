"""Initial parameters of students."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tsdyn import registers
from tsdyn.archive import reading
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Student
from tsdyn.networks.activations import activation
from tsdyn.networks.network import Network
from tsdyn.networks.node_pairs import is_winner
from tsdyn.problem.inputs import generator
from tsdyn.problem.teachers import draw_teacher, from_file, network_of, uniform_start

#: Shape of a weight: (node, input_node) or (channel, channel below, row, column).
Shape: TypeAlias = tuple[int, ...]


#: Weight and bias of one layer.
Layer: TypeAlias = tuple[Tensor, Tensor]


#: Starts that need the teacher's parameters.
_TAUGHT = ("near-teacher", "same-direction", "same-sign")


def draw_student(experiment: Experiment, seed: int, teacher: Network | None = None) -> Network:
    """The student of one member before training; its BatchNorm, if it has any, starts as torch's does.

    ``gaussian``: every weight N(0, scale²), biases 0 (Tian 2020, released code).  ``torch``: weights and biases
    uniform on ±1/√(inputs), as ``nn.Linear`` starts.  ``near-teacher``: the teacher's parameters plus N(0, scale²).
    ``same-direction``: the teacher's layers, each scaled to the Frobenius norm of a layer of the ``torch`` start.
    ``same-sign``: the ``torch`` start with the signs of the teacher's parameters (Tian et al. 2019, released code).
    ``file``: a state dict (`teachers.from_file`).  ``rewind``: the start of an earlier run of the same layers, whose
    archive ``student.path`` names, but only with its winners: of each hidden layer the nodes (channels) that at its end
    correlated best with some teacher node.  The others get no weight and bias, in or out, and then have no gradient.
    ``rewind-reinitialised``: the same nodes, started as torch does, from random numbers of
    their own, so that they differ from the first start whatever its law was.

    ``toward_weakest`` turns rows of the lowest layer round where their product with the last teacher node's weight is
    positive (``adversarial``) or negative (``helped``).  Every parameter is then multiplied by ``shrink``.  With
    ``training.normalize`` the hidden rows start, as they stay, at unit norm.

    Args:
        experiment: The experiment, whose ``[student]`` names the start.
        seed: The member's seed.
        teacher: The member's teacher; drawn if it is needed and not given.

    Raises:
        ExperimentError: if a file or archive cannot be used.
    """
    student = experiment.student
    sign = {"free": 0.0, "adversarial": -1.0, "helped": 1.0}[student.toward_weakest]
    if teacher is None and (student.init in _TAUGHT or registers.STARTS.foreign(student.init) or sign):
        teacher = draw_teacher(experiment, seed)
    if student.init == "file":
        found = from_file(experiment, str(student.path), student, experiment.student_widths)
        return found.to(getattr(torch, experiment.dtype))
    if student.init in ("rewind", "rewind-reinitialised"):
        weights, biases = _rewound(experiment, seed)
    else:
        weights, biases = _started(experiment, generator(seed, "student"), teacher)
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


def _started(
    experiment: Experiment, rng: np.random.Generator, teacher: Network | None, init: str | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases, layer by layer in float64, of the registered start `init`, by default the experiment's."""
    student = experiment.student
    init = student.init if init is None else init
    start, foreign = registers.STARTS.load(init), registers.STARTS.foreign(init)
    weights, biases = [], []
    for i, shape in enumerate(experiment.weight_shapes(experiment.student_widths)):
        taught = None
        if teacher is not None and teacher.weights[i].shape == shape:
            taught = teacher.weights[i].double(), _offset(teacher, i)
        weight, bias = (
            torch.as_tensor(part, device="cpu") for part in start(rng, shape, student=student, taught=taught)
        )
        if foreign and not (
            weight.shape == shape
            and bias.shape == shape[:1]
            and all(part.is_floating_point() and bool(part.isfinite().all()) for part in (weight, bias))
        ):
            raise registers.PartError(
                f"start {init!r} of {registers.STARTS.origin(init).package} gave a weight of shape "
                f"{tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}; they must be finite real numbers of "
                f"shapes {shape} and {shape[:1]}"
            )
        weights.append(weight.double())
        biases.append(bias.double())
    return weights, biases


def _offset(teacher: Network, layer: int) -> Tensor:
    bias = teacher.biases[layer]
    return (
        torch.zeros(len(teacher.weights[layer]), dtype=torch.float64, device="cpu") if bias is None else bias.double()
    )


def winners(correlation: np.ndarray) -> np.ndarray:
    """Whether each student node correlates best with some teacher node, (teacher_node, node) → (node,); NaN never wins.

    Source: Tian et al. (2019), section 1 (lottery tickets).
    """
    return np.asarray(is_winner(correlation) == 1)


def _rewound(experiment: Experiment, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The earlier run's start, or a new one, restricted to the nodes that won in that run."""
    student, path = experiment.student, str(experiment.student.path)
    if activation(student.activation)(torch.zeros(1, device="cpu")) != 0:
        raise ExperimentError(
            f"student.init = {student.init!r}: with student.activation = {student.activation!r} a node without weights "
            "still has an output, so those that lost would learn again; take one with σ(0) = 0"
        )
    try:
        ds = reading.open(path)
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
            f"student.path = {path!r}: its students have layers of (node, inputs) {theirs}, these {own}; a rewound "
            "student has the same layers"
        )
    weights, biases = _started(experiment, generator(seed, "student-again"), None, "torch")
    won = np.ones(1, bool)  # all inputs are kept
    for i, (shape, (nodes, inputs)) in enumerate(zip(shapes, own, strict=True), start=1):
        if student.init == "rewind":
            held = first["weight"].sel(layer=i).values[:nodes, :inputs].reshape(shape)
            weights[i - 1] = torch.from_numpy(held.copy()).double()
            biases[i - 1] = torch.from_numpy(first["bias"].sel(layer=i).values[:nodes].copy()).double()
        below, won = won, np.ones(nodes, bool)
        if i < len(shapes):
            values = last.sel(layer=i).values[:, :nodes]
            won = winners(values[: experiment.layout.teacher_widths[i - 1]])
        # columns of one node below are adjacent: its image's rows and columns
        mask = torch.from_numpy(np.outer(won, np.repeat(below, inputs // len(below))).reshape(shape))
        weights[i - 1] = weights[i - 1] * mask
        biases[i - 1] = biases[i - 1] * torch.from_numpy(won)
    return weights, biases


def _gaussian(rng: np.random.Generator, shape: Shape, *, student: Student, taught: Layer | None) -> Layer:
    weight = torch.from_numpy(rng.standard_normal(shape) * student.scale)
    return weight, torch.zeros(shape[0], dtype=torch.float64, device="cpu")


def _torch(rng: np.random.Generator, shape: Shape, *, student: Student, taught: Layer | None) -> Layer:
    (weight,), (bias,) = uniform_start([shape], rng)
    return weight, bias


def _near_teacher(rng: np.random.Generator, shape: Shape, *, student: Student, taught: Layer | None) -> Layer:
    assert taught is not None
    weight = torch.from_numpy(rng.standard_normal(shape) * student.scale)
    bias = torch.from_numpy(rng.standard_normal(shape[0]) * student.scale)
    return taught[0] + weight, taught[1] + bias


def _same_direction(rng: np.random.Generator, shape: Shape, *, student: Student, taught: Layer | None) -> Layer:
    assert taught is not None
    weight, _ = _torch(rng, shape, student=student, taught=taught)
    ratio = weight.norm() / taught[0].norm()
    return taught[0] * ratio, taught[1] * ratio


def _same_sign(rng: np.random.Generator, shape: Shape, *, student: Student, taught: Layer | None) -> Layer:
    assert taught is not None
    drawn = _torch(rng, shape, student=student, taught=taught)
    weight, bias = (torch.where(own * star < 0, -own, own) for own, star in zip(drawn, taught, strict=True))
    return weight, bias


#: ``student.init`` → the function that draws a layer: (rng, shape, *, student, taught) → weight of that shape and bias
#: (node,), with the experiment's section ``[student]`` and the teacher's weight and bias of that layer if shapes agree.
STARTS: Mapping[str, Callable[..., Layer]] = {
    "gaussian": _gaussian,
    "torch": _torch,
    "near-teacher": _near_teacher,
    "same-direction": _same_direction,
    "same-sign": _same_sign,
}
