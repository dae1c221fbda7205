"""Formulas between the nodes of two layers: ε-alignment, winners and overlaps, for numpy arrays and torch tensors.

Each uses only functions that both libraries have under the same name, so that labelled analysis (numpy, block by block
under dask) and the engine (torch, with gradients, on any device) share it.  Imports no torch.
"""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

import numpy as np

#: A numpy array or a torch tensor.
Array: TypeAlias = Any
#: The normalisation of order parameters everywhere in tsdyn: the text of their attribute ``normalisation``, which
#: functions that take order parameters check.
FIELDS = "covariance of the fields w·x, w as a network has it; w·w/N where fields are w·x/√N"


def _library(array: Array) -> Any:
    """numpy, torch, or the namespace of a differentiable array, whichever the array is of."""
    if isinstance(array, np.ndarray):
        return np
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else sys.modules["torch"]


def regular(weight: Array, bias: Array) -> tuple[Array, Array]:
    """(w/‖w‖, b/‖w‖) from (..., node, input_node) and (..., node); NaN for a zero weight and padding.

    Source: Tian (2020), Definition 1.
    """
    library = _library(weight)
    norm = library.linalg.norm(weight, axis=-1)
    norm = library.where(norm > 0, norm, math.nan)
    return weight / norm[..., None], bias / norm


def epsilon(weight: Array, bias: Array, weight_2: Array, bias_2: Array) -> Array:
    """ε_jk = max(sin ∠(w_j, w_k), |b_j − s b_k|), s = sign cos ∠, of nodes scaled to ‖w‖ = 1; (..., node, node_2).

    From (..., node, input_node), (..., node) and the second layer's alike.  The sine comes from the part of w_k that is
    orthogonal to w_j, which keeps angles far below the square root of rounding.  NaN for a zero weight and padding.
    Source: Tian (2020), Definition 3.
    """
    library = _library(weight)
    (w, b), (w_2, b_2) = regular(weight, bias), regular(weight_2, bias_2)
    cosine = w @ library.swapaxes(w_2, -1, -2)
    # one node at a time: all pairs at once would need an array of (pairs x inputs) numbers
    sine = library.stack(
        [library.linalg.norm(w_2 - cosine[..., j, :, None] * w[..., j, None, :], axis=-1) for j in range(w.shape[-2])],
        axis=-2,
    )
    b_2 = b_2[..., None, :]
    offset = library.abs(b[..., :, None] - library.where(cosine < 0, -b_2, b_2))
    return library.maximum(library.clip(sine, None, 1), offset)


def separation(weight: Array, bias: Array) -> Array:
    """ε_0 = min_{j ≠ j'} ε_jj' of the nodes of one layer; (..., node, input_node), (..., node) → (...).

    Padding and nodes of zero weight are left out.  Infinite for a single node, NaN for none.
    Source: Tian (2020), Assumption 3.
    """
    library = _library(weight)
    eps = epsilon(weight, bias, weight, bias)
    there = ~library.isnan(regular(weight, bias)[0][..., 0])
    pairs = eps[(..., *np.nonzero(~np.eye(eps.shape[-1], dtype=bool)))]
    alone = library.full_like(eps[..., 0, :1], math.inf)
    pairs = library.concatenate([library.where(library.isnan(pairs), math.inf, pairs), alone], axis=-1)
    return library.where(there.any(-1), library.amin(pairs, axis=-1), math.nan)


def overlap(weight: Array, weight_2: Array) -> Array:
    """w_i · w_k from (..., node, input_node) and (..., node_2, input_node); (..., node, node_2)."""
    return weight @ _library(weight).swapaxes(weight_2, -1, -2)


def best_match(score: Array) -> Array:
    """(..., teacher_node, node) → (..., teacher_node): the largest score of any student node; NaN if all are NaN."""
    largest: Array = np.fmax.reduce(score, axis=-1)  # np.nanmax would warn where all are NaN
    return largest


def best_node(score: Array) -> Array:
    """(..., teacher_node, node) → (..., teacher_node): index of the best student node, the first of equals.

    NaN where no student node has a score.
    """
    missing = np.isnan(score)
    winner = np.where(missing, -np.inf, score).argmax(-1)
    return np.where(missing.all(-1), np.nan, winner)


def is_winner(score: Array, threshold: float = -math.inf) -> Array:
    """(..., teacher_node, node) → (..., node): 1 for the best node of a teacher node matched above `threshold`, else 0.

    NaN for a node without any score: padding, or dead.
    """
    winner = best_node(score)
    matched = best_match(score) > threshold
    nodes = np.arange(score.shape[-1])
    won = ((winner[..., None] == nodes) & matched[..., None]).any(-2)
    return np.where(np.isnan(score).all(-2), np.nan, won)
