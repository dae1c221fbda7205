"""Dropout of members whose noise is keyed: masks are drawn from each member's own generator, call by call.

At each step of an epoch every member draws one mask per call of a dropout layer, in the order of the calls.
So noise depends on (seed, epoch, step, layer) only, and neither on other members nor on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

#: Kinds of dropout and how many dimensions of the input share one number: none, or all after (sample, channel).
KEYED: dict[type[nn.Module], bool] = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}
#: One mask per call, each (member, ...).
Masks: TypeAlias = Sequence[Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a dropout layer in a forward pass.

    Attributes:
        name: The layer's, as `named_modules` gives it.
        shape: Shape of its mask, which is multiplied with the input.
        dtype: Of the input.
        p: Share of numbers that become 0; the others are divided by 1 − p.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    p: float

    def mask(self, rng: np.random.Generator) -> Tensor:
        """0 with probability p, else 1/(1 − p)."""
        kept = torch.from_numpy(rng.random(self.shape) >= self.p)
        return kept.to(self.dtype) / (1 - self.p) if self.p < 1 else torch.zeros(self.shape, dtype=self.dtype)


def active(module: nn.Module) -> dict[str, nn.Module]:
    """The dropout layers that draw noise in the mode in which the module is, by name."""
    kinds = nn.modules.dropout._DropoutNd
    return {n: part for n, part in module.named_modules() if isinstance(part, kinds) and part.training and part.p > 0}


def calls(module: nn.Module, x: Tensor) -> tuple[Call, ...]:
    """The calls of its dropout layers when the module is called on a batch; () without any."""
    found: list[Call] = []

    def noting(name: str, part: nn.Module, p: float) -> object:
        def forward(given: Tensor) -> Tensor:
            shape = (*given.shape[:2], *(1 for _ in given.shape[2:])) if KEYED[type(part)] else tuple(given.shape)
            found.append(Call(name, shape, given.dtype, p))
            return given

        return forward

    parts = active(module)
    if parts:
        with _in_place_of(parts, {n: noting(n, part, float(part.p)) for n, part in parts.items()}), torch.no_grad():  # type: ignore[arg-type]
            module(x)
    return tuple(found)


def drawn(called: Sequence[Call], noises: Sequence[np.random.Generator], device: torch.device) -> list[Tensor]:
    """The masks of the next step of each member, one tensor (member, ...) per call."""
    each = [[call.mask(rng) for call in called] for rng in noises]
    return [torch.stack(masks).to(device) for masks in zip(*each, strict=True)]


@contextmanager
def masked(module: nn.Module, called: Sequence[Call], masks: Masks) -> Iterator[None]:
    """Context in which the dropout layers of a module multiply with these masks, call by call.

    Raises:
        ValueError: in the context, if a layer is called otherwise than `called` says.
    """
    if not called:
        yield
        return
    left = list(zip(called, masks, strict=True))

    def multiplying(name: str) -> object:
        def forward(given: Tensor) -> Tensor:
            if not left or left[0][0].name != name:
                raise ValueError(
                    f"train: the dropout layer {name} is not called as on the first batch, so that its noise has no "
                    "key; call it as often in every pass, or set its p to 0"
                )
            return given * left.pop(0)[1]

        return forward

    parts = active(module)
    with _in_place_of(parts, {name: multiplying(name) for name in parts}):
        yield


@contextmanager
def _in_place_of(parts: dict[str, nn.Module], forwards: dict[str, object]) -> Iterator[None]:
    """Context in which modules have other forward functions."""
    for name, part in parts.items():
        part.__dict__["forward"] = forwards[name]
    try:
        yield
    finally:
        for part in parts.values():
            del part.__dict__["forward"]
