"""One comparison of arrays for all tests: dtype, shape, NaN in the same places, and a bound relative to the largest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def assert_close(mine: Any, theirs: Any, tolerance: float, *, what: object = "", floor: float = 0.0) -> None:
    """Assert that two arrays hold the same numbers up to `tolerance` times the largest finite one.

    Args:
        mine, theirs: Tensors or arrays.
        tolerance: Relative to ``max(|theirs|) + floor``; 0 asks for the same bits.
        what: Names the pair in the message.
        floor: Added to the scale, where numbers near zero have errors of another origin.

    NaN agrees with NaN and an infinity with itself, and with nothing else.
    """
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x) for x in (mine, theirs))
    assert a.dtype == b.dtype, f"{what}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{what}: {a.shape} against {b.shape}"
    finite = np.isfinite(b)
    assert np.array_equal(np.isfinite(a), finite), f"{what}: not finite in other places"
    assert np.array_equal(a[~finite], b[~finite], equal_nan=True), f"{what}: NaN and infinities differ"
    if finite.any():
        scale = float(np.abs(b[finite]).max()) + floor
        worst = float(np.abs(a[finite] - b[finite]).max())
        assert worst <= tolerance * scale, f"{what}: {worst:.3g} apart, {tolerance * scale:.3g} allowed"
