"""Tian et al. (2019), Figures 17 to 22 on Gaussian inputs: loss, ρ̄, and mean and median rank of the final winners.

With and without BatchNorm, of the small teacher 10-15-20-25 and the large one 50-75-100-125; the figures' halves on
CIFAR-10 are `tian2019_cifar10`'s.

The teacher is the paper's own (``teacher.init = "luck-matters"``); each student trains at a rate that it stands, which
is ten to a hundred times larger with BatchNorm.  At desk scale, 2 seeds, winners are lucky in every layer, most in the
lowest: the small student's start at mean ranks of 0.04, 0.14, 0.29, 0.31 (medians 0.02, 0.08, 0.23, 0.25) without and
0.08, 0.24, 0.18, 0.42 with BatchNorm, the large one's at 0.20, 0.25, 0.32, 0.36 and 0.14, 0.30, 0.35, 0.37; chance is
about 0.5.  After five epochs they are at 0.03 or less, the large ones without BatchNorm at 0.07.  ρ̄ ends at 1.00,
0.91, 0.76, 0.79 and, with BatchNorm, 1.00, 0.89, 0.73, 0.76 (small), 0.99, 0.64, 0.55, 0.54 and 1.00, 0.86, 0.65, 0.64
(large), the mse per output at 2.2 and 1.6, and at 8,100 and 4,700: BatchNorm lowers the loss of both, and raises ρ̄
of the large one only.  With the teacher of the 2020 code, whose nodes are active on half of
the samples and whose outputs have unit variance, winners started at mean ranks of 0.05, 0.17, 0.17, 0.28 (small) and
0.01, 0.05, 0.09, 0.18 (large), medians lower, and led after two epochs; BatchNorm ended ahead in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr
from tsdyn.analysis import captions
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.deep_layers import measure
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "mean and median rank of the final winners, mean best correlation and loss, small and large teacher"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 17 to 22"


def _sweep(*teachers: Sequence[int]) -> dict[str, Any]:
    """Teachers of these hidden widths, students with and without BatchNorm, each at a rate that it stands."""
    rates = [deep_layers.RATES["small"], deep_layers.RATES["large"]]
    return {
        "points": [
            {"student.batch_norm": place, "teacher.widths": [20, *hidden, 100], "training.learning_rate": rate}
            for hidden, pair in zip(teachers, rates, strict=False)
            for place, rate in zip(("none", "after"), pair, strict=True)
        ]
    }


_PAPER = MULTILAYER.replace(
    deep_layers.LUCK
    | {
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
        | {"training.epochs": 20}
    ),
    "paper": _PAPER,
}


#: Panels by name: ρ̄, mean and median rank of each layer, and the loss, over epochs.
PANELS = {name: deep_layers.panel(name) for name in ("mean_specialization", "mean_rank", "median_rank", "mse_eval")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per teacher and with and without BatchNorm; rows ρ̄, both ranks and the loss."""
    shown = zip(measured["widths"].values.tolist(), measured["batch_norm"].values.tolist(), strict=True)
    names = [f"{'-'.join(w.split('-')[1:-1])}, {captions.words('batch_norm', b)}" for w, b in shown]
    bare = measured.drop_vars([str(name) for name in measured["point"].coords])
    named = bare.assign_coords(point=names)
    says = "Mean best correlation ρ̄, mean and median rank of the final winners of each layer, and evaluation loss"
    return deep_layers.draw(named, PANELS, says=says, show=tuple(PANELS), across=("point",), paper=EXPERIMENTS)
