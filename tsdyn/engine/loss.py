"""Losses that training minimises.  Each is declared once, here; residuals and Hessians follow from its value.

`LOSSES` is the table.  Code that needs a loss uses the `Loss` itself; nothing decides by its name, except backends
that serve only the losses they name (the compiled step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, hessian, vmap

from tsdyn import registers

#: (output, target) → J of the batch; for closed forms of derivatives, one result per sample.
Function: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """J of one batch, the mean over samples of a loss of each sample, as a function of outputs and targets.

    Attributes:
        name: As ``training.loss`` writes it.
        value: (output, target), each (sample, output) → J.
        convention: The formula of J in one line, which archives store.
        targets: ``outputs`` if the target is the teacher's outputs, ``classes`` if it is one-hot rows of classes.
        negative_gradient: Closed form of `residual`, if there is one.
        curvature: Closed form of `hessian`, if there is one.
        of_classes: `value` from class indices, (sample,), instead of one-hot rows, if that is quicker.
    """

    name: str
    value: Function
    convention: str
    targets: Literal["outputs", "classes"] = "outputs"
    negative_gradient: Function | None = None
    curvature: Function | None = None
    of_classes: Function | None = None

    def target(self, teacher_output: Tensor, classes: Tensor | None = None) -> Tensor:
        """The target of a student, (sample, output): the teacher's outputs, or one-hot rows of `classes`, (sample,).

        Unless given, a sample's class is the teacher's largest output.
        """
        match self.targets:
            case "outputs":
                return teacher_output
            case "classes":
                classes = teacher_output.argmax(1) if classes is None else classes
                return F.one_hot(classes, teacher_output.shape[1]).to(teacher_output.dtype)
            case other:
                assert_never(other)

    def over(self, output: Tensor, teacher_output: Tensor, classes: Tensor | None = None) -> Tensor:
        """J of the outputs, given the teacher's outputs and perhaps classes, as `target` takes them."""
        if self.of_classes is not None:
            return self.of_classes(output, teacher_output.argmax(1) if classes is None else classes)
        return self.value(output, self.target(teacher_output, classes))

    def residual(self, output: Tensor, target: Tensor) -> Float[Tensor, "... output"]:
        """g_L of every sample: the negative gradient of its loss with respect to the output; any leading dimensions."""
        if self.negative_gradient is not None:
            return self.negative_gradient(output, target)
        return -self._of_samples(grad(self._one), output, target)

    def hessian(self, output: Tensor, target: Tensor) -> Float[Tensor, "... output output"]:
        """Second derivatives of every sample's loss with respect to the output; any leading dimensions."""
        if self.curvature is not None:
            return self.curvature(output, target)
        return self._of_samples(hessian(self._one), output, target)

    def _one(self, output: Tensor, target: Tensor) -> Tensor:
        return self.value(output[None], target[None])

    def _of_samples(self, function: Function, output: Tensor, target: Tensor) -> Tensor:
        lead = output.shape[:-1]
        found: Tensor = vmap(function)(output.flatten(0, -2), target.flatten(0, -2))
        return found.view(*lead, *found.shape[1:])


def _half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (target - output).square().sum(1).mean()


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(output, -1)).sum(1).mean()


def _from_softmax(output: Tensor, target: Tensor) -> Tensor:
    """Σ_c y_c [y − softmax(f)]: Σ y is 1 for classes, but J is defined for any target."""
    return target - target.sum(-1, keepdim=True) * torch.softmax(output, -1)


def _softmax_curvature(output: Tensor, target: Tensor) -> Tensor:
    p = torch.softmax(output, -1)
    return target.sum(-1)[..., None, None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])


def _identity(output: Tensor, target: Tensor) -> Tensor:
    return torch.eye(output.shape[-1], dtype=output.dtype, device=output.device).expand(*output.shape, -1)


MSE = Loss(
    "mse",
    _half_squared_error,
    "J = 1/2 E |f* - f|^2, summed over outputs",
    negative_gradient=lambda output, target: target - output,
    curvature=_identity,
)
CROSS_ENTROPY = Loss(
    "cross_entropy",
    _cross_entropy,
    "E[-log softmax(f)]",
    targets="classes",
    negative_gradient=_from_softmax,
    curvature=_softmax_curvature,
    of_classes=F.cross_entropy,
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (MSE, CROSS_ENTROPY)}


def weighted(of: Loss) -> Loss:
    """The loss J = E[w ℓ] whose targets have one more column, the weight w of each sample; 0 leaves it out.

    The mean is over all samples of a batch, so that a sample that is left out changes nothing but its own term.
    """

    def value(output: Tensor, target: Tensor) -> Tensor:
        single = vmap(of._one)(output, target[:, :-1])
        return (target[:, -1] * single).mean()

    def residual(output: Tensor, target: Tensor) -> Tensor:
        return target[..., -1:] * of.residual(output, target[..., :-1])

    return Loss(f"weighted {of.name}", value, f"E[w l], l: {of.convention}", of.targets, residual)


def loss(name: str) -> Loss:
    """The loss of that name: tsdyn's own, or one that an installed package offers (`registers.LOSSES`).

    Raises:
        ValueError: if there is none, or a package offers something else than a `Loss` of that name.
    """
    return registers.LOSSES.part(name, Loss)
