"""One step of training as a pure function of torch tensors, for members side by side, which torch.func differentiates.

The engine takes its steps in place and keeps no graph.  Here the same step is a function (state, rate, weights of
samples, targets, inputs) → state.  The optimizer is the engine's own (`Ensemble.take`), applied to copies; forward pass
and BatchNorm are written out, since torch updates running statistics behind autograd's back.  `adjoint` compares each
step with the engine's while it differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

from tsdyn.engine import dropout
from tsdyn.engine.ensemble import Ensemble, Named, layer_of, parts_of
from tsdyn.engine.general import NONE, Noise
from tsdyn.engine.loss import MSE, Loss
from tsdyn.engine.rule import Rule, of_members
from tsdyn.experiment.errors import ExperimentError
from tsdyn.networks.any_module import called_with
from tsdyn.networks.batch_norm import BatchNorm
from tsdyn.networks.network import Network

#: Added to Adam's second moments: the root has no derivative at 0, where a parameter never had a gradient.  The first
#: moment is 0 there, too, so that the step's derivative is that of first/ε; no root above 1e-130 changes by a bit.
FLOOR = 1e-290
#: Optimizers that divide by the root of their second moment.
ROOTED = ("adam", "adamw")


@dataclass(frozen=True)
class OwnModule:
    """A module of the user's own.

    Attributes:
        module: The module.
        fixed: What training leaves: buffers and frozen parameters, (member, ...) each.
        noise: The masks of its dropout layers in one step.
    """

    module: nn.Module
    fixed: Named
    noise: Noise = NONE


#: What members are: networks, or modules.
Kind: TypeAlias = Network | OwnModule


def kind_of(ensemble: Ensemble) -> Kind:
    """The architecture of an ensemble, for `forward` and `step`."""
    architecture = ensemble.architecture
    return OwnModule(architecture, ensemble.buffers) if isinstance(architecture, nn.Module) else architecture


class State(NamedTuple):
    """All that a step changes, each tensor (member, ...): parameters, buffers, and optimiser moments by name."""

    values: Named
    buffers: Named
    moments: dict[str, Named]

    @classmethod
    def of(cls, ensemble: Ensemble) -> State:
        """A copy of an ensemble's tensors."""
        return cls.held(ensemble).map(torch.clone)

    @classmethod
    def held(cls, ensemble: Ensemble) -> State:
        """An ensemble's own tensors; buffers of a module are no part of it (`OwnModule`)."""
        buffers = {} if isinstance(ensemble.architecture, nn.Module) else ensemble.buffers
        return cls(ensemble.values, buffers, ensemble.moments)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """A state with `change` applied to each tensor."""
        return State(
            {n: change(t) for n, t in self.values.items()},
            {n: change(t) for n, t in self.buffers.items()},
            {m: {n: change(t) for n, t in named.items()} for m, named in self.moments.items()},
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        moments = [t for named in self.moments.values() for t in named.values()]
        return [*self.values.values(), *self.buffers.values(), *moments]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())


class Inputs(NamedTuple):
    """What a step takes beside the state.

    Attributes:
        rate: Learning rate, (member,).
        weight: Weights of the samples in the loss, (member, batch); 1 in training.
        target: (member, batch, output).
        input: (member, batch, input).
    """

    rate: Tensor
    weight: Tensor
    target: Tensor
    input: Tensor


