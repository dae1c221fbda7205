"""Summaries over seeds, or over any other dimension: moments, quantiles, bootstrap and binomial intervals.

Members that died and points that are missing are NaN; they count neither way, and ``count`` says how many did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.special import ndtri
from tsdyn.analysis.lift import lift

#: Coordinate of the two ends of an interval.
BOUND = ("low", "high")


def _over_present(statistic: Callable[[NDArray], NDArray], values: NDArray, *ends: int) -> NDArray:
    """`statistic` along the last axis, without its NaN entries; NaN where none is left.

    Args:
        statistic: (row, entry) -> (row, *ends).
        values: (..., entry).
        ends: Axes that the statistic adds.
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
    return found.reshape(*values.shape[:-1], *ends)


def present(values: NDArray) -> NDArray:
    """(..., seed) -> (...): how many are not NaN."""
    return np.asarray((~np.isnan(values)).sum(-1), float)


def mean(values: NDArray) -> NDArray:
    """(..., seed) -> (...): mean of what is not NaN."""
    return _over_present(lambda rows: rows.mean(-1), values)


def standard_deviation(values: NDArray) -> NDArray:
    """(..., seed) -> (...): sample standard deviation (divisor n − 1) of what is not NaN; NaN for fewer than two."""
    return _over_present(
        lambda rows: rows.std(-1, ddof=1) if rows.shape[-1] > 1 else np.full(len(rows), np.nan), values
    )


def quantiles(values: NDArray, probabilities: Sequence[float]) -> NDArray:
    """(..., seed) -> (..., quantile): linear interpolation between order statistics of what is not NaN."""
    return _over_present(lambda rows: np.quantile(rows, probabilities, axis=-1).T, values, len(probabilities))


def bootstrap_interval(values: NDArray, statistic: str, confidence: float, resamples: int, random_seed: int) -> NDArray:
    """(..., seed) -> (..., bound): percentile bootstrap interval of the mean or median of what is not NaN.

    Every row is resampled by the same draws, those of ``default_rng(random_seed)``, so that no chunking changes it.
    """
    middle = np.mean if statistic == "mean" else np.median
    tail = (1 - confidence) / 2

    def interval(rows: NDArray) -> NDArray:
        entries = rows.shape[-1]
        draws = np.random.default_rng(random_seed).integers(0, entries, (resamples, entries))
        resampled = np.stack([np.asarray(middle(rows[:, draw], axis=-1)) for draw in draws], axis=-1)
        return np.asarray(np.quantile(resampled, [tail, 1 - tail], axis=-1).T)

    return _over_present(interval, values, 2)


def wilson_interval(values: NDArray, confidence: float) -> NDArray:
    """(..., seed) -> (..., bound): interval of the share of ones among the zeros and ones that are not NaN.

    Wilson's score interval: all p with |p̂ − p| ≤ z √(p (1 − p) / n); unlike p̂ ± z √(p̂ (1 − p̂) / n) it stays within
    [0, 1] and has a width at 0 and 1.  Source: Wilson 1927 (doi:10.1080/01621459.1927.10502953).
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
        over: Dimension that goes.
        probabilities: Labels of the new dimension ``quantile``.

    Raises:
        ValueError: if `array` lacks `over`, or a probability is outside [0, 1].
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


def bootstrap(
    array: xr.DataArray,
    *,
    over: str = "seed",
    statistic: str = "mean",
    confidence: float = 0.95,
    resamples: int = 1000,
    random_seed: int = 0,
) -> xr.DataArray:
    """Percentile bootstrap interval over seeds, (..., bound) with bound ``low`` and ``high``; lazy if `array` is.

    Raises:
        ValueError: if `array` lacks `over`, the statistic is none, or `confidence` is outside (0, 1).
    """
    _check(array, over, "bootstrap", confidence=confidence)
    if statistic not in ("mean", "median"):
        raise ValueError(f"bootstrap: statistic={statistic!r}; it is 'mean' or 'median'")
    return lift(
        bootstrap_interval,
        array,
        reads=(over,),
        gives=("bound",),
        labels={"bound": list(BOUND)},
        name=f"{array.name}_interval",
        attrs=_attrs(array, f"{confidence:.0%} bootstrap interval of the {statistic}"),
        statistic=statistic,
        confidence=confidence,
        resamples=resamples,
        random_seed=random_seed,
    )


def share_interval(successes: xr.DataArray, *, over: str = "seed", confidence: float = 0.95) -> xr.DataArray:
    """Wilson interval of the share of ones over seeds, (..., bound); `successes` holds 0, 1 and NaN for no trial.

    Raises:
        ValueError: if `successes` lacks `over` or `confidence` is outside (0, 1).
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
