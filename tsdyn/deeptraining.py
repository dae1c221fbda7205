"""Ensembles with convolutions and BatchNorm: one forward pass of all members, autograd, the engine's own update.

The sum of the members' losses is differentiated once; a member's parameters enter its own loss only, so the gradient
is each member's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from tsdyn import convolution
from tsdyn.activations import Activation
from tsdyn.batch_norm import BatchNorm, normalized
from tsdyn.networks import Network
from tsdyn.propagate import Frame, Parameters, propagate
from tsdyn.training import Rule, Stream, living_blocks

#: Activations of a block of members and their gradients should stay within a core's share of the last-level cache.
BLOCK_BYTES = 1 << 22


class DeepEnsemble:
    """Parameters, running statistics and optimiser state of S members of one shape; as `training.Ensemble`.

    Attributes:
        values: Parameters and running statistics, (member, ...).
        frame: What layers share.
        moments: Optimiser moments by name, one tensor a parameter.
        steps: Steps taken.
        death_epoch: (member,), the epoch at whose end a parameter was NaN or infinite; −1 while alive.
    """

    def __init__(
        self,
        values: Parameters,
        frame: Frame,
        moments: dict[str, list[Tensor]] | None = None,
        steps: int = 0,
        death_epoch: Tensor | None = None,
    ) -> None:
        self.values, self.frame, self.steps = values, frame, steps
        self.moments = {} if moments is None else moments
        self.death_epoch = torch.full((self.members,), -1) if death_epoch is None else death_epoch

    @classmethod
    def of(cls, networks: Sequence[Network], *, device: str = "cpu") -> DeepEnsemble:
        """Members side by side; copies."""
        return cls(Parameters.of([n.to(device) for n in networks]), networks[0].frame)

    @property
    def members(self) -> int:
        return self.values.members

    @property
    def depth(self) -> int:
        return len(self.values.weights)

    @property
    def weights(self) -> list[Tensor]:
        return self.values.weights

    @property
    def biases(self) -> list[Tensor | None]:
        return self.values.biases

    @property
    def activation(self) -> Activation:
        return self.frame.activation

    def parameters(self) -> list[tuple[str, int, Tensor]]:
        """(kind, layer, tensor) of what is trained, lowest layer first: weight, bias, norm_scale, norm_shift."""
        found = []
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            norm = self.values.norms[i] if i < self.depth - 1 else None
            layer = {"weight": weight, "bias": bias}
            if norm is not None:
                layer |= {"norm_scale": norm.scale, "norm_shift": norm.shift}
            found += [(kind, i + 1, tensor) for kind, tensor in layer.items() if tensor is not None]
        return found

    def buffers(self) -> list[tuple[str, int, Tensor]]:
        """(kind, layer, tensor) of the running statistics: norm_mean, norm_variance."""
        return [
            (kind, i, tensor)
            for i, norm in enumerate(self.values.norms, start=1)
            if norm is not None
            for kind, tensor in (("norm_mean", norm.mean), ("norm_variance", norm.variance))
        ]

    def network(self, member: int) -> Network:
        """One member; shares memory."""
        one = _mapped(self.values, lambda t: t[member])
        f = self.frame
        return Network(
            one.weights, one.biases, f.activation.name, leak=f.activation.leak or 0.0, norms=one.norms, norm=f.places,
            image=f.image, stride=f.strides, padding=f.paddings,
        )  # fmt: skip

    def block(self, members: slice) -> DeepEnsemble:
        """Some members; a view that shares memory."""
        return DeepEnsemble(
            _mapped(self.values, lambda t: t[members]),
            self.frame,
            {name: [m[members] for m in moments] for name, moments in self.moments.items()},
            self.steps,
            self.death_epoch[members],
        )


def _mapped(values: Parameters, change: object) -> Parameters:
    assert callable(change)
    norms: list[BatchNorm | None] = [None if n is None else n.map(change) for n in values.norms]
    return Parameters(
        [change(w) for w in values.weights], [None if b is None else change(b) for b in values.biases], norms
    )


def train_epoch(ensemble: DeepEnsemble, stream: Stream, rule: Rule, *, batch: int) -> None:
    """One epoch of every living member, in place, BatchNorm in training mode; as `training.train_epoch`.

    Raises:
        ValueError: for BatchNorm with batches of one sample.
    """
    rule.prepare(ensemble)
    taken = 0
    for members in living_blocks(ensemble.death_epoch, _block_size(ensemble, batch)):
        block, taken = ensemble.block(members), 0
        own = rule.block(members)
        for x, y in itertools.chain.from_iterable(stream(members)):
            taken += 1
            step(block, x, y, own, ensemble.steps + taken)
    ensemble.steps += taken


def _block_size(ensemble: DeepEnsemble, batch: int) -> int:
    """Members whose activations and gradients fit in `BLOCK_BYTES`, on CUDA in an eighth of it all; at least one."""
    numbers = 0
    for image, weight in zip(ensemble.network(0).images, ensemble.weights, strict=True):
        numbers += 2 * batch * (weight.shape[1] if image is None else image[0] * image[1] * image[2])
    device = ensemble.weights[0].device
    room = torch.cuda.mem_get_info(device)[1] // 8 if device.type == "cuda" else BLOCK_BYTES
    return max(1, room // (numbers * ensemble.weights[0].element_size()))


def _output(values: Parameters, frame: Frame, x: Tensor) -> Tensor:
    """f_L of every member on its own batch in training mode, (member, sample, output): `propagate`, or quicker."""
    if frame.image is None or any(stride != 1 for stride in frame.strides) or not convolution.serves(x):
        return propagate(values, frame, x, training=True)[-1].activation
    f = x.transpose(1, 2).contiguous().unflatten(1, frame.image)  # (member, channel, row, column, sample)
    for i, (weight, bias) in enumerate(zip(values.weights, values.biases, strict=True)):
        if weight.ndim == 5:
            edge = frame.paddings[i]
            z = convolution.convolve(F.pad(f, (0, 0, edge, edge, edge, edge)) if edge else f, weight, bias)
        else:
            f = f.flatten(1, -2)
            z = torch.bmm(weight, f) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, f)
        norm = values.norms[i] if i < len(values.norms) else None
        if i == len(values.weights) - 1:
            f = z
        elif norm is None:
            f = frame.activation(z)
        elif frame.places[i] == "before":
            f = frame.activation(_normalized(z, norm))
        else:
            f = _normalized(frame.activation(z), norm)
    output: Tensor = f.transpose(1, 2)
    return output


def _normalized(x: Tensor, norm: BatchNorm) -> Tensor:
    """BatchNorm of (member, node, ..., sample) by the batch."""
    flat = x.reshape(1, x.shape[0] * x.shape[1], -1)
    found: Tensor = normalized(flat, norm, training=True).view_as(x)
    return found


def step(ensemble: DeepEnsemble, x: Tensor, y: Tensor, rule: Rule, count: int) -> None:
    """One update of every member on its own batch, in place.

    Args:
        ensemble: Its parameters and running statistics change.
        x: (member, sample, input).
        y: Targets, (member, sample, output).
        rule: The update; layers it freezes keep their running statistics moving.
        count: Steps taken, this one included.
    """
    named = ensemble.parameters()
    free = [(at, t.detach().requires_grad_(True)) for at, (_, layer, t) in enumerate(named) if layer not in rule.frozen]
    held = iter(free)
    leaves = {id(t): next(held)[1] for _, layer, t in named if layer not in rule.frozen}
    values = _mapped(ensemble.values, lambda t: leaves.get(id(t), t))
    with torch.enable_grad():
        output = _output(values, ensemble.frame, x)
        objective = vmap(rule.objective)(y, output).sum()
        gradients = torch.autograd.grad(objective, [leaf for _, leaf in free])
    for (at, _), gradient in zip(free, gradients, strict=True):
        kind, layer, parameter = named[at]
        rule.update(parameter, gradient, [m[at] for m in ensemble.moments.values()], rule.rates(parameter), count)
        if rule.normalize and kind == "weight" and layer < ensemble.depth:
            norm = parameter.flatten(2).norm(dim=2)
            parameter.div_(norm.view(*norm.shape, *([1] * (parameter.ndim - 2))))
