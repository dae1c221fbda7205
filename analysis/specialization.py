"""Student specialization: which teacher nodes a student node correlates with.

Every measure exists twice: as a formula on arrays (..., teacher_node, node), and as a labelled version for any slice of
a run or a sweep that keeps both node dimensions, which is lazy if the archive is.

Source: Tian (2020), section 6.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from tsdyn.analysis.identity import begun, per_point, points
from tsdyn.analysis.lift import lift
from tsdyn.analysis.lift import recorded as variable_of
from tsdyn.analysis.summary import quantiles, share_interval

from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.sweep_axes import swept_keys
from tsdyn.networks.node_pairs import Array, best_match, best_node

#: A teacher node is recovered above this correlation (Tian 2020, Figure 7).
THRESHOLD = 0.95
SOURCE = "Tian 2020 (PMLR 119:9470), section 6"


def _nanmax(values: Array, axis: int) -> Array:
    """Maximum without NaN entries; NaN where all entries are, without the warning of np.nanmax."""
    largest: Array = np.fmax.reduce(values, axis=axis)
    return largest


def best_teacher(correlation: Array) -> Array:
    """Largest (signed) correlation of student nodes with any teacher node; (..., teacher_node, node) -> (..., node).

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.specialization import best_teacher
        >>> rho = np.array([[0.9, 0.1, np.nan], [0.2, 0.4, 0.3]])  # (teacher_node, node); NaN: a dead node
        >>> best_teacher(rho).tolist()
        [0.9, 0.4, 0.3]
    """
    return _nanmax(correlation, axis=-2)


def mean_best_match(correlation: Array) -> Array:
    """Mean best correlation ρ̄, (..., teacher_node, node) -> (...), leaving out teacher nodes without a correlation.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.specialization import mean_best_match
        >>> float(mean_best_match(np.array([[0.9, 0.1], [0.2, 0.5]])))
        0.7
    """
    best = best_match(correlation)
    real = ~np.isnan(best)
    count = real.sum(-1)
    return np.where(count > 0, np.where(real, best, 0.0).sum(-1) / np.maximum(count, 1), np.nan)


def match_counts(correlation: Array, threshold: float) -> Array:
    """Number of teacher nodes with best match above `threshold`, (..., teacher_node, node) -> (...); NaN if all are.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.specialization import match_counts
        >>> int(match_counts(np.array([[0.99, 0.1], [0.2, 0.5]]), threshold=0.95))
        1
    """
    best = best_match(correlation)
    return np.where(np.isnan(best).all(-1), np.nan, (best > threshold).sum(-1))


def winner_rank(correlation: Array) -> Array:
    """Rank at every epoch of the last epoch's best student node.

    (..., epoch, teacher_node, node) -> (..., epoch, teacher_node).  Counted from 0, the best, and divided by the number
    of nodes with a correlation at that epoch; NaN if the winner has none there, or if the last epoch has no winner.

    Examples:
        >>> import numpy as np
        >>> from tsdyn.analysis.specialization import winner_rank
        >>> rho = np.array([[[0.1, 0.3]], [[0.9, 0.2]]])  # node 0 wins, and began as second of 2
        >>> winner_rank(rho).ravel().tolist()
        [0.5, 0.0]
    """
    winner = best_node(correlation[..., -1:, :, :])
    place = np.where(np.isnan(winner), 0, winner).astype(int)[..., None]
    won = np.take_along_axis(correlation, np.broadcast_to(place, (*correlation.shape[:-1], 1)), -1)
    nodes = (~np.isnan(correlation)).sum(-1)
    rank = (correlation > won).sum(-1) / np.maximum(nodes, 1)
    return np.where(np.isnan(won[..., 0]) | np.isnan(winner), np.nan, rank)


def median(values: Array) -> Array:
    """Median without NaN entries, (..., n) -> (...); NaN where all are."""
    return quantiles(values, (0.5,))[..., 0]


def correlation_of(archive: xr.Dataset, caller: str) -> xr.DataArray:
    """Recorded correlation of an archive, (..., teacher_node, node); raises as `lift.recorded`, naming `caller`."""
    return variable_of(archive, "correlation", caller)


def silent(archive: xr.Dataset) -> xr.DataArray:
    """Whether a living member has no correlation at an epoch because no node of its layer varies; (...).

    Such a student has recovered nothing, which is a result.  A value that is NaN for another reason (dead members,
    missing epochs or points, padding, the output layer) is missing, and the result False; so it is if the Dataset
    cannot tell.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import silent
        >>> bool(silent(ds).any())  # no student here has fallen silent as a whole
        False
    """
    correlation = correlation_of(archive, "silent")
    none = correlation.isnull().all(["teacher_node", "node"])
    if not {"death_epoch", "epoch", "layer"} <= set(archive.coords) or "experiment" not in archive.attrs:
        return xr.zeros_like(none)
    death, epoch = archive["death_epoch"], archive["epoch"]
    there = ((death < 0) | (epoch < death)) & begun(archive)
    experiment = experiment_of(archive)
    keys = {key.split(".")[0] for key in swept_keys(experiment.sweep)}
    if "coverage" in archive.coords and (keys & {"training", "record", "fork"} or float(archive["coverage"].min()) < 1):
        there = there & _recorded(archive)
    depth = per_point(archive, lambda point: point.layout.depth) if "teacher" in keys else experiment.layout.depth
    found: xr.DataArray = (none & there & (archive["layer"] < depth)).transpose(*none.dims)
    return found.drop_vars(set(found.coords) - set(none.coords))


def _recorded(archive: xr.Dataset) -> xr.DataArray:
    """Whether each point has committed each epoch, that is, the first `coverage` epochs on its own schedule."""
    found = list(points(archive).values())
    dims = tuple(dict.fromkeys(dim for chosen, _ in found for dim in chosen))
    epochs = np.atleast_1d(archive["epoch"].values)
    there = np.zeros((*(archive.sizes[dim] for dim in dims), len(epochs)), bool)
    for chosen, experiment in found:
        schedule = experiment.schedule
        committed = schedule[: round(float(archive["coverage"].sel(chosen)) * len(schedule))]
        there[tuple(archive.get_index(dim).get_loc(chosen[dim]) for dim in dims)] = np.isin(epochs, committed)
    held = xr.DataArray(there, {**{dim: archive[dim].variable for dim in dims}, "epoch": epochs}, (*dims, "epoch"))
    return held if "epoch" in archive.dims else held.isel(epoch=0, drop=True)


def counted(values: xr.DataArray, archive: xr.Dataset) -> xr.DataArray:
    """`values` with 0 in place of NaN where the student is `silent`, for it has recovered no teacher node.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import counted, specialization
        >>> counted(specialization(ds), ds).dims
        ('overrealization', 'seed', 'epoch', 'teacher_node')
    """
    none = silent(archive)
    if "teacher_node" in values.dims and "teacher_width" in archive.coords:
        none = none & (archive["teacher_node"] < archive["teacher_width"])
    found: xr.DataArray = values.where(~none, 0.0).transpose(*values.dims)
    return found.drop_vars(set(found.coords) - set(values.coords)).assign_attrs(values.attrs).rename(values.name)


def specialization(archive: xr.Dataset) -> xr.DataArray:
    """Best correlation any student node reaches with each teacher node.

    A maximum, not a matching: several teacher nodes may share a student node.  Dimensionless, (..., teacher_node);
    NaN for padding and dead members.  Source: Tian (2020), Figure 8.

    Raises:
        ValueError: if the archive has no correlation or the slice lacks ``node``.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import specialization
        >>> specialization(ds).isel(epoch=-1).dims
        ('overrealization', 'seed', 'teacher_node')
    """
    return lift(
        best_match,
        correlation_of(archive, "specialization"),
        reads=("teacher_node", "node"),
        gives=("teacher_node",),
        name="specialization",
        attrs={"units": "1", "long_name": "best correlation with any student node", "source": SOURCE},
    )


def student_specialization(archive: xr.Dataset) -> xr.DataArray:
    """Best correlation of each student node with any teacher node, the abscissa of the L-shape; (..., node).

    Raises:
        ValueError: as `specialization`.  Source: Tian (2020), Figure 5.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import student_specialization
        >>> student_specialization(ds).dims
        ('overrealization', 'seed', 'epoch', 'node')
    """
    return lift(
        best_teacher,
        correlation_of(archive, "student_specialization"),
        reads=("teacher_node", "node"),
        gives=("node",),
        name="student_specialization",
        attrs={"units": "1", "long_name": "best correlation with any teacher node", "source": SOURCE},
    )


def mean_specialization(archive: xr.Dataset) -> xr.DataArray:
    """Mean best correlation ρ̄: mean over teacher nodes of the best correlation with any student node; (...).

    Raises:
        ValueError: as `specialization`.  Source: Tian (2020), Figure 6; Tian et al. (2019), section 5.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import mean_specialization
        >>> rho = mean_specialization(ds).mean("seed").compute()  # lazy until here
        >>> bool((rho.isel(epoch=-1) > rho.isel(epoch=0)).all())  # students specialize
        True
    """
    return lift(
        mean_best_match,
        correlation_of(archive, "mean_specialization"),
        reads=("teacher_node", "node"),
        name="mean_specialization",
        attrs={"units": "1", "long_name": "mean best correlation ρ̄", "source": SOURCE},
    )


def mean_rank(archive: xr.Dataset) -> xr.DataArray:
    """Mean rank r̄: rank at each epoch of the last epoch's best student nodes, mean over teacher nodes; (..., epoch).

    In [0, 1).  0 means that every teacher node's final winner is already its best match; at the start, that luck
    decided. Teacher nodes without a correlation are left out.

    Raises:
        ValueError: as `specialization`, or without ``epoch``.  Source: Tian et al. (2019), section 6.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import mean_rank
        >>> ranks = mean_rank(ds).compute()
        >>> float(ranks.isel(epoch=-1).max())  # at the end the winners are the best
        0.0
    """
    return _rank_named(_final_ranks(archive, "mean_rank").mean("teacher_node"), "mean_rank", "mean rank r̄")


def median_rank(archive: xr.Dataset) -> xr.DataArray:
    """Median over teacher nodes of the ranks that `mean_rank` averages, in [0, 1); (..., epoch).

    A few winners with a high rank raise the mean but not the median: a median below r̄ means most were near the top.

    Raises:
        ValueError: as `mean_rank`.

    Source: Tian et al. (2019), Figures 19 to 21.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import median_rank
        >>> median_rank(ds).dims
        ('overrealization', 'seed', 'epoch')
    """
    ranks = lift(median, _final_ranks(archive, "median_rank"), reads=("teacher_node",))
    return _rank_named(ranks, "median_rank", "median rank")


def _final_ranks(archive: xr.Dataset, caller: str) -> xr.DataArray:
    return lift(
        winner_rank,
        correlation_of(archive, caller),
        reads=("epoch", "teacher_node", "node"),
        gives=("epoch", "teacher_node"),
        name=caller,
    )


def _rank_named(ranks: xr.DataArray, name: str, words: str) -> xr.DataArray:
    return ranks.rename(name).assign_attrs(
        units="1", long_name=f"{words} of the final winner", source="Tian et al. 2019 (arXiv:1905.13405), section 6"
    )


def recovered(archive: xr.Dataset, *, threshold: float = THRESHOLD) -> xr.DataArray:
    """Number of teacher nodes with a student node correlated above `threshold`; (...).

    0 for a living student all of whose nodes are dead; NaN for dead members and missing points.

    Raises:
        ValueError: as `specialization`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import recovered
        >>> float(recovered(ds, threshold=0.95).isel(epoch=0).max())
        0.0
    """
    found = lift(
        match_counts,
        correlation_of(archive, "recovered"),
        reads=("teacher_node", "node"),
        name="recovered",
        attrs={
            "units": "1",
            "long_name": f"teacher nodes recovered (correlation > {threshold:g})",
            "source": SOURCE,
        },
        threshold=threshold,
    )
    return counted(found, archive)


def success_rate(archive: xr.Dataset, *, threshold: float = THRESHOLD) -> xr.DataArray:
    """Share of seeds in which each teacher node is recovered; (..., teacher_node).

    Seeds without a value (dead members, missing points) are left out; a living student all of whose nodes are dead
    counts as a failure.

    Raises:
        ValueError: as `specialization`.  Source: Tian (2020), Figure 7.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import success_rate
        >>> success_rate(ds).isel(epoch=-1).dims
        ('overrealization', 'teacher_node')
    """
    rate = _success(archive, threshold, "success_rate").mean("seed")
    return rate.rename("success_rate").assign_attrs(
        units="1", long_name=f"share of seeds with correlation > {threshold:g}", source=SOURCE
    )


def success_interval(archive: xr.Dataset, *, threshold: float = THRESHOLD, confidence: float = 0.95) -> xr.DataArray:
    """Wilson interval of `success_rate`, from the number of seeds with a value; (..., teacher_node, bound).

    Raises:
        ValueError: as `success_rate`, or if `confidence` is outside (0, 1).

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import success_interval
        >>> success_interval(ds).bound.values.tolist()
        ['low', 'high']
    """
    interval = share_interval(_success(archive, threshold, "success_interval"), confidence=confidence)
    return interval.rename("success_interval").assign_attrs(
        units="1",
        long_name=f"{confidence:.0%} interval of the share of seeds with correlation > {threshold:g}",
        source=SOURCE,
    )


def _success(archive: xr.Dataset, threshold: float, caller: str) -> xr.DataArray:
    best = specialization(archive)
    if "seed" not in best.dims:
        raise ValueError(f"{caller}: the slice has no dimension seed; select seeds with a list or slice")
    return counted((best > threshold).where(best.notnull()), archive)


def recovery_epoch(archive: xr.Dataset, *, threshold: float = THRESHOLD) -> xr.DataArray:
    """First recorded epoch at which each teacher node is recovered, NaN if it never is; (..., teacher_node).

    Raises:
        ValueError: as `specialization`.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> from tsdyn.analysis.specialization import recovery_epoch
        >>> recovery_epoch(ds).dims
        ('overrealization', 'seed', 'teacher_node')
    """
    best = specialization(archive)
    if "epoch" not in best.dims:
        raise ValueError("recovery_epoch: the slice has no dimension epoch; select epochs with a list or slice")
    first = best["epoch"].where(best > threshold).min("epoch")
    return first.rename("recovery_epoch").assign_attrs(
        units="epoch", long_name=f"first epoch with correlation > {threshold:g}", source=SOURCE
    )
