"""BatchNorm's biases: how many are negative, and how they are distributed.

A node whose BatchNorm stands before the activation and has a negative bias is active on less than half of the samples,
so nodes overlap less: what Luck Matters assumes (Assumption 3) and finds in pretrained networks.

Source: Tian et al. (2019), Figures 6 and 16.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from tsdyn.analysis.lift import lift, recorded

from tsdyn.networks.node_pairs import Array

SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 6 and 16"


def negative_share(shift: Array) -> Array:
    """Share of entries below 0 among those that are not NaN, (..., node) -> (...); NaN where all are.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.batch_norm import negative_share
        >>> float(negative_share(np.array([-1.0, 2.0, -3.0, np.nan, 0.0])))
        0.5
    """
    count = (~np.isnan(shift)).sum(-1)
    return np.where(count > 0, (shift < 0).sum(-1) / np.maximum(count, 1), np.nan)


def bin_edges(shift: Array, half: int) -> Array:
    """Bin edges, (..., node) -> (..., edge): 2 · half + 1 equidistant ones from −max |shift| to max |shift|.

    0 is an edge, so that no bin holds both signs.  From −1 to 1 where every entry is 0 or NaN.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.batch_norm import bin_edges
        >>> bin_edges(np.array([-1.0, 2.0]), 2).tolist()
        [-2.0, -1.0, 0.0, 1.0, 2.0]
    """
    largest = np.fmax.reduce(np.abs(shift), axis=-1, initial=0.0)
    return np.where(largest > 0, largest, 1.0)[..., None] * (np.arange(-half, half + 1) / half)


def bin_counts(shift: Array, half: int) -> Array:
    """Number of entries in each of the 2 · half bins between `bin_edges`, (..., node) -> (..., bin), without NaN.

    A bin includes its lower edge, so that 0 is not negative; the last bin includes its upper edge too.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.batch_norm import bin_counts
        >>> bin_counts(np.array([-1.5, 2.0, 1.5]), 2).tolist()
        [1.0, 0.0, 0.0, 2.0]
    """
    edges = bin_edges(shift, half)
    return np.array(
        [np.histogram(row[~np.isnan(row)], own)[0] for row, own in zip(_rows(shift), _rows(edges), strict=True)], float
    ).reshape(*shift.shape[:-1], 2 * half)


def _rows(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def negative_shift_share(archive: xr.Dataset) -> xr.DataArray:
    """Share of nodes whose BatchNorm bias is negative; (...).  0 does not count as negative; NaN without BatchNorm.

    Raises:
        ValueError: if the archive has no norm_shift or the slice lacks ``node``.
    """
    return lift(
        negative_share,
        recorded(archive, "norm_shift", "negative_shift_share"),
        reads=("node",),
        name="negative_shift_share",
        attrs={"units": "1", "long_name": "share of negative BatchNorm biases", "source": SOURCE},
    )


def shift_histogram(archive: xr.Dataset, *, bins: int = 40) -> xr.Dataset:
    """``shift_count`` (..., bin) of nodes whose BatchNorm bias lies in each bin, between ``shift_edge`` (..., edge).

    Each entry of the other dimensions has its own bins, symmetric about 0, which is an edge; a bin includes its lower
    edge.

    Args:
        archive: Run, sweep or slice.
        bins: Even, at least 2.

    Raises:
        ValueError: as `negative_shift_share`, or if `bins` is odd or less than 2.
    """
    if bins < 2 or bins % 2:
        raise ValueError(f"shift_histogram: bins = {bins}; an even number, at least 2, so that 0 is an edge")
    shift, half = recorded(archive, "norm_shift", "shift_histogram"), bins // 2
    counts = lift(
        bin_counts, shift, reads=("node",), gives=("bin",), labels={"bin": range(bins)}, half=half,
        attrs={"units": "1", "long_name": "number of nodes", "source": SOURCE},
    )  # fmt: skip
    edges = lift(
        bin_edges, shift, reads=("node",), gives=("edge",), labels={"edge": range(bins + 1)}, half=half,
        attrs={"units": "1", "long_name": "BatchNorm bias", "source": SOURCE},
    )  # fmt: skip
    return xr.Dataset({"shift_count": counts, "shift_edge": edges})
