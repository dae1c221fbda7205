"""Optimizers, each declared once in `OPTIMIZERS` with the moments it keeps, and the rule that one epoch follows.

A `Rule` is an optimizer with its hyperparameters, the frozen layers, and the loss that is minimised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tsdyn import registers
from tsdyn.engine.loss import MSE, Loss, loss
from tsdyn.experiment.parts import Training

#: (rule, parameter, gradient, moments, rates, step) → None, in place; see `Rule.update`.
Update: TypeAlias = Callable[["Rule", Tensor, Tensor, Sequence[Tensor], Tensor, int | Tensor], None]


@dataclass(frozen=True)
class Optimizer:
    """How a gradient changes a parameter.

    Attributes:
        name: Name in `Rule.name` and ``training.method``.
        moments: Names of the moments it keeps for every parameter, each of the parameter's shape.
        update: Takes the step in place; the gradient may be overwritten, and includes the weight decay ...
        decoupled: ... unless this is true: the parameter is then multiplied by 1 − η λ before the step.
    """

    name: str
    moments: tuple[str, ...]
    update: Update
    decoupled: bool = False


def _sgd(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    parameter.addcmul_(gradient, rates, value=-1)


def _momentum(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    (first,) = moments
    parameter.addcmul_(first.mul_(rule.momentum).add_(gradient), rates, value=-1)


def _nesterov(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    (first,) = moments
    first.mul_(rule.momentum).add_(gradient)
    parameter.addcmul_(gradient.add_(first, alpha=rule.momentum), rates, value=-1)


def _adam(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    first, second = moments
    first.mul_(rule.beta_1).add_(gradient, alpha=1 - rule.beta_1)
    second.mul_(rule.beta_2).addcmul_(gradient, gradient, value=1 - rule.beta_2)
    # the root is kept as it is for those who differentiate the step
    scale = (second / (1 - rule.beta_2**step)).sqrt_() + rule.epsilon
    parameter.addcdiv_(first * (rates / (1 - rule.beta_1**step)), scale, value=-1)


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", (), _sgd),
        Optimizer("momentum", ("first",), _momentum),
        Optimizer("nesterov", ("first",), _nesterov),
        Optimizer("adam", ("first", "second"), _adam),
        Optimizer("adamw", ("first", "second"), _adam, decoupled=True),
    )
}


def optimizer(name: str) -> Optimizer:
    """The optimizer of that name: tsdyn's own, or one that an installed package offers (`registers.OPTIMIZERS`).

    Raises:
        ValueError: if there is none, or a package offers something else than an `Optimizer` of that name.
    """
    return registers.OPTIMIZERS.part(name, Optimizer)


#: Values of training.method that are SGD with the whole data set as batch, or its limit of small steps.
_STEPS_OF = {"gd": "sgd", "flow": "sgd"}


@dataclass(frozen=True)
class Rule:
    """The update of one epoch.

    With gradients ∇ of J and torch.optim's conventions:
    SGD p ← p − η m, m ← μ m + ∇ + λ p, with Nesterov's momentum p ← p − η (∇ + λ p + μ m);  Adam with bias-corrected
    moments of ∇ + λ p;  AdamW p ← (1 − η λ) p before Adam's step with moments of ∇.

    Attributes:
        learning_rate: η, one for all members or one per member, (member,).
        name: Name of the optimizer in `OPTIMIZERS`; SGD with momentum is ``"momentum"`` or ``"nesterov"``.
        momentum: μ.
        weight_decay: λ.
        beta_1, beta_2, epsilon: Adam's constants.
        frozen: Layers 1..L that are not updated.
        normalize: Whether hidden weight rows are scaled back to unit norm after each step (biases are not).
        loss: The loss J of a batch.
        arguments: ``training.arguments`` of an optimizer that a package offers, as (key, value) sorted by key.
        factors: One factor on η per layer 1..L; none: all 1.
        clip: Where a member's gradient, of all parameters that are updated, is longer, it is scaled to this norm.
        decay_biases: Whether λ acts on biases and on BatchNorm's scale and shift, or on weights alone.

    Raises:
        ValueError: if there is no optimizer of that name.
    """

    learning_rate: float | Tensor
    name: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    frozen: tuple[int, ...] = ()
    normalize: bool = False
    loss: Loss = MSE
    arguments: tuple[tuple[str, Any], ...] = ()
    factors: tuple[float, ...] = ()
    clip: float | None = None
    decay_biases: bool = True

    def __post_init__(self) -> None:
        if self.name == "sgd" and self.momentum:
            object.__setattr__(self, "name", "momentum")
        optimizer(self.name)

    @classmethod
    def of(cls, training: Training, epoch: int) -> Rule:
        """The rule of the epoch that ends at `epoch`."""
        return cls(
            training.rate(epoch),
            "nesterov" if training.nesterov else _STEPS_OF.get(training.method, training.method),
            training.momentum,
            training.weight_decay,
            training.beta_1,
            training.beta_2,
            training.epsilon,
            training.frozen,
            training.normalize,
            loss(training.loss),
            tuple(sorted((training.arguments or {}).items())),
            training.rates or (),
            training.clip,
            training.decay_biases,
        )

    @property
    def options(self) -> frozenset[str]:
        """The options in use that a backend must name to be given this rule."""
        used = {"factors": bool(self.factors), "clip": self.clip is not None, "decay_biases": not self.decay_biases}
        return frozenset(name for name, there in used.items() if there)

    def argument(self, key: str, default: float) -> float:
        """The number under `key` in ``training.arguments``, for optimizers that packages offer."""
        return float(dict(self.arguments).get(key, default))

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of that name."""
        return optimizer(self.name)

    def block(self, members: slice) -> Rule:
        """The same rule with the learning rates of some of the members."""
        rate = self.learning_rate
        return replace(self, learning_rate=rate[members]) if isinstance(rate, Tensor) else self

    def on(self, parameter: Tensor) -> Rule:
        """The same rule with its rates on a parameter's device, so that no step copies them there."""
        rate = torch.as_tensor(self.learning_rate, dtype=parameter.dtype, device=parameter.device)
        return replace(self, learning_rate=rate.expand(len(parameter)).clone())

    def rates(self, like: Tensor, layer: int | None = None) -> Tensor:
        """Learning rate of each member, (member, 1, ...), in the dtype and on the device of the parameter `like`.

        With `layer`, that layer's factor is in it.

        A single rate for all gives such a tensor, too, so that rounding is the same whether or not rates differ.
        """
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        if self.factors and layer is not None:
            rate = rate * self.factors[layer - 1]
        return rate.expand(len(like)).view(-1, *[1] * (like.dim() - 1))

    def clipped(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The gradients, name → (member, ...), each member's scaled to norm `clip` where it is longer.

        As `torch.nn.utils.clip_grad_norm_`, which divides by the norm plus 1e-6.
        """
        if self.clip is None or not gradients:
            return gradients
        norms = [of_members(gradient).norm(dim=1) for gradient in gradients.values()]
        scale = (self.clip / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
        return {name: g * scale.view(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}

    def update(
        self, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
    ) -> None:
        """Take one step of one parameter tensor, in place.

        Args:
            parameter: (member, ...).
            gradient: Of the same shape; overwritten.
            moments: Each of the same shape.
            rates: Learning rates, (member, 1, ...).
            step: Number of the step, from 1; a tensor if the device counts.
        """
        if self.weight_decay and (self.decay_biases or parameter.dim() > 2):
            if self.optimizer.decoupled:
                parameter.mul_(1 - rates * self.weight_decay)
            else:
                gradient = gradient.add_(parameter, alpha=self.weight_decay)
        self.optimizer.update(self, parameter, gradient, moments, rates, step)


def of_members(tensor: Tensor) -> Tensor:
    """The numbers of each member, (member, number), also where that is one or none: (member, ...) given."""
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
