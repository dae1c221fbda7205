"""The forward pass of stacked members: convolutions and linear layers, each with BatchNorm or none.

The formula is written for members side by side, (member, sample, ...): convolutions of all members are one grouped
convolution over (sample, member·channel), which on one core takes two thirds of the time of separate modules at
batch 16 and less below (docs: performance).  A single network is one member.

A node of a convolution is a channel.  Its activations over samples, rows and columns are the rows of its trace, so
that whatever is defined for nodes - correlation, dead nodes, moments - is defined for channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, assert_never, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from tsdyn.networks.activations import Activation
from tsdyn.networks.batch_norm import BatchNorm, normalized

Image: TypeAlias = tuple[int, int, int]
Place: TypeAlias = Literal["before", "after"]


@dataclass(frozen=True)
class Frame:
    """What the layers of a network share: activation, image size, strides, places of BatchNorm.

    Attributes:
        activation: σ of the hidden layers.
        image: (channel, row, column) of an input, None for a network without convolutions.
        strides, paddings: Of each convolution; padding 0 is "valid".
        places: Whether BatchNorm is applied before or after σ, for each hidden layer.
    """

    activation: Activation
    image: Image | None = None
    strides: tuple[int, ...] = ()
    paddings: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()

    def norm_first(self, i: int) -> bool:
        """Whether BatchNorm of hidden layer i = 0, 1, ... is applied before σ."""
        match self.places[i]:
            case "before":
                return True
            case "after":
                return False
            case other:
                assert_never(other)


@runtime_checkable
class Member(Protocol):
    """Anything that has the parameters of one network."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[BatchNorm | None]


@dataclass
class Parameters:
    """Parameters of S members side by side, each tensor (member, ...)."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    norms: list[BatchNorm | None]

    @classmethod
    def of(cls, networks: Sequence[Member], *, share: bool = False) -> Parameters:
        """The networks' parameters stacked along `member`: copies, or with `share` views of one network's tensors."""

        def beside(tensors: Sequence[Tensor]) -> Tensor:
            return tensors[0].unsqueeze(0) if share else torch.stack([t.detach() for t in tensors])

        def optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
            there = [t for t in tensors if t is not None]
            if there and len(there) < len(tensors):
                raise ValueError("Parameters: some members have a bias or BatchNorm that others lack; use one shape")
            return beside(there) if there else None

        norms: list[BatchNorm | None] = []
        for column in zip(*(n.norms for n in networks), strict=True):
            held = [n for n in column if n is not None]
            if held and len({(n.eps, n.momentum) for n in column if n is not None}) + (len(held) < len(column)) > 1:
                raise ValueError("Parameters: members differ in having BatchNorm, its eps or momentum; use one shape")
            norms.append(
                replace(
                    held[0],
                    mean=beside([n.mean for n in held]),
                    variance=beside([n.variance for n in held]),
                    scale=optional([n.scale for n in held]),
                    shift=optional([n.shift for n in held]),
                )
                if held
                else None
            )
        return cls(
            [beside(column) for column in zip(*(n.weights for n in networks), strict=True)],
            [optional(column) for column in zip(*(n.biases for n in networks), strict=True)],
            norms,
        )

    @property
    def members(self) -> int:
        return len(self.weights[0])


@dataclass(frozen=True)
class Layer:
    """One layer of a forward pass, in the engine's layout.

    That is (member, sample, node), and for a convolution (sample, member·channel, row, column).

    Attributes:
        z: What σ is applied to.
        f: What the layer above gets.
        members: S, their number.
    """

    z: Tensor
    f: Tensor
    members: int

    @property
    def preactivation(self) -> Tensor:
        """(member, sample, node), of a convolution (member, sample, channel, row, column)."""
        return self.by_member(self.z)

    @property
    def activation(self) -> Tensor:
        """(member, sample, node), of a convolution (member, sample, channel, row, column)."""
        return self.by_member(self.f)

    def by_member(self, x: Tensor) -> Tensor:
        """A tensor `x` in the layout of `f`, rearranged to (member, sample, ...)."""
        return x.unflatten(1, (self.members, -1)).transpose(0, 1) if x.ndim == 4 else x


def propagate(p: Parameters, frame: Frame, x: Tensor, *, training: bool) -> list[Layer]:
    """Every layer of every member on its own inputs, (member, sample, input).

    z = W f + b; then BatchNorm and σ in the frame's order.  `preactivation` is what σ is applied to.  In training
    mode each member's BatchNorm uses its own batch and updates its own running statistics in place.
    """
    members = len(x)
    f = x if frame.image is None else x.unflatten(2, frame.image).transpose(0, 1).flatten(1, 2)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(f)  # vmap knows one memory format only
    if f.ndim == 4 and f.device.type == "cpu" and not wrapped:
        f = f.contiguous(memory_format=torch.channels_last)
    found = []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        if weight.ndim == 5:
            flat = None if bias is None else bias.flatten()
            z = F.conv2d(f, weight.flatten(0, 1), flat, frame.strides[i], frame.paddings[i], groups=members)
        else:
            if f.ndim == 4:
                f = f.unflatten(1, (members, -1)).transpose(0, 1).flatten(2)
            z = torch.bmm(f, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), f, weight.mT)
        norm = p.norms[i] if i < len(p.norms) else None
        if i == len(p.weights) - 1:
            f = z
        elif norm is None:
            f = frame.activation(z)
        elif frame.norm_first(i):
            z = _by_members_own(z, norm, training)
            f = frame.activation(z)
        else:
            f = _by_members_own(frame.activation(z), norm, training)
        found.append(Layer(z, f, members))
    return found


def _by_members_own(x: Tensor, norm: BatchNorm, training: bool) -> Tensor:
    """BatchNorm of (sample, member·channel, row, column) or (member, sample, node); members do not mix."""
    if x.ndim == 4:
        return normalized(x, norm, training=training)
    flat = normalized(x.transpose(0, 1).flatten(1), norm, training=training)
    by_member: Tensor = flat.unflatten(1, (len(norm.mean), -1)).transpose(0, 1)
    return by_member


def rows(x: Tensor) -> Tensor:
    """The tensor of a single member with one row per sample, (sample, node), or pixel, (sample·row·column, channel)."""
    return x[0] if x.ndim == 3 else x[0].permute(0, 2, 3, 1).flatten(0, 2)
