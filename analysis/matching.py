"""One-to-one matching of nodes: which student node stands for which teacher node if none may stand for two.

The best match (`tsdyn.analysis.specialization`) is a maximum, which several teacher nodes may share; a matching is
not, and with n ≠ m nodes the wider layer keeps nodes that stand for nothing.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from tsdyn.analysis.lift import lift
from tsdyn.analysis.specialization import correlation_of

SOURCE = "Kuhn 1955; scipy.optimize.linear_sum_assignment"


def assignment(score: NDArray) -> NDArray:
    """(..., teacher_node, node) -> (..., teacher_node): partners of the matching with the largest total score.

    NaN for a teacher node without a score (padding, dead), and for those left over where students are fewer; a dead
    student node (NaN) is nobody's partner.
    """
    flat = score.reshape(-1, *score.shape[-2:])
    found = np.full(flat.shape[:-1], np.nan)
    for matched, table in zip(found, flat, strict=True):
        there = ~np.isnan(table)
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        own = table[np.ix_(rows, columns)]
        # a single missing score: worse than any whole matching without it
        own = np.where(np.isnan(own), -1 - 2 * max(own.shape, default=0) * np.nanmax(np.abs(own), initial=0), own)
        chosen, partner = linear_sum_assignment(own, maximize=True)
        matched[rows[chosen]] = columns[partner]
    return found.reshape(score.shape[:-1])


def matched_score(score: NDArray) -> NDArray:
    """(..., teacher_node, node) -> (..., teacher_node): score of each teacher node with its partner; NaN without."""
    partner = assignment(score)
    index = np.where(np.isnan(partner), 0, partner).astype(int)[..., None]
    return np.where(np.isnan(partner), np.nan, np.take_along_axis(score, index, -1)[..., 0])


def partner(archive: xr.Dataset) -> xr.DataArray:
    """Student node of each teacher node in the matching with the largest total correlation; (..., teacher_node).

    NaN where a teacher node is left over: more teacher than student nodes.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks a node dimension.
    """
    return lift(
        assignment,
        correlation_of(archive, "partner"),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="partner",
        attrs={"units": "1", "long_name": "matched student node", "source": SOURCE},
    )


def matched_correlation(archive: xr.Dataset) -> xr.DataArray:
    """Correlation of each teacher node with its own student node, no two sharing one; (..., teacher_node).

    At most `tsdyn.analysis.specialization.specialization` in the mean; equal where no student node is shared.

    Raises:
        ValueError: as `partner`.
    """
    return lift(
        matched_score,
        correlation_of(archive, "matched_correlation"),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="matched_correlation",
        attrs={"units": "1", "long_name": "correlation with the matched student node", "source": SOURCE},
    )
