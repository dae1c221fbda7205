"""Reads what a figure needs from an archive, and restores dimensions that a slice may have lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import xarray as xr

from tsdyn import layer as one_layer
from tsdyn import vocabulary
from tsdyn.archive.selecting import lowest_layer

#: Variables of the archive that each figure needs; ``a|b`` where either will do.
NEEDS: Mapping[str, tuple[str, ...]] = {
    "l-shape": ("correlation", "fanout_norm"),
    "success-rate": ("correlation",),
    "recovery": ("correlation",),
    "loss": ("mse_eval|loss_eval",),
    "specialization": ("correlation",),
    "rank": ("correlation",),
    "winners": ("correlation",),
    "correlation": ("correlation",),
    "couplings": ("A", "H_star", "correlation"),
    "spectrum": ("hessian_eigenvalue",),
    "boundaries": ("weight", "bias", "teacher_weight", "teacher_bias", "fanout_norm"),
    "phase": ("correlation",),
}


def missing(archive: xr.Dataset, needs: Sequence[str]) -> list[str]:
    """The needed variables that were not recorded."""
    return [need.split("|")[0] for need in needs if not any(n in archive for n in need.split("|"))]


def variables_of(archive: xr.Dataset, figure: str, *, epochs: Sequence[int] | slice | None = None) -> xr.Dataset:
    """The variables that `figure` needs, with the dimensions seed and epoch that a slice may have lost.

    Args:
        archive: Run, sweep or slice.
        figure: Name in `FIGURES`.
        epochs: Positions to keep; all if None.

    Raises:
        ValueError: naming what to record.
    """
    needs = NEEDS[figure]
    unrecorded = missing(archive, needs)
    if unrecorded:
        families = {v: name for name, members in vocabulary.FAMILIES.items() for v in members}
        words = list(dict.fromkeys(families.get(name, name) for name in unrecorded))
        raise ValueError(
            f"{figure}: the archive has no {', '.join(unrecorded)}; record it: [record] observables = {words}"
        )
    names = [next(n for n in need.split("|") if n in archive) for need in needs]
    ds = archive[names]
    for dim in ("seed", "epoch"):
        lost = [n for n in names if dim in vocabulary.VARIABLES[n].dims and dim not in ds[n].dims]
        if lost and dim not in ds.dims:
            where = ds[dim] if dim in ds.coords else xr.DataArray(0)
            ds = ds.drop_vars(dim, errors="ignore")
            ds = ds.assign({n: ds[n].expand_dims({dim: [where.item()]}) for n in lost})
    if epochs is not None and "epoch" in ds.dims:
        ds = ds.isel(epoch=epochs)
    return ds


def in_lowest_layer(ds: xr.Dataset) -> xr.Dataset:
    return one_layer(ds, lowest_layer(ds)) if "layer" in ds.dims else ds
