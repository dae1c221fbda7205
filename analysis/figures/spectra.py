"""Largest eigenvalues of the Hessian."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.curves import measure_curves
from tsdyn.analysis.figures.reading import variables_of

#: Epochs whose spectra are drawn.
SPECTRA = 4


def measure_spectrum(archive: xr.Dataset) -> xr.Dataset:
    """``hessian_eigenvalue`` at up to `SPECTRA` epochs; (swept..., seed, epoch, mode), loaded."""
    if archive.attrs.get("measured") == "hessian_eigenvalue":
        return archive
    needed = variables_of(archive, "spectrum")
    chosen = np.unique(np.linspace(0, needed.sizes["epoch"] - 1, SPECTRA).round().astype(int))
    return measure_curves(needed.isel(epoch=chosen), "hessian_eigenvalue")


def spectrum(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Largest eigenvalues of the Hessian in descending order, dark to light over epochs, by the rule for spread.

    On a log scale, or, if some are not positive, on one that is linear near 0.
    """
    layout.require_point(ds, "spectrum")
    values = measure_spectrum(ds)["hessian_eigenvalue"]
    ax = panels.axes(ax)
    epochs = np.atleast_1d(values["epoch"].values)
    for position, epoch in enumerate(epochs):
        own = values.sel(epoch=epoch) if "epoch" in values.dims else values
        panels.spread(own, along="mode", ax=ax, color=panels.shade(position, len(epochs)), label=f"epoch {epoch}")
    smallest, largest = (float(f.reduce(values.values, axis=None)) for f in (np.fmin, np.fmax))
    if smallest > 0:
        ax.set_yscale("log")
    elif largest > smallest:
        ax.set_yscale("symlog", linthresh=1e-3 * max(largest, -smallest))
    ax.set(xlabel="mode (0: largest eigenvalue)", ylabel="eigenvalue of the Hessian")
    return ax


@look.styled
def draw_spectrum(ds: xr.Dataset) -> look.Page:
    """Panels of `spectrum`."""
    measured = measure_spectrum(ds)
    figure = layout.grid(
        measured, lambda at, ax: spectrum(measured.sel(at), ax=ax),
        title=layout.headed("Largest eigenvalues of the Hessian", measured),
        **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    layout.legend(figure)
    return figure
