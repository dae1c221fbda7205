"""The variable ``kept`` of archives whose runs leave samples out of their training sets.  Imports no torch."""

from __future__ import annotations

import numpy as np
import xarray as xr

from tsdyn.experiment import subsets
from tsdyn.experiment.experiment import Experiment


def with_kept(ds: xr.Dataset) -> xr.Dataset:
    """The Dataset with ``kept`` (subset, sample) if it has the dimension ``subset`` of ``data.leave_out``."""
    text = str(ds.attrs.get("experiment", ""))
    if "leave_out" not in text or "subset" not in ds.dims:
        return ds
    data = Experiment.from_toml_text(text, archived=True).data
    attrs = {"units": "1", "long_name": "whether the sample is trained on", "source": "tsdyn: data.leave_out"}
    found = subsets.kept(data)[ds["subset"].values.astype(int)]
    return ds.assign(kept=(("subset", "sample"), found, attrs)).assign_coords(sample=np.arange(found.shape[1]))
