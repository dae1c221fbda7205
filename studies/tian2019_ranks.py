"""Tian et al. (2019), Figures 17 to 22 on Gaussian inputs: loss, ρ̄, and mean and median rank of the final winners.

With and without BatchNorm, of the small teacher 10-15-20-25 and the large one 50-75-100-125; the figures' halves on
CIFAR-10 are `tian2019_cifar10`'s.

At desk scale winners are those that were near the top at the start, the nearer the lower the layer, and they lead
after two epochs: without BatchNorm the small teacher's mean ranks go from 0.05, 0.17, 0.17, 0.28 to 0.00, 0.03, 0.02,
0.03 and the large teacher's from 0.01, 0.05, 0.09, 0.18 to below 0.01.  Medians are lower, at the start 0.02, 0.06,
0.09, 0.21 and 0.00, 0.01, 0.04, 0.12: a few winners come from far behind.  With BatchNorm errors end smaller, at 0.057
against 0.075 and at 0.246 against 0.275, and winners lead sooner in most layers, but start no better in layer 3.  The
small teacher's ρ̄ ends at 1.00, 0.95, 0.85, 0.83 with and 1.00, 0.95, 0.80, 0.80 without it; the large one is far from
recovered, at 0.76, 0.58, 0.53, 0.53 and 0.75, 0.57, 0.52, 0.51.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean and median rank of the final winners, mean best correlation and loss, small and large teacher"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 17 to 22"


def _sweep(*teachers: Sequence[int]) -> dict[str, Any]:
    """Teachers of these hidden widths, students with and without BatchNorm."""
    return {
        "student.batch_norm": ["none", "after"],
        "teacher.widths": [[20, *hidden, 100] for hidden in teachers],
    }


_PAPER = MULTILAYER.replace(
    {
        "name": "ranks-paper",
        "seeds": 5,
        "student.overrealization": 10.0,
        "data.train": 100_000,
        "data.eval": 1024,
        "training.epochs": 40,
        "sweep": _sweep([10, 15, 20, 25], [50, 75, 100, 125]),
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "ranks-smoke", "seeds": 2, "student.overrealization": 2.0, "data.train": 300, "data.eval": 200}
        | {"training.epochs": 2, "sweep": _sweep([4, 5, 6, 7])}
    ),
    # both teachers; 4x instead of 10x, a fifth of the samples, half of the epochs
    "desk": _PAPER.replace(
        {"name": "ranks-desk", "seeds": 2, "student.overrealization": 4.0, "data.train": 20_000}
        | {"training.epochs": 20, "training.learning_rate": {0: 0.004, 13: 0.002}}
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄, mean and median rank of each layer, and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mean_rank", "median_rank", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per teacher and with and without BatchNorm; rows ρ̄, both ranks and the loss."""
    teachers = [f"teacher {'-'.join(str(widths).split('-')[1:-1])}" for widths in measured["widths"].values]
    named = measured.assign_coords(widths=teachers).rename(widths="class")
    says = "Mean best correlation ρ̄, mean and median rank of the final winners of each layer, and evaluation loss"
    return deep_layers.draw(
        named, PANELS, says=says, show=tuple(PANELS), across=("class", "batch_norm"), paper=EXPERIMENTS
    )
