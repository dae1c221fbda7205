"""What a method of integration gives of one step: where it ends, its error, and what lies within it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Tolerances of a step and conditions under which a member stops; see `gradient_flow`."""

    rtol: float = 1e-4
    atol: float = 1e-6
    gradient: float = 1e-7
    norm: float = 1e-6
    steps: int = 20_000
    end: float = 1e9


@dataclass(frozen=True)
class Attempt:
    """A step that was tried from each of some members.

    Attributes:
        end: Parameters at its end, (member, parameter).
        slope: Gradient there.
        error: Estimated error in units of the tolerance, (member,); the step counts where it is at most 1, and is
            infinite where there is no such step.
        factor: What the size of the next try is of this one's, (member,).
        inside: Parameters (time, parameter) of one row at shares ``s`` (time, 1) of the step, 0 to 1.
    """

    end: Tensor
    slope: Tensor
    error: Tensor
    factor: Tensor
    inside: Callable[[int, Tensor], Tensor]


@runtime_checkable
class Method(Protocol):
    """A method of integration, with what it remembers of the members of one chunk."""

    def attempt(self, y: Tensor, h: Tensor, gradient: Tensor, index: Tensor) -> Attempt:
        """Try a step of size `h` from `y` of the members in `index`."""
        ...

    def memory(self) -> dict[str, Tensor]:
        """Everything remembered that the next step depends on, by name, (member, …) each; written to by `restore`."""
        ...

    def release(self) -> None:
        """Give back what can be computed again from the memory."""
        ...


def settled(difference: Tensor, y: Tensor, end: Tensor, slope: Tensor, limits: Limits) -> Tensor:
    """Root mean square of an error estimate in units of the tolerance, (member,); infinite where it is not finite."""
    scale = limits.atol + limits.rtol * torch.maximum(y.abs(), end.abs())
    error = (difference / scale).square().mean(-1).sqrt()
    finite = torch.isfinite(error) & torch.isfinite(slope).all(-1)
    return torch.where(finite, error, math.inf)
