"""Whether two results are equal to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Relative tolerance for comparing two results: 1e-12 in float64, the same number of roundings in other types.

    That is 4,504 times eps; in 16-bit types it exceeds 1, so that no comparison is possible (`comparable`).
    """
    return 1e-12 * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def comparable(tensors: Iterable[Tensor]) -> bool:
    """Whether comparing to `tolerance` can tell right from wrong; it cannot in 16-bit types."""
    return all(tolerance(t.dtype) < 1e-2 for t in tensors)


def agree(found: Tensor, right: Tensor, scale: float | Tensor = 0.0) -> bool:
    """Whether two results are equal to rounding, relative to the largest entry of `right` or, if larger, to `scale`.

    NaN agrees with NaN, and an infinity with an equal one.
    """
    if found.shape != right.shape:
        return False
    if not found.numel():
        return True
    found, right = found.detach(), right.detach()
    return _within(found, right, float(right.abs().max()), float(scale))


def _within(found: Tensor, right: Tensor, largest: float, scale: float) -> bool:
    """As `agree`, with the largest entry of `right`, which is not finite if one of them is not."""
    size = max(largest, scale)
    if (
        math.isfinite(largest)
        and math.isfinite(size)
        and float((found - right).abs().max()) <= tolerance(right.dtype) * size
    ):
        return True
    finite = max(float(right.abs().nan_to_num(0, 0, 0).max()), scale if math.isfinite(scale) else 0.0)
    return torch.allclose(found, right, rtol=0, atol=tolerance(right.dtype) * finite, equal_nan=True)


def agree_by_name(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether gradients by name agree, with a scale of at least a thousandth of the largest entry of all.

    Without it the rounding left of an exact zero would be compared with its own size.
    """
    sizes = {name: float(g.abs().max()) for name, g in right.items() if g.numel()}
    scale = max((size for size in sizes.values() if math.isfinite(size)), default=0.0) / 1000
    return all(
        found[name].shape == g.shape
        and (name not in sizes or _within(found[name].detach(), g.detach(), sizes[name], scale))
        for name, g in right.items()
    )


#: Two results that should be equal, and a scale as for `agree`.
Compared: TypeAlias = tuple[Tensor, Tensor, float | Tensor]
#: Factors by which a point is moved towards 0 to see how large a function's second derivative is elsewhere.
TOWARDS_ZERO = (1 / 4, 1 / 16, 1 / 64)


def agree_up_to_cancellation(
    found: Tensor, right: Tensor, scale: float | Tensor, elsewhere: Callable[[], Iterable[Compared]]
) -> bool:
    """Whether two results are equal to rounding, or to that of terms which cancel in them.

    Terms that cancel leave their own rounding behind, not that of what is left: of a softmax p that is nearly one-hot,
    p_i v_i − p_i (p·v) is far smaller than either.  So results that differ at this point's scale are compared at the
    largest of other points of the same function, where terms need not cancel, if they agree there at that scale.

    Args:
        found, right, scale: As for `agree`.
        elsewhere: Gives the same three at other points, where they exist; called only if it is needed.
    """
    if agree(found, right, scale):
        return True
    sizes = [(max(float(b.abs().max()), float(own)), a, b) for a, b, own in elsewhere()]
    largest = max((each for each in sizes if math.isfinite(each[0])), key=lambda each: each[0], default=None)
    if largest is None:
        return False
    size, one, other = largest
    return agree(one, other, size) and agree(found, right, size)


def asymmetry(
    u: Tensor, hu: Tensor, w: Tensor, hw: Tensor, elsewhere: Callable[[], Iterable[tuple[Tensor, Tensor]]]
) -> tuple[float, float] | None:
    """(u·Hw, w·Hu) of products with a Hessian H if they are not those of a symmetric matrix, else None.

    As by `agree_up_to_cancellation`, products that differ at this point's scale are compared at the largest of other
    points; but they need not agree there: where terms cancel at all of them, a function is not refused.

    Args:
        u, w: Two vectors, of one shape.
        hu, hw: H u and H w.
        elsewhere: Gives H u and H w at other points; called only if it is needed.
    """

    def scale(hu: Tensor, hw: Tensor) -> float:
        return max(float(hu.norm() * w.norm()), float(hw.norm() * u.norm()))

    there, back = (u * hw).sum(), (w * hu).sum()
    if agree(there, back, scale(hu, hw)):
        return None
    others = [scale(*products) for products in elsewhere()]
    if agree(there, back, max((other for other in others if math.isfinite(other)), default=0.0)):
        return None
    return float(there), float(back)
