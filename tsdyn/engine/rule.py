"""Rules: how a gradient moves a parameter.  Each is declared once, in `OPTIMIZERS`, with the moments it keeps.

`Rule` is what one epoch does: an optimizer, its numbers, which layers it leaves alone, and the loss that is made small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tsdyn import registers
from tsdyn.engine.loss import MSE, Loss, loss
from tsdyn.experiment.parts import Training

#: (rule, parameter, gradient, moments, rates, step) → None, in place; see `Rule.update`.
Update: TypeAlias = Callable[["Rule", Tensor, Tensor, Sequence[Tensor], Tensor, "int | Tensor"], None]


@dataclass(frozen=True)
class Optimizer:
    """A way to take a step.

    Attributes:
        name: As `Rule.name` and ``training.method`` say it.
        moments: Names of the moments it keeps of every parameter, each as large as the parameter.
        update: Takes the step, in place; the gradient it gets holds the weight decay and may be overwritten.
    """

    name: str
    moments: tuple[str, ...]
    update: Update


def _sgd(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    parameter.addcmul_(gradient, rates, value=-1)


def _momentum(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    (first,) = moments
    parameter.addcmul_(first.mul_(rule.momentum).add_(gradient), rates, value=-1)


def _adam(
    rule: Rule, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
) -> None:
    first, second = moments
    first.mul_(rule.beta_1).add_(gradient, alpha=1 - rule.beta_1)
    second.mul_(rule.beta_2).addcmul_(gradient, gradient, value=1 - rule.beta_2)
    scale = (second / (1 - rule.beta_2**step)).sqrt_().add_(rule.epsilon)
    parameter.addcdiv_(first * (rates / (1 - rule.beta_1**step)), scale, value=-1)


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("sgd", (), _sgd),
        Optimizer("momentum", ("first",), _momentum),
        Optimizer("adam", ("first", "second"), _adam),
    )
}


def optimizer(name: str) -> Optimizer:
    """The optimizer of that name: tsdyn's own, or one that an installed package offers (`registers.OPTIMIZERS`).

    Raises:
        ValueError: if there is none, or what a package offers is no `Optimizer` of that name.
    """
    found = registers.OPTIMIZERS.load(name)
    if not isinstance(found, Optimizer) or found.name != name:
        raise registers.PartError(
            f"optimizer {name!r}: {registers.OPTIMIZERS.origin(name).target} is {found!r}; it must be a tsdyn "
            "Optimizer of that name"
        )
    return found


#: Methods of an experiment that take SGD's steps: on all the data at once, or infinitely small ones.
_STEPS_OF = {"gd": "sgd", "flow": "sgd"}


@dataclass(frozen=True)
class Rule:
    """The update of one epoch.

    With gradients ∇ of J and torch.optim's conventions:
    SGD p ← p − η m, m ← μ m + ∇ + λ p;  Adam with bias-corrected moments of ∇ + λ p.

    Attributes:
        learning_rate: η, of all members or one for each member, (member,).
        name: Of the optimizer in `OPTIMIZERS`; SGD with a momentum is ``"momentum"``.
        momentum: μ.
        weight_decay: λ.
        beta_1, beta_2, epsilon: Adam's constants.
        frozen: Layers 1..L that are not updated.
        normalize: Whether hidden weight rows are scaled back to unit norm after each step (biases are not).
        loss: J over a batch.
        arguments: ``training.arguments`` of an optimizer that a package offers, (key, value) by key.

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

    def __post_init__(self) -> None:
        if self.name == "sgd" and self.momentum:
            object.__setattr__(self, "name", "momentum")
        optimizer(self.name)

    @classmethod
    def of(cls, training: Training, epoch: int) -> Rule:
        """The rule of the epoch that ends at `epoch`."""
        return cls(
            training.rate(epoch),
            _STEPS_OF.get(training.method, training.method),
            training.momentum,
            training.weight_decay,
            training.beta_1,
            training.beta_2,
            training.epsilon,
            training.frozen,
            training.normalize,
            loss(training.loss),
            tuple(sorted((training.arguments or {}).items())),
        )

    def argument(self, key: str, default: float) -> float:
        """A number of ``training.arguments``, for optimizers that packages offer."""
        return float(dict(self.arguments).get(key, default))

    @property
    def optimizer(self) -> Optimizer:
        return optimizer(self.name)

    def block(self, members: slice) -> Rule:
        """The rule of some of the members."""
        rate = self.learning_rate
        return replace(self, learning_rate=rate[members]) if isinstance(rate, Tensor) else self

    def on(self, parameter: Tensor) -> Rule:
        """The same rule with its rates on a parameter's device, from where no step has to fetch them."""
        rate = torch.as_tensor(self.learning_rate, dtype=parameter.dtype, device=parameter.device)
        return replace(self, learning_rate=rate.expand(len(parameter)).clone())

    def rates(self, like: Tensor) -> Tensor:
        """Learning rate of each member of the parameter `like`, (member, 1, ...), on its device in its dtype.

        One rate for all makes the same tensor, so that a member's rounding does not depend on its neighbours' rates.
        """
        rate = torch.as_tensor(self.learning_rate, dtype=like.dtype, device=like.device)
        return rate.expand(len(like)).view(-1, *[1] * (like.dim() - 1))

    def update(
        self, parameter: Tensor, gradient: Tensor, moments: Sequence[Tensor], rates: Tensor, step: int | Tensor
    ) -> None:
        """One step of one parameter tensor, in place.

        Args:
            parameter: (member, ...).
            gradient: As `parameter`; overwritten.
            moments: As `parameter`.
            rates: Learning rates, (member, 1, ...).
            step: From 1; a tensor where a device counts for itself.
        """
        if self.weight_decay:
            gradient = gradient.add_(parameter, alpha=self.weight_decay)
        self.optimizer.update(self, parameter, gradient, moments, rates, step)
