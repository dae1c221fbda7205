"""One comparison of arrays for tests whose numbers may diverge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def assert_same(found: Any, expected: Any, tolerance: float, *, scale: float | None = None, what: str = "") -> None:
    """Assert equal shape, dtype and numbers: NaN and infinities in the same places, others within tolerance × scale.

    Args:
        found, expected: Arrays or tensors, or mappings of these with the same keys.
        tolerance: Relative to `scale`.
        scale: One plus the largest finite number expected, unless given.
        what: Name in the failure's message.
    """
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), (what, list(found), list(expected))
        for name in expected:
            assert_same(found[name], expected[name], tolerance, scale=scale, what=f"{what}{name}")
        return
    a, b = (np.asarray(x.detach().cpu() if hasattr(x, "detach") else x) for x in (found, expected))
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    if b.dtype.kind not in "fc":
        np.testing.assert_array_equal(a, b, err_msg=what)
        return
    finite = np.isfinite(b)
    np.testing.assert_array_equal(np.where(finite, 0, b), np.where(np.isfinite(a), 0, a), err_msg=what)
    if finite.any():
        room = tolerance * (1 + float(np.abs(b[finite]).max()) if scale is None else scale)
        worst = float(np.abs(a[finite] - b[finite]).max())
        assert worst <= room, f"{what}: off by {worst:g}, {room:g} allowed"
