"""Parts shared by the figures of sample size: results at the last epoch against the number of training samples."""

from __future__ import annotations

import xarray as xr
from tsdyn.analysis import captions
from tsdyn.studies import deep_layers


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Loss, mse, top-1 accuracy and the hidden layers' ``mean_specialization`` (swept..., seed, layer); last epoch."""
    return deep_layers.measure(archive.isel(epoch=[-1])).isel(epoch=0).drop_vars(["mean_rank", "median_rank"])
