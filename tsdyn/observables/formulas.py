"""Formulas of recorded quantities, as functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tsdyn.axes import Activations, Outputs, TeacherActivations, TeacherByStudent
from tsdyn.engine.loss import CROSS_ENTROPY, MSE


def loss(teacher_output: Outputs, output: Outputs) -> Float[Tensor, ""]:
    """Training loss J = ½ E‖f* − f‖², summed over outputs and averaged over samples.  Source: Tian (2020), Eq. 1."""
    return MSE.value(output, teacher_output)


def mse(teacher_output: Outputs, output: Outputs) -> Float[Tensor, ""]:
    """Mean over samples and outputs of (f* − f)², 2/C times `loss`.  Source: released code."""
    return (teacher_output - output).square().mean()


def cross_entropy(classes: Int[Tensor, " sample"], output: Outputs) -> Float[Tensor, ""]:
    """Cross entropy E[−log softmax(f)_class].  Source: Tian (2020), section 6."""
    return CROSS_ENTROPY.over(output, output, classes)


def accuracy(classes: Int[Tensor, " sample"], output: Outputs, *, most: int) -> Float[Tensor, " top_k"]:
    """Share of samples whose class is among the k largest outputs, for k = 1..most.  Source: Tian (2020), section 6."""
    largest = output.topk(most, dim=1).indices
    return (largest == classes[:, None]).to(output.dtype).mean(0).cumsum(0)


def standardized(activation: Activations) -> Activations:
    """Centred over samples and scaled to unit sum of squares; NaN where an activation is constant.

    A constant activation is recognized by its range, since rounding may leave its variance above zero.
    """
    centred = activation - activation.mean(0)
    constant = activation.amax(0) == activation.amin(0)
    return torch.where(constant, torch.nan, centred / centred.norm(dim=0))


def correlation(teacher_activation: TeacherActivations, activation: Activations) -> TeacherByStudent:
    """Pearson correlation over samples of each teacher node with each student node, (teacher_node, node).

    Signed; NaN for a node whose activation is constant.  Source: Tian (2020), Eq. 9, centred as in Tian et al. (2019).
    """
    return standardized(teacher_activation).T @ standardized(activation)


def quantiles_of(values: Float[Tensor, " sample"], quantiles: Sequence[float]) -> Float[Tensor, " quantile"]:
    """Quantiles over samples, linearly interpolated."""
    return torch.quantile(values, torch.tensor(quantiles, dtype=values.dtype, device=values.device))


def padded_modes(eigenvalues: Float[Tensor, " mode"], modes: int) -> Float[Tensor, " all_modes"]:
    """Eigenvalues followed by NaN for those that a Hessian of fewer parameters does not have."""
    return torch.cat([eigenvalues, eigenvalues.new_full((modes - len(eigenvalues),), torch.nan)])


def observation(teacher_z: TeacherActivations, student_z: Activations, *, band: float) -> TeacherByStudent:
    """Share of a teacher node's boundary samples that lie in a student node's active region.

    Boundary samples of node j have a pre-activation within `band` standard deviations of 0; NaN if there are none.  A
    student node is active where z_k(x) > 0.
    Source: Tian (2020), Definition 4, on a finite sample (κ of Theorem 3).
    """
    near = (teacher_z.abs() <= band * teacher_z.std(0, correction=0)).to(teacher_z.dtype)
    return near.T @ (student_z > 0).to(near.dtype) / near.sum(0)[:, None]


def observation_count(teacher_z: TeacherActivations, student_z: Activations) -> TeacherByStudent:
    """Number of samples active in student node k, on the side of teacher node j's boundary that has fewer of them.

    Source: Tian (2020), released code.
    """
    active = (student_z > 0).to(student_z.dtype)
    positive = (teacher_z > 0).to(student_z.dtype)
    return torch.minimum(positive.T @ active, (1 - positive).T @ active)
