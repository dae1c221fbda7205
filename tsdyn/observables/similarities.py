"""Linear CKA of two arrays of activations, (sample, node) each: its parts, as functions of arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

KORNBLITH = "Kornblith et al. 2019 (arXiv:1905.00414), Eq. 4"


def unit(x: NDArray) -> NDArray:
    """The array in float64, centred and scaled to largest entry 1, so that large means or scales cost no digits.

    A constant layer becomes exactly 0; NaN everywhere if an entry is not finite.
    """
    x = np.asarray(x, dtype=np.float64)
    if not np.isfinite(x).all():
        return np.full_like(x, np.nan)
    for _ in range(2):  # scaled before centring, so that differences do not overflow, and again after it
        largest = np.abs(x).max(initial=0.0)
        x = x / largest if largest > 0 else x
        x = x - x[:1]  # exactly 0 for a constant, which subtracting the rounded mean alone does not give
        x = x - x.mean(0)
    return x


def product(x: NDArray, y: NDArray) -> float:
    """‖Yᵀ X‖²."""
    return float(np.linalg.norm(y.T @ x) ** 2)


def debiased_product(x: NDArray, y: NDArray) -> float:
    """n (n − 3) times the unbiased estimator of ‖cov(x, y)‖², which sums over distinct samples only.

    With K = X Xᵀ and L = Y Yᵀ without diagonals and centred x and y, K1 = −a and L1 = −b, a_i = |x_i|², b_i = |y_i|²:
    tr(KL) + 1ᵀK1 1ᵀL1/((n−1)(n−2)) − 2/(n−2) 1ᵀKL1.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    both = float((a * b).sum())
    return product(x, y) - both + float(a.sum() * b.sum()) / ((n - 1) * (n - 2)) - 2 * both / (n - 2)


def cka(x: NDArray, y: NDArray, of: Callable[[NDArray, NDArray], float] = product) -> float:
    """of(x, y) / (of(x, x) of(y, y))^½ of arrays that `unit` gave; NaN if one is constant or not finite."""
    own = [of(a, a) for a in (x, y)]
    if not all(size > 0 for size in own):
        return float("nan")
    return float(of(x, y) / np.sqrt(own[0]) / np.sqrt(own[1]))
