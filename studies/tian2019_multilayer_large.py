"""Tian et al. (2019), Figure 9a, large teacher 50-75-100-125: as `tian2019_multilayer`, every layer five times wider.

At desk scale, two fifths of the samples, only the lowest layer specializes, to 0.74-0.83, most at 2x;
above it ρ̄ stays near 0.5 and rises with over-realization.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_multilayer import PANELS, drawn
from tsdyn.studies.tian2019_multilayer import PAPER as SMALL

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation of each layer by over-realization, teacher 50-75-100-125"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 9"

_PAPER = SMALL.replace({"name": "multilayer-large-paper", "teacher.widths": [20, 50, 75, 100, 125, 100]})

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "multilayer-large-smoke", "seeds": 2, "data.train": 1000, "data.eval": 500, "training.epochs": 2}
        | {"sweep": {"student.overrealization": [1.0, 2.0]}}
    ),
    # 2 seeds, 20,000 samples and 20 epochs, up to 5x; the rate falls at the same share of the run
    "desk": _PAPER.replace(
        {"name": "multilayer-large-desk", "seeds": 2, "data.train": 20_000, "data.eval": 2_000, "training.epochs": 20}
        | {"training.learning_rate": {0: 0.004, 13: 0.002}}
        | {"sweep": {"student.overrealization": [1.0, 2.0, 5.0]}}
    ),
    "paper": _PAPER,
}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure as of `tian2019_multilayer`."""
    return drawn(measured, EXPERIMENTS)
