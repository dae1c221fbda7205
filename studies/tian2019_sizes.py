"""Tian et al. (2019), Figures 9a and 22: small against large models, with and without BatchNorm, at several rates.

The paper says that BatchNorm hurts in small models and helps in large ones.  With its own teacher (``teacher.init =
"luck-matters"``) it depends on the rate.  At desk scale, 5 seeds, the small model's median error per output without and
with BatchNorm is 57 and 184 at rate 1e-5, 15.5 and 16.0 at 1e-4, and 87 and 5.8 at 1e-3, where the former breaks down;
the large model's is 1.2e5 and 1.4e5 at 1e-6, and at 1e-4 all without diverge while with it 1.6e4 is reached.  So at one
small rate BatchNorm hurts in both, as the paper says of small models; each at its own best rate, it helps in both.
With 16 seeds of the small model, after 20 epochs, the loss with BatchNorm is 3.3 times that without it at 1e-5 (95 %
interval 2.8 to 3.8), 0.79 times at 1e-4 (0.50 to 1.24) and 0.05 times at 1e-3, where 10 of 16 diverge without it; with
the teacher of the 2020 code it is smaller at each of three rates (docs/reproduction.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.studies import deep_layers
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "small against large models with and without BatchNorm, against the learning rate"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figures 9a and 22"


def _sweep(small: list[int], large: list[int], rates: Mapping[str, list[float]]) -> dict[str, Any]:
    """Both teachers, each at its own rates, with and without BatchNorm."""
    teachers = {"small": small, "large": large}
    return {
        "student.batch_norm": ["none", "after"],
        "points": [
            {"teacher.widths": [20, *teachers[size], 100], "training.learning_rate": rate}
            for size, listed in rates.items()
            for rate in listed
        ],
    }


_RATES = {"small": [1e-5, 1e-4, 1e-3, 1e-2], "large": [1e-7, 1e-6, 1e-5, 1e-4, 1e-3]}
_PAPER = MULTILAYER.replace(
    deep_layers.LUCK
    | {"name": "sizes-paper", "seeds": 5, "student.overrealization": 10.0, "data.train": 100_000}
    | {"training.epochs": 40, "record.every": 10}
    | {"sweep": _sweep([10, 15, 20, 25], [50, 75, 100, 125], _RATES)}
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "sizes-smoke", "seeds": 2, "student.overrealization": 1.0, "data.train": 300, "data.eval": 100}
        | {"training.epochs": 1, "record.every": 1}
        | {"sweep": _sweep([4, 5, 6, 7], [8, 8, 8, 8], {"small": [1e-5, 1e-4], "large": [1e-6, 1e-5]})}
    ),
    # both teachers, 2x instead of 10x, 6,000 samples, 10 epochs
    "desk": _PAPER.replace(
        {"name": "sizes-desk", "seeds": 5, "student.overrealization": 2.0, "data.train": 6_000}
        | {"training.epochs": 10}
        | {"sweep": _sweep([10, 15, 20, 25], [50, 75, 100, 125], {"small": [1e-5, 1e-4, 1e-3], "large": [1e-6, 1e-4]})}
    ),
    "paper": _PAPER,
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """``mse_eval`` and ρ̄ averaged over hidden layers at the last epoch, (batch_norm, point, seed); NaN if diverged."""
    found = deep_layers.measure(archive).isel(epoch=-1)
    rho = found["mean_specialization"].mean("layer", keep_attrs=True)
    kept = {"mse_eval": found["mse_eval"], "mean_specialization": rho}
    ds = xr.Dataset(kept).assign_coords(learning_rate=("point", np.asarray(archive["learning_rate"].values, float)))
    return ds.assign_coords(teacher=("point", archive["widths"].values.astype(str)))


#: Ratio of the places on a logarithmic axis at which marks of one rate are drawn, beside one another.
_BESIDE = 1.08


def _against_rate(name: str) -> layout.Panel:
    """Panel of a final value against the rate, without and with BatchNorm, of the first teacher unless selected."""

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        one = measured.isel(point=np.flatnonzero(measured["teacher"] == measured["teacher"].values[0]))
        one = one.swap_dims(point="learning_rate").sortby("learning_rate")
        for position, place in enumerate(one["batch_norm"].values.tolist()):
            own = one[name].sel(batch_norm=place)
            own = own.assign_coords(learning_rate=own["learning_rate"] * _BESIDE ** (position - 0.5))
            panels.spread(
                own, ax=ax, along="learning_rate", color=panels.colour(position), linestyle=panels.STYLES[position],
                marker=panels.mark(position), label=captions.words("batch_norm", place),
            )  # fmt: skip
        deep_layers.scale(one[name], ax)
        layout.decades(ax, "x")
        ax.set_xlabel("learning rate")

    return drawn


#: Panels by name.
PANELS: dict[str, layout.Panel] = {name: _against_rate(name) for name in ("mse_eval", "mean_specialization")}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per teacher: final loss and mean ρ̄ against the rate, with and without BatchNorm."""
    teachers = dict.fromkeys(measured["teacher"].values.tolist())
    parts = {f"{name} {t}": _of_teacher(name, t) for name in PANELS for t in teachers}
    rows = [
        [layout.Cell(f"{name} {t}", {}, f"teacher {'-'.join(t.split('-')[1:-1])}" if not i else "") for t in teachers]
        for i, name in enumerate(PANELS)
    ]
    dead = int(measured["mse_eval"].isnull().sum())
    says = (
        f"Final loss and correlation averaged over layers against the rate after epoch {int(measured['epoch'])}; "
        f"{dead} of {measured['mse_eval'].size} students diverged and are left out (no mark: all did); "
        "marks of one rate are drawn beside one another"
    )
    return layout.arrange(
        measured, parts, rows, says=says, spread="curves", height=1.6, share_x="col", share_y="row", paper=EXPERIMENTS
    )


def _of_teacher(name: str, teacher: str) -> layout.Panel:
    return lambda own, ax: PANELS[name](own.isel(point=np.flatnonzero(own["teacher"] == teacher)), ax)
