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

from tsdyn.vocabulary import LUCK

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


def best_teacher_order(score: NDArray) -> NDArray:
    """(..., teacher_node, node) -> (..., node): student nodes, those of the first teacher node first.

    A student node belongs to its best teacher node; among equals the better comes first.  Nodes without a score (dead,
    padding) come last, as they were.
    """
    filled = np.where(np.isnan(score), -np.inf, score)
    best, teacher = filled.max(-2), filled.argmax(-2)
    teacher = np.where(np.isneginf(best), score.shape[-2], teacher)
    order: NDArray = np.lexsort((-best, teacher), axis=-1).astype(float)
    return order


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


def node_order(archive: xr.Dataset) -> xr.DataArray:
    """Student nodes in the order that makes a heat map of correlations a staircase; (..., node).

    At position p stands the p-th node: those whose best teacher node is the first, the best of them first, and so on.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks a node dimension.  Source: Tian et al. (2019),
            Figure 10.
    """
    return lift(
        best_teacher_order,
        correlation_of(archive, "node_order"),
        reads=("teacher_node", "node"),
        gives=("node",),
        name="node_order",
        attrs={"units": "1", "long_name": "student nodes by best teacher node", "source": f"{LUCK}, Figure 10"},
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
