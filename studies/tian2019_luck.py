"""Tian et al. (2019), Figure 7: ρ̄ and r̄ of each layer against epochs, with and without BatchNorm, FC and ConvNet.

What the paper finds: ρ̄ rises from the lowest layer up, and the rank of the node that wins in the end falls from the
start on: winners are among those that were lucky at the start.  Data are infinite and the teacher is the paper's own
(``teacher.init = "luck-matters"``); each student trains at a rate that it stands (`deep_layers.RATES`).

At desk scale, 2 seeds, ρ̄ of the fully connected student ends at 1.00, 0.89, 0.74, 0.76 (layers 1 to 4) without and at
1.00, 0.86, 0.71, 0.73 with BatchNorm, the loss at 16 and 6 without and 2.3 and 1.5 with: BatchNorm lowers it and not
ρ̄.  Winners start at mean ranks of 0.02, 0.19, 0.25, 0.26 and 0.07, 0.26, 0.31, 0.33 (0.5 would be chance) and are at
0.07 or less after two epochs.  The ConvNet needs BatchNorm: after 8 epochs ρ̄ is 1.00, 0.93, 0.62, 0.71 with it and
0.52, 0.29, 0.19, 0.16 without, where the rates at which it survives are too small to learn with.

With the teacher of the 2020 code and finite data BatchNorm was ahead in every layer at one rate, too: ρ̄ ended at 1.00,
0.95, 0.84, 0.81 with and 1.00, 0.94, 0.79, 0.79 without it, of the ConvNet's channels at 0.82, 0.82, 0.80, 0.66 and
0.83, 0.54, 0.50, 0.40.
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

TITLE = "mean best correlation and mean rank with and without BatchNorm, fully connected and ConvNet"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 7"


_PAPER = MULTILAYER.replace(
    deep_layers.LUCK
    | {
        "name": "luck-paper",
        "data.train": "fresh",
        "seeds": 5,
        "student.overrealization": 10.0,
        "data.eval": 1024,
        "training.epochs": 40,
        "sweep": deep_layers.with_and_without_norm([50, 75, 100, 125], 64, (1562, 1562), "large"),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "luck-smoke", "seeds": 2, "student.overrealization": 2.0, "data.eval": 200, "training.epochs": 2}
        | {"sweep": deep_layers.with_and_without_norm([4, 5, 6, 7], 2, (6, 3), "small")}
    ),
    # the small fully connected teacher, 6 channels instead of 64, 4x instead of 10x, fewer samples and epochs
    "desk": _PAPER.replace(
        {"name": "luck-desk", "seeds": 2, "student.overrealization": 4.0, "training.epochs": 15}
        | {"sweep": deep_layers.with_and_without_norm([10, 15, 20, 25], 6, (300, 90), "small")}
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄, mean and median rank of each layer, and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mean_rank", "median_rank", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per kind of network, without and with BatchNorm; rows ρ̄, both ranks and the loss."""
    says = "Mean best correlation ρ̄, mean and median rank of the final winners of each layer, and evaluation loss"
    return deep_layers.draw(
        deep_layers.by_network(measured, "batch_norm"), PANELS, says=says, show=tuple(PANELS), across=("point",),
        paper=EXPERIMENTS,
    )  # fmt: skip
