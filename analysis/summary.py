"""Summaries over seeds, or over any other dimension: moments, quantiles and intervals of the stated coverage.

Dead members and missing points are NaN; they are left out, and ``count`` gives the number of the others.
Intervals: of a mean by Student's t, of a median by order statistics, of a share by Wilson's score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, assert_never

import numpy as np
import xarray as xr
from scipy.special import bdtr, ndtri, stdtrit
from tsdyn.analysis.lift import lift

from tsdyn.networks.node_pairs import Array

#: Coordinate of the two ends of an interval.
BOUND = ("low", "high")
#: Least number of values for an interval of the median: the extremes of five cover it with probability 15/16 only.
FEWEST_OF_A_MEDIAN = 6


def _over_present(statistic: Callable[[Array], Array], values: Array, *ends: int) -> Array:
    """`statistic` along the last axis, without its NaN entries; NaN where none is left.

    Args:
        statistic: (row, entry) -> (row, *ends).
        values: (..., entry).
        ends: Lengths of the axes that the statistic adds.
    """
    flat = values.reshape(-1, values.shape[-1])
    found = np.full((len(flat), *ends), np.nan)
    there = ~np.isnan(flat)
    whole = there.all(-1)
    if whole.any():
        found[whole] = statistic(flat[whole])
    gappy = np.flatnonzero(there.any(-1) & ~whole)
    patterns, member = np.unique(there[gappy], axis=0, return_inverse=True)
    for position, pattern in enumerate(patterns):
        rows = gappy[member.ravel() == position]
        found[rows] = statistic(flat[rows][:, pattern])
    return found.reshape((*values.shape[:-1], *ends))


def present(values: Array) -> Array:
    """Number of values that are not NaN, (..., seed) -> (...).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import present
        >>> float(present(np.array([1.0, np.nan, 3.0])))
        2.0
    """
    return np.asarray((~np.isnan(values)).sum(-1), float)


def mean(values: Array) -> Array:
    """Mean of the values that are not NaN, (..., seed) -> (...).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import mean
        >>> float(mean(np.array([1.0, np.nan, 3.0])))
        2.0
    """
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN
        return _over_present(lambda rows: rows.mean(-1), values)


def standard_deviation(values: Array) -> Array:
    """Sample standard deviation (divisor n − 1) without NaN, (..., seed) -> (...); NaN for fewer than two values.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import standard_deviation
        >>> round(float(standard_deviation(np.array([1.0, np.nan, 3.0]))), 6)
        1.414214
    """
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN
        return _over_present(
            lambda rows: rows.std(-1, ddof=1) if rows.shape[-1] > 1 else np.full(len(rows), np.nan), values
        )


def quantiles(values: Array, probabilities: Sequence[float]) -> Array:
    """Quantiles without NaN, by linear interpolation between order statistics; (..., seed) -> (..., quantile).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import quantiles
        >>> quantiles(np.array([1.0, 2.0, np.nan, 3.0]), (0.0, 0.5, 1.0)).tolist()
        [1.0, 2.0, 3.0]
    """
    return _over_present(lambda rows: _quantiles(rows, np.asarray(probabilities)), values, len(probabilities))


def _quantiles(rows: Array, probabilities: Array) -> Array:
    """Quantiles (row, entry) -> (row, quantile), as numpy's except in rows with ±∞, where numpy's may be NaN."""
    endless = np.isinf(rows).any(-1)
    found = np.empty((len(rows), len(probabilities)))
    found[~endless] = np.quantile(rows[~endless], probabilities, axis=-1).T
    ordered = np.sort(rows[endless], axis=-1)
    place = probabilities * (rows.shape[-1] - 1)
    below, above = (ordered[:, end(place).astype(int)] for end in (np.floor, np.ceil))
    share = place - np.floor(place)
    with np.errstate(invalid="ignore"):  # interpolation between −∞ and ∞ is undefined
        between = below * (1 - share) + above * share
    found[endless] = np.where(below == above, below, between)
    return found


def student_interval(values: Array, confidence: float) -> Array:
    """Student's t interval of the mean, without NaN; (..., seed) -> (..., bound); NaN for fewer than two values.

    x̄ ± t s/√n has exactly the stated coverage for normal values, from n = 2 on; a 95 % bootstrap of three covers 74 %.
    Source: Student 1908 (doi:10.1093/biomet/6.1.1).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import student_interval
        >>> [round(end, 3) for end in student_interval(np.array([1.0, 2.0, 3.0]), 0.95).tolist()]
        [-0.484, 4.484]
    """
    n, centre, spread = present(values), mean(values), standard_deviation(values)
    t = stdtrit(np.where(n > 1, n - 1, np.nan), (1 + confidence) / 2)
    with np.errstate(invalid="ignore"):  # infinite values have no interval
        half = t * spread / np.sqrt(np.maximum(n, 1))
        return np.stack([centre - half, centre + half], -1)


def _rank(n: Array, confidence: float) -> Array:
    """Largest k with P[x_(k) ≤ median ≤ x_(n+1−k)] = 1 − 2 P[Bin(n, ½) < k] ≥ `confidence`, or 0 for none."""
    k = np.zeros_like(n)
    for candidate in range(1, int(n.max(initial=0)) // 2 + 1):
        k = np.where((candidate <= n / 2) & (_level(n, np.full_like(n, candidate)) >= confidence), candidate, k)
    return np.where(n >= FEWEST_OF_A_MEDIAN, k, 0)


def _level(n: Array, k: Array) -> Array:
    return np.asarray(1 - 2 * bdtr(np.maximum(k - 1, 0), np.maximum(n, 1).astype(int), 0.5))


def median_interval(values: Array, confidence: float) -> Array:
    """Order statistics that enclose the median with at least `confidence`, without NaN; (..., seed) -> (..., bound).

    Valid for any distribution without ties.  NaN for fewer than `FEWEST_OF_A_MEDIAN` values, and if no two suffice.
    Source: Thompson 1936 (doi:10.1214/aoms/1177732502).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import median_interval
        >>> median_interval(np.arange(1.0, 11.0), 0.95).tolist()
        [2.0, 9.0]
    """
    k = _rank(present(values), confidence)
    ordered = np.sort(values, axis=-1)  # NaN last
    last = np.clip(present(values) - k, 0, values.shape[-1] - 1)
    ends = [np.take_along_axis(ordered, at.astype(int)[..., None], -1)[..., 0] for at in (np.maximum(k - 1, 0), last)]
    return np.where((k > 0)[..., None], np.stack(ends, -1), np.nan)


def median_level(values: Array, confidence: float) -> Array:
    """Confidence that `median_interval` attains, `confidence` or more; (..., seed) -> (...); NaN if there is none.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import median_level
        >>> round(float(median_level(np.arange(1.0, 11.0), 0.95)), 4)
        0.9785
    """
    n = present(values)
    k = _rank(n, confidence)
    return np.where(k > 0, _level(n, k), np.nan)


def wilson_interval(values: Array, confidence: float) -> Array:
    """Interval of the share of ones among zeros and ones, without NaN; (..., seed) -> (..., bound).

    Wilson's score interval: all p with |p̂ − p| ≤ z √(p (1 − p) / n); unlike p̂ ± z √(p̂ (1 − p̂) / n) it stays within
    [0, 1] and has a width at 0 and 1.  Source: Wilson 1927 (doi:10.1080/01621459.1927.10502953).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.summary import wilson_interval
        >>> [round(end, 3) for end in wilson_interval(np.array([1.0, 1.0, 0.0, 1.0]), 0.95).tolist()]
        [0.301, 0.954]
    """
    n, successes = present(values), np.where(np.isnan(values), 0.0, values).sum(-1)
    z2 = ndtri((1 + confidence) / 2) ** 2
    safe = np.maximum(n, 1)
    # n p̂ (1 − p̂) = k (n − k) / n, which is exactly 0 at both ends
    spread = np.sqrt(z2 * (successes * (n - successes) / safe + z2 / 4))
    centre = successes + z2 / 2
    ends = np.stack([centre - spread, centre + spread], -1) / (safe + z2)[..., None]
    return np.where((n > 0)[..., None], np.clip(ends, 0, 1), np.nan)


def _attrs(array: xr.DataArray, what: str) -> dict[str, str]:
    name = array.attrs.get("long_name", array.name)
    return {**array.attrs, "long_name": f"{what} of {name}"}


def _check(array: xr.DataArray, over: str, caller: str, **shares: float) -> None:
    if over not in array.dims:
        raise ValueError(
            f"{caller}: {array.name!r} has no dimension {over}, only {tuple(array.dims)}; "
            "select with a list or slice to keep a dimension"
        )
    for key, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{caller}: {key}={share!r}; it lies between 0 and 1")


def summarise(
    array: xr.DataArray, *, over: str = "seed", probabilities: Sequence[float] = (0.1, 0.5, 0.9)
) -> xr.Dataset:
    """``mean``, ``standard_deviation``, ``quantiles`` and ``count`` of `array` over seeds; lazy if `array` is.

    Args:
        array: Any variable or measure with the dimension `over`.
        over: Dimension to summarise.
        probabilities: Labels of the new dimension ``quantile``.

    Raises:
        ValueError: if `array` lacks `over`, or a probability is outside [0, 1].

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.summary import summarise
        >>> sorted(summarise(ds.loss_eval))
        ['count', 'mean', 'quantiles', 'standard_deviation']
    """
    _check(array, over, "summarise")
    if any(not 0 <= p <= 1 for p in probabilities):
        raise ValueError(f"summarise: probabilities={tuple(probabilities)!r}; each lies in [0, 1]")
    return xr.Dataset(
        {
            "mean": lift(mean, array, reads=(over,), attrs=_attrs(array, "mean")),
            "standard_deviation": lift(
                standard_deviation, array, reads=(over,), attrs=_attrs(array, "standard deviation")
            ),
            "quantiles": lift(
                quantiles,
                array,
                reads=(over,),
                gives=("quantile",),
                labels={"quantile": list(probabilities)},
                attrs=_attrs(array, "quantile"),
                probabilities=tuple(probabilities),
            ),
            "count": lift(
                present, array, reads=(over,), attrs={"units": "1", "long_name": f"values of {array.name} over {over}"}
            ),
        }
    )


Statistic: TypeAlias = Literal["mean", "median"]


def interval(
    array: xr.DataArray, *, over: str = "seed", statistic: Statistic = "mean", confidence: float = 0.95
) -> xr.DataArray:
    """Interval of the mean or median over seeds, (..., bound) with bounds ``low`` and ``high``; lazy as `array`.

    ``mean``: Student's t, exact for normal values, NaN for fewer than two.  ``median``: order statistics, for any
    distribution; only some levels are attainable, and the coordinate ``level`` gives the one attained, at least
    `confidence` (31/32 for six values at 95 %); NaN for fewer than six.  For shares use `share_interval`.

    Raises:
        ValueError: if `array` lacks `over`, the statistic is neither, or `confidence` is outside (0, 1).

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.summary import interval
        >>> interval(ds.loss_eval, confidence=0.9).dims
        ('overrealization', 'epoch', 'bound')
    """
    _check(array, over, "interval", confidence=confidence)
    if statistic not in ("mean", "median"):
        raise ValueError(f"interval: statistic={statistic!r}; it is 'mean' or 'median'")
    match statistic:
        case "mean":
            formula = student_interval
        case "median":
            formula = median_interval
        case other:
            assert_never(other)
    found = lift(
        formula,
        array,
        reads=(over,),
        gives=("bound",),
        labels={"bound": list(BOUND)},
        name=f"{array.name}_interval",
        attrs=_attrs(array, f"{confidence:.0%} interval of the {statistic}"),
        confidence=confidence,
    )
    if statistic == "mean":
        return found
    attrs = {"units": "1", "long_name": "probability that the interval holds the median"}
    level = lift(median_level, array, reads=(over,), attrs=attrs, confidence=confidence)
    return found.assign_coords(level=level.drop_vars(set(level.coords) - set(level.dims)))


def share_interval(successes: xr.DataArray, *, over: str = "seed", confidence: float = 0.95) -> xr.DataArray:
    """Wilson interval of the share of ones over seeds, (..., bound); `successes` holds 0, 1 and NaN for no trial.

    Raises:
        ValueError: if `successes` lacks `over` or `confidence` is outside (0, 1).

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.summary import share_interval
        >>> solved = (ds.loss_eval.isel(epoch=-1) < 0.01).astype(float)
        >>> share_interval(solved).dims
        ('overrealization', 'bound')
    """
    _check(successes, over, "share_interval", confidence=confidence)
    return lift(
        wilson_interval,
        successes,
        reads=(over,),
        gives=("bound",),
        labels={"bound": list(BOUND)},
        name=f"{successes.name}_interval",
        attrs=_attrs(successes, f"{confidence:.0%} Wilson interval"),
        confidence=confidence,
    )
