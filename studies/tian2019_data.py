"""Tian et al. (2019), Figures 9b and 23: ρ̄ of each layer against epochs, finite against infinite data.

Students see the same samples again and again, or new ones at every step; with and without BatchNorm, fully connected
and ConvNet.  An epoch is as many steps either way.  The teacher is the paper's own (``teacher.init = "luck-matters"``).

Found at desk scale (two seeds, ρ̄ of layers 1 to 4 after 20 epochs): with BatchNorm infinite data are ahead, 1.00, 0.86,
0.71, 0.73 against 0.99, 0.83, 0.67, 0.70 fully connected, and 0.94, 0.94, 0.77, 0.69 against 0.94, 0.90, 0.63, 0.55 of
the ConvNet; fully connected without BatchNorm the two are alike, and a ConvNet without it hardly learns at the rate at
which it does not diverge (0.50, 0.26, 0.15, 0.18 either way).  With the teacher of the 2020 code infinite data were
ahead everywhere, most of all in the ConvNet with BatchNorm.
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean best correlation with finite and infinite data, with and without BatchNorm, fully connected and ConvNet"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 9b and 23"


_PAPER = MULTILAYER.replace(
    deep_layers.LUCK
    | {
        "name": "data-paper",
        "seeds": 5,
        "student.overrealization": 10.0,
        "data.eval": 1024,
        "training.epochs": 40,
        "sweep": {"data.train": [50_000, "fresh"]}
        | deep_layers.with_and_without_norm([50, 75, 100, 125], 64, (781, 781), "large"),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "data-smoke", "seeds": 2, "student.overrealization": 2.0, "data.eval": 100, "training.epochs": 1}
        | {
            "sweep": {"data.train": [100, "fresh"]}
            | deep_layers.with_and_without_norm([4, 5, 6, 7], 2, (4, 2), "small")
        }
    ),
    # the small fully connected teacher, 6 channels instead of 64, 2x instead of 10x, fewer samples and steps
    "desk": _PAPER.replace(
        {"name": "data-desk", "seeds": 2, "student.overrealization": 2.0, "training.epochs": 20}
        | {
            "sweep": {"data.train": [2000, "fresh"]}
            | deep_layers.with_and_without_norm([10, 15, 20, 25], 6, (300, 75), "small")
        }
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄ of each layer and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: columns finite and infinite data of both kinds of network, rows ρ̄ and the loss, BatchNorm below."""
    says = "Finite against infinite data: ρ̄ of each hidden layer and evaluation loss over training"
    return deep_layers.draw(
        deep_layers.by_network(measured, "batch_norm"), PANELS, says=says, across=("point",), paper=EXPERIMENTS
    )
