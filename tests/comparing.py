"""One comparison of arrays for tests whose numbers may diverge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


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


def assert_same_but_for_rounding(
    found: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float, moved: Callable[[], Mapping[str, Any]]
) -> None:
    """`assert_same`, with more room where roundings grow: 100 times what one of each number that it began from makes.

    Args:
        found, expected, tolerance: As in `assert_same`.
        moved: Gives `expected` from a start whose last digits are others (`last_digits`); called only if it is needed.
    """
    try:
        assert_same(found, expected, tolerance)
    except AssertionError:
        again = moved()
        for name, right in expected.items():
            grown = float((again[name] - right).abs().max())
            assert_same(found[name], right, tolerance + 100 * grown, what=name)


def last_digits(tensors: Mapping[str, Any]) -> None:
    """Change each number, in place, by about one rounding."""
    draw = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        tensor *= 1 + torch.finfo(tensor.dtype).eps * torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
