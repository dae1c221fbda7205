"""Winners: the student node that correlates best with each teacher node at the end, and its rank at the start.

The lottery-ticket hypothesis in Tian et al. (2019): the winning node was correlated best from the start, by luck.
The rank of winners over training is `tsdyn.analysis.specialization.mean_rank`.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from tsdyn.analysis import specialization
from tsdyn.analysis.lift import lift

from tsdyn.networks.node_pairs import Array, best_node, is_winner

SOURCE = "Tian et al. 2019 (arXiv:1905.13405), section 6"


def settling(winner: Array) -> Array:
    """Index of the first epoch from which on the winner is the last epoch's, (..., epoch) -> (...); or NaN.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.lottery import settling
        >>> float(settling(np.array([3.0, 1.0, 1.0])))  # node 1 wins from the second epoch on
        1.0
    """
    same = winner == winner[..., -1:]
    lasting = np.flip(np.logical_and.accumulate(np.flip(same, -1), axis=-1), -1)
    return np.where(np.isnan(winner[..., -1]), np.nan, lasting.argmax(-1))


def winner(archive: xr.Dataset) -> xr.DataArray:
    """Index of the student node with the best correlation with each teacher node; (..., teacher_node), or NaN.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks ``node``.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.lottery import winner
        >>> winner(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'teacher_node')
    """
    return lift(
        best_node,
        specialization.correlation_of(archive, "winner"),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="winner",
        attrs={"units": "1", "long_name": "student node of best correlation", "source": SOURCE},
    )


def winner_rank(archive: xr.Dataset) -> xr.DataArray:
    """Rank at every epoch of the last epoch's winner, in [0, 1), 0 the best; (..., epoch, teacher_node), or NaN.

    ``winner_rank(ds).isel(epoch=0)`` is the winners' rank before training: 0 where luck decided.

    Raises:
        ValueError: as `winner`, or without ``epoch``.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.lottery import winner_rank
        >>> float(winner_rank(ds).isel(epoch=-1).max())
        0.0
    """
    return lift(
        specialization.winner_rank,
        specialization.correlation_of(archive, "winner_rank"),
        reads=("epoch", "teacher_node", "node"),
        gives=("epoch", "teacher_node"),
        name="winner_rank",
        attrs={"units": "1", "long_name": "rank of the final winner", "source": SOURCE},
    )


def settled_epoch(archive: xr.Dataset) -> xr.DataArray:
    """First recorded epoch from which on each teacher node's winner is the last epoch's; (..., teacher_node), or NaN.

    Raises:
        ValueError: as `winner`, or without ``epoch``.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.lottery import settled_epoch
        >>> settled_epoch(ds).dims
        ('overrealization', 'seed', 'teacher_node')
    """
    if "epoch" not in archive.dims:
        raise ValueError("settled_epoch: the slice has no dimension epoch; select epochs with a list or slice")
    position = lift(settling, winner(archive), reads=("epoch",))
    epochs = archive["epoch"].values.astype(float)
    found: xr.DataArray = xr.apply_ufunc(
        lambda at: np.where(np.isnan(at), np.nan, epochs[np.where(np.isnan(at), 0, at).astype(int)]),
        position,
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return found.rename("settled_epoch").assign_attrs(
        units="epoch", long_name="first epoch of the final winner", source=SOURCE
    )


def rewind_mask(archive: xr.Dataset, *, threshold: float = -1.0) -> xr.DataArray:
    """Mask of the lottery ticket: 1 for nodes that win some teacher node at the last epoch, else 0; (..., node).

    ``ds.weight.sel(epoch=0) * rewind_mask(ds)`` is the initial network with all other nodes pruned; the same mask, with
    its dimension renamed to ``input_node``, prunes the layer above.  NaN for padding, dead members and
    nodes without a correlation, which are active on no evaluation sample or on all alike.

    Args:
        archive: A slice with ``epoch``, of which the last is used, or at a single epoch.
        threshold: A winner counts only if its correlation is above this; −1 counts all.

    Raises:
        ValueError: as `winner`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.lottery import rewind_mask
        >>> sorted(set(rewind_mask(ds).sel(overrealization=4).values.ravel().tolist()))
        [0.0, 1.0]
    """
    correlation = specialization.correlation_of(archive, "rewind_mask")
    return lift(
        is_winner,
        correlation.isel(epoch=-1) if "epoch" in correlation.dims else correlation,
        reads=("teacher_node", "node"),
        gives=("node",),
        name="rewind_mask",
        attrs={"units": "1", "long_name": "final winner of a teacher node", "source": SOURCE},
        threshold=threshold,
    )
