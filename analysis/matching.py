"""One-to-one matching of student nodes with teacher nodes, where no student node is the partner of two.

The best match (`tsdyn.analysis.specialization`) is a maximum, and several teacher nodes may have the same one.  In a
matching they may not, and with n ≠ m nodes the wider layer has nodes without a partner.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy.optimize import linear_sum_assignment
from tsdyn.analysis.lift import lift
from tsdyn.analysis.specialization import correlation_of

from tsdyn.networks.node_pairs import Array
from tsdyn.vocabulary import LUCK

SOURCE = "Kuhn 1955; scipy.optimize.linear_sum_assignment"


def assignment(score: Array) -> Array:
    """Partners in the matching with the largest total score, (..., teacher_node, node) -> (..., teacher_node).

    NaN for a teacher node without a score (padding, dead), and for those left over if there are fewer student nodes; a
    dead student node (NaN) is never a partner.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.matching import assignment
        >>> assignment(np.array([[0.9, 0.8], [0.7, 0.1]])).tolist()  # 0.8 + 0.7 is more than 0.9 + 0.1
        [1.0, 0.0]
    """
    flat = score.reshape(-1, *score.shape[-2:])
    found = np.full(flat.shape[:-1], np.nan)
    for matched, table in zip(found, flat, strict=True):
        there = ~np.isnan(table)
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        own = table[np.ix_(rows, columns)]
        # the cost of one missing score: more than any matching that avoids it
        own = np.where(np.isnan(own), -1 - 2 * max(own.shape, default=0) * np.nanmax(np.abs(own), initial=0), own)
        chosen, partner = linear_sum_assignment(own, maximize=True)
        matched[rows[chosen]] = columns[partner]
    return found.reshape(score.shape[:-1])


def matched_score(score: Array) -> Array:
    """Score of each teacher node with its partner, (..., teacher_node, node) -> (..., teacher_node); or NaN.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.matching import matched_score
        >>> matched_score(np.array([[0.9, 0.8], [0.7, 0.1]])).tolist()
        [0.8, 0.7]
    """
    partner = assignment(score)
    index = np.where(np.isnan(partner), 0, partner).astype(int)[..., None]
    return np.where(np.isnan(partner), np.nan, np.take_along_axis(score, index, -1)[..., 0])


def best_teacher_order(score: Array) -> Array:
    """Student nodes sorted by their best teacher node, (..., teacher_node, node) -> (..., node).

    Among those with the same best teacher node, the better score comes first.  Nodes without a score (dead, padding)
    come last, in their original order.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.matching import best_teacher_order
        >>> best_teacher_order(np.array([[0.1, 0.9], [0.8, 0.2]])).tolist()  # first the node of teacher node 0
        [1.0, 0.0]
    """
    filled = np.where(np.isnan(score), -np.inf, score)
    best, teacher = filled.max(-2), filled.argmax(-2)
    teacher = np.where(np.isneginf(best), score.shape[-2], teacher)
    order: Array = np.lexsort((-best, teacher), axis=-1).astype(float)
    return order


def partner(archive: xr.Dataset) -> xr.DataArray:
    """Partner of each teacher node in the matching with the largest total correlation; (..., teacher_node).

    NaN for teacher nodes without a partner, when there are more teacher than student nodes.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks a node dimension.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.matching import partner
        >>> partner(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'teacher_node')
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
    """Order of the student nodes in which a heat map of correlations looks like a staircase; (..., node).

    Position p holds the index of the p-th node: first the nodes whose best teacher node is the first one, by descending
    correlation, and so on.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks a node dimension.  Source: Tian et al. (2019),
            Figure 10.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.matching import node_order
        >>> node_order(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'node')
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
    """Correlation of each teacher node with its partner in the one-to-one matching; (..., teacher_node).

    On average at most `tsdyn.analysis.specialization.specialization`, and equal where no student node is the best match
    of two teacher nodes.

    Raises:
        ValueError: as `partner`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.matching import matched_correlation
        >>> bool(matched_correlation(ds).max() <= 1)
        True
    """
    return lift(
        matched_score,
        correlation_of(archive, "matched_correlation"),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="matched_correlation",
        attrs={"units": "1", "long_name": "correlation with the matched student node", "source": SOURCE},
    )
