"""Parts shared by the figures of sample size: results at the last epoch against the number of training samples."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.studies import deep_layers


def measure(archive: xr.Dataset) -> xr.Dataset:
    """Loss, mse, top-1 accuracy and the hidden layers' ``mean_specialization`` (swept..., seed, layer); last epoch."""
    return deep_layers.measure(archive.isel(epoch=[-1])).isel(epoch=0).drop_vars(["mean_rank", "median_rank"])


def scales(values: xr.DataArray, ax: Axes, *, counts: str) -> None:
    """Set the axes of `values` against `counts` samples: logarithmic, except [0, 1] for ρ̄ and accuracies."""
    ax.set(xscale="log", xlabel=counts)
    if str(values.name) == "mean_specialization" or str(values.name).endswith("accuracy"):
        ax.set_ylim(-0.02, 1.02)
    elif bool(np.fmin.reduce(values.values, axis=None) > 0):
        ax.set_yscale("log")
    ax.xaxis.label.set_fontsize(9)
    ax.tick_params(which="both", labelsize=8)
