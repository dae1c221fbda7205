"""Checks of arguments to the theory: inputs that fit, in batches of bounded memory; layers; pairs of networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.arguments import NUMBERS, check
from tsdyn.axes import Inputs
from tsdyn.networks.network import Network

#: Per-sample matrices are formed in batches of at most this many bytes.
MEMORY = 8 << 20

Samples: TypeAlias = ArrayLike | Tensor | Iterable[Tensor]


def inputs(caller: str, x: ArrayLike | Tensor, *nets: Network) -> Inputs:
    """`x` as a tensor that all the networks accept.

    Raises:
        ValueError: for another shape, dtype or device, no samples, or values that are not finite.
    """
    check(caller, "x", x, NUMBERS)
    given = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    if given.ndim != 2 or len(given) == 0:
        raise ValueError(
            f"{caller}: x has shape {tuple(given.shape)}; it must be (sample, input) with at least one sample"
        )
    for net in nets:
        weight = net.weights[0]
        if given.shape[1] != net.widths[0]:
            raise ValueError(f"{caller}: x has {given.shape[1]} features, {net!r} takes {net.widths[0]}")
        if (given.dtype, given.device) != (weight.dtype, weight.device):
            raise ValueError(
                f"{caller}: x is {given.dtype} on {given.device}, {net!r} is on {weight.device}; "
                "move all to one dtype and device"
            )
    if not bool(torch.isfinite(given).all()):
        raise ValueError(f"{caller}: x holds NaN or infinite values; drop those samples first")
    return given


def batches(
    caller: str,
    x: Samples,
    *nets: Network,
    numbers: int,
    memory: int,
) -> Iterator[Inputs]:
    """`x` in batches whose per-sample matrices, of `numbers` numbers per sample, take at most `memory` bytes."""
    whole = isinstance(x, (Tensor, np.ndarray, list, tuple)) and not (
        isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)
    )
    iterable = isinstance(x, Iterable) and not isinstance(x, str | bytes | Mapping)
    parts: Iterable[ArrayLike | Tensor] = [x] if whole or not iterable else x  # type: ignore[list-item, assignment]
    empty = True
    for part in parts:
        held = inputs(caller, part, *nets)
        size = max(1, memory // (numbers * held.element_size()))
        if size == 1 and numbers * held.element_size() > 64 * memory:
            raise ValueError(
                f"{caller}: one sample needs {numbers * held.element_size() / 1e9:.1f} GB, "
                f"memory={memory / 1e9:.3f} GB is allowed; give more"
            )
        for start in range(0, len(held), size):
            empty = False
            yield held[start : start + size]
    if empty:
        raise ValueError(f"{caller}: no samples")


def check_layer(caller: str, layer: int, net: Network) -> None:
    """Raise ValueError for a layer outside 1..L."""
    if not 1 <= layer <= net.depth:
        raise ValueError(f"{caller}: layer={layer}; {net!r} has layers 1..{net.depth}")


def check_outputs(caller: str, student: Network, teacher: Network) -> None:
    """Raise ValueError for networks that differ in inputs or outputs."""
    for end, index in (("inputs", 0), ("outputs", -1)):
        if student.widths[index] != teacher.widths[index]:
            raise ValueError(
                f"{caller}: student and teacher must agree in their {end}, {student.widths[index]} and "
                f"{teacher.widths[index]}: {student!r}, {teacher!r}"
            )


def check_pair(caller: str, student: Network, teacher: Network) -> None:
    """Raise ValueError for networks that differ in inputs, outputs or depth."""
    check_outputs(caller, student, teacher)
    if student.depth != teacher.depth:
        raise ValueError(
            f"{caller}: the student has {student.depth} layers, the teacher {teacher.depth}; layer l is coupled to "
            "layer l, so depths must agree (a network can be deepened with identity layers)"
        )