@dataclass(frozen=True)
class Gates:
    """What is piecewise in a step: where it passes 0, the step's derivative jumps.

    Attributes:
        hidden: Pre-activations of hidden nodes, each (member, ...).
        clip: Norm of each member's gradient minus ``training.clip``, (member,).
    """

    hidden: list[Tensor]
    clip: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All of them, each (member, ...)."""
        return [*self.hidden, *([] if self.clip is None else [self.clip])]


# --- forward -------------------------------------------------------------------------------------------------


def forward(
    architecture: Kind, values: Named, buffers: Named, x: Tensor, *, training: bool
) -> tuple[Tensor, Named, list[Tensor], list[Tensor]]:
    """Outputs, buffers after the pass, pre-activations and activations of hidden layers; of each member on its own x.

    Args:
        architecture: A network, or a module of the user's own, whose hidden layers are not known.
        values, buffers: (member, ...) by name.
        x: (member, sample, input).
        training: Whether BatchNorm uses the batch.

    Returns:
        Outputs (member, sample, output); of a convolution the hidden layers are (member, sample, channel, row, column).
    """
    if isinstance(architecture, OwnModule):
        module = architecture.module

        called = architecture.noise.called

        def one(v: Named, fixed: Named, x: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
            with dropout.masked(module, called, masks):
                output: Tensor = called_with(module, {**v, **fixed}, (x,))
            return output

        fixed = {n: t.clone() for n, t in architecture.fixed.items()}
        try:
            return vmap(one)(values, fixed, x, architecture.noise.masks), buffers, [], []
        except RuntimeError as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ExperimentError(
                f"sensitivity: torch.func.vmap refuses {type(module).__name__} ({said}), so that its training cannot "
                "be differentiated; write it without branches on its numbers, and recurrent layers as loops of cells"
            ) from error
    weights, biases, norms = parts_of(architecture, values, buffers)
    frame, members = architecture.frame, len(x)
    after = dict(buffers)
    hidden: list[Tensor] = []
    active: list[Tensor] = []
    f = x if frame.image is None else x.unflatten(2, frame.image)  # (member, sample, channel, row, column)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim == 5:
            side = F.conv2d(
                f.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1), None if bias is None else bias.flatten(),
                frame.strides[i], frame.paddings[i], groups=members,
            )  # fmt: skip
            z = side.unflatten(1, (members, -1)).transpose(0, 1)
        else:
            f = f.flatten(2)
            z = torch.bmm(f, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), f, weight.mT)
        if i == architecture.depth - 1:
            return z, after, hidden, active
        norm = norms[i]
        first = norm is not None and frame.norm_first(i)
        if norm is not None and first:
            z, moved = _normalized(z, norm, training)
            after |= _named(moved, i + 1)
        hidden.append(z)
        f = frame.activation(z)
        if norm is not None and not first:
            f, moved = _normalized(f, norm, training)
            after |= _named(moved, i + 1)
        active.append(f)
    raise AssertionError("a network has an output layer")


def _named(norm: BatchNorm, layer: int) -> Named:
    return {f"norm_mean_{layer}": norm.mean, f"norm_variance_{layer}": norm.variance}


def _normalized(x: Tensor, norm: BatchNorm, training: bool) -> tuple[Tensor, BatchNorm]:
    """BatchNorm of (member, sample, node, ...), and the BatchNorm with its running statistics after the batch."""
    over = (1, *range(3, x.ndim))

    def wide(per_node: Tensor) -> Tensor:
        return per_node.view(len(x), 1, -1, *[1] * (x.ndim - 3))

    mean, variance = norm.mean, norm.variance
    if training:
        mean = x.mean(over)
        variance = (x - wide(mean)).square().mean(over)
        count = x[0, :, 0].numel()
        assert norm.momentum is not None  # the engine refuses it
        norm = replace(
            norm,
            mean=(1 - norm.momentum) * norm.mean + norm.momentum * mean,
            variance=(1 - norm.momentum) * norm.variance + norm.momentum * variance * (count / (count - 1)),
        )
    found = (x - wide(mean)) * wide((variance + norm.eps).rsqrt())
    if norm.scale is not None and norm.shift is not None:
        found = found * wide(norm.scale) + wide(norm.shift)
    return found, norm


def losses(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample, (member, sample)."""
    if loss is MSE:
        return 0.5 * (target - output).square().sum(-1)

    def one(f: Tensor, y: Tensor) -> Tensor:
        return loss.value(f[None], y[None])

    found: Tensor = vmap(one)(output.flatten(0, 1), target.flatten(0, 1))
    return found.view(output.shape[:2])


# --- the step ------------------------------------------------------------------------------------------------


def step(kind: Kind, state: State, given: Inputs, rule: Rule, count: int) -> tuple[State, Gates]:
    """The state after step number `count`, and the step's gates; nothing is changed in place.

    J = (1/batch) Σ_i w_i ℓ_i with the weights w of the samples; the rate of `rule` is not used.
    """

    def objective(values: Named) -> tuple[Tensor, tuple[Named, list[Tensor]]]:
        output, buffers, hidden, _ = forward(kind, values, state.buffers, given.input, training=True)
        return (given.weight * losses(rule.loss, output, given.target)).mean(1).sum(), (buffers, hidden)

    gradients, (buffers, hidden) = grad(objective, has_aux=True)(state.values)
    gradients = {n: g for n, g in gradients.items() if learns(rule, n)}
    values, moments = updated(kind, state, gradients, given.rate, rule, count)
    return State(values, buffers, moments), Gates(hidden, beyond_clip(rule, gradients))


def learns(rule: Rule, name: str) -> bool:
    """Whether a parameter is in no frozen layer."""
    return not rule.frozen or layer_of(name) not in rule.frozen


def beyond_clip(rule: Rule, gradients: Named) -> Tensor | None:
    """Norm of each member's gradient minus ``training.clip``, (member,); None without clipping."""
    if rule.clip is None or not gradients:
        return None
    norms = torch.stack([of_members(g).norm(dim=1) for g in gradients.values()])
    beyond: Tensor = norms.norm(dim=0) - rule.clip
    return beyond


def updated(
    kind: Kind, state: State, gradients: Named, rate: Tensor, rule: Rule, count: int
) -> tuple[Named, dict[str, Named]]:
    """Parameters and moments after the optimizer's step, by the engine's own update of copies."""
    moments = {
        m: {n: t + FLOOR if m == "second" and rule.name in ROOTED else t.clone() for n, t in named.items()}
        for m, named in state.moments.items()
    }
    own = kind.module if isinstance(kind, OwnModule) else kind
    taken = Ensemble(own, {n: t.clone() for n, t in state.values.items()}, {}, moments)
    # rows are normalised here: in place it would destroy what the derivative of their norm needs
    plain = replace(rule, learning_rate=rate, normalize=False)
    taken.take({n: g.clone() for n, g in gradients.items()}, plain, count)
    values = dict(taken.values)
    if rule.normalize and isinstance(kind, Network):
        for name in gradients:
            if name.startswith("weight_") and layer_of(name) < kind.depth:
                norm = values[name].flatten(2).norm(dim=2)
                values[name] = values[name] / norm.view(*norm.shape, *[1] * (values[name].ndim - 2))
    return values, taken.moments
