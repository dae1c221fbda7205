"""After the slides of Tian (2020): two solutions joined by line segments, loss along the way and height of the barrier.

Theorem 2 has it that student nodes aligned with no teacher node end without fan-out, so two students of one teacher can
be joined without a barrier: fan-outs move onto one node per teacher node, free nodes take the other student's weights,
fan-outs move over, and so on (`tsdyn.analysis.connectivity.theorem_2_path`).  A seed draws its own teacher, so the two
students are of one seed with different starts, ``gaussian`` and ``torch``; their batches are the same.

At desk scale the barrier of the straight line stays at 24 to 41 from epoch 5 to 100, that of the matched one at 0.5 to
3 at 2x and 5x, where several nodes share a teacher node and no permutation is enough, and at 0.001 at 1x.  That of the
path falls with the loss of its ends: from 0.009 to 0.02 at epoch 5 to 8e-11 to 9e-5 at epoch 100 at 2x, from 0.03 to
0.05 to 8e-5 to 5e-4 at 5x, where the worse ends are at 2e-6 to 5e-6.  So it is a path without a barrier only in the
limit, as the theorem is of vanishing gradients.  At 1x no node is free, so there is no path.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tsdyn.analysis.connectivity import LEGS, ROUTES, connect
from tsdyn.analysis.figures import PANEL
from tsdyn.analysis.members import PARAMETERS
from tsdyn.analysis.panels import axis_label, colour
from tsdyn.studies.two_layer import PAPER, SMOKE

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "loss along line segments between two solutions: straight, matched and Theorem 2's path"
SOURCE = "after Tian 2020 (PMLR 119:9470), Theorem 2 and slides; Kuditipudi et al. 2019"

#: Losses below this are drawn at this value, since rounding in float64 leaves 1e-28.
_FLOOR = 1e-12

_PAIRS = {
    "teacher.polarity": 0.0,
    "record.observables": ["loss", "weight"],
    "sweep": {"student.init": ["gaussian", "torch"], "student.overrealization": [1, 2, 5]},
}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": SMOKE.replace(
        _PAIRS
        | {"name": "connectivity-smoke", "seeds": 2, "record.epochs": [6], "data.eval": 200}
        | {"sweep": {"student.init": ["gaussian", "torch"], "student.overrealization": [1, 2]}}
    ),
    # the paper's two-layer experiment with 4 seeds instead of 32, and loss on 2000 samples instead of 10,000
    "desk": PAPER.replace(
        _PAIRS | {"name": "connectivity-desk", "seeds": 4, "record.epochs": [5, 10, 25, 50, 100], "data.eval": 2000}
    ),
    "paper": PAPER.replace(_PAIRS | {"name": "connectivity-paper", "record.epochs": [5, 10, 25, 50, 100]}),
}


def measure(archive: xr.Dataset) -> xr.Dataset:
    """Dataset of ``loss`` (..., route, position) and ``barrier`` (..., route) between the students of the two starts.

    Over overrealization, epoch and seed, by `tsdyn.analysis.connectivity.connect`; loaded.
    NaN where there is no path.  Epoch 0 is left out, since students are no solutions yet.
    """
    trained = archive[list(PARAMETERS)].sel(epoch=archive["epoch"] > 0).load()
    along = {str(dim): trained[dim].values for dim in ("overrealization", "epoch", "seed")}
    found = []
    for values in itertools.product(*along.values()):
        at = trained.sel(dict(zip(along, values, strict=True)))
        found.append(connect(*(at.sel(init=start) for start in trained["init"].values)))
    sizes = [len(values) for values in along.values()]
    gathered = {
        name: xr.DataArray(
            np.stack([one[name].values for one in found]).reshape(*sizes, *first.shape),
            dims=(*along, *first.dims),
            coords=along | {str(dim): first[dim].values for dim in first.dims},
            attrs={key: value for key, value in first.attrs.items() if key != "comment"},
        )
        for name, first in found[0].data_vars.items()
    }
    return xr.Dataset(gathered)


def draw(measured: xr.Dataset) -> Figure:
    """Figure with one column per over-realization: loss along each route at the end, barriers over epochs."""
    wide = measured["overrealization"].values
    figure = Figure(figsize=(PANEL[0] * 1.5 * len(wide) + 0.6, PANEL[1] * 2.5), layout="constrained")
    above, below = figure.subplots(2, len(wide), squeeze=False, sharey="row")  # rows of panels
    last = int(measured["epoch"][-1])
    for ratio, top, bottom in zip(wide, above, below, strict=True):
        own = measured.sel(overrealization=ratio)
        loss = own["loss"].sel(epoch=last).clip(min=_FLOOR)
        _lines(loss, "position", top)
        for corner in range(1, LEGS):
            top.axvline(corner / LEGS, color="0.8", linewidth=0.6, linestyle=":")
        top.set_xlabel("share of the way; dotted: corners", fontsize=8)
        top.set_title(f"{ratio:g}x, epoch {last}", fontsize=9)
        _lines(own["barrier"].where(own["barrier"] > 0), "epoch", bottom, marker="o", markersize=3)
        ends = own["loss"].sel(route=ROUTES[0]).isel(position=[0, -1]).max("position").clip(min=_FLOOR)
        for seed in ends["seed"].values:
            label = "loss at the worse end" if seed == ends["seed"].values[0] else None
            bottom.plot(ends["epoch"], ends.sel(seed=seed), color="black", linewidth=0.8, linestyle="--", label=label)
        bottom.set_xlabel("epoch", fontsize=8)
        if bool(own["barrier"].sel(route=ROUTES[-1]).isnull().all()):
            bottom.set_title("no free nodes, so no path of Theorem 2", fontsize=8)
    for ax, name in ((above[0], "loss"), (below[0], "barrier")):
        ax.set_ylabel(axis_label(measured[name]), fontsize=8)
    handles, labels = below[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"two students of one teacher, a line each of {measured.sizes['seed']} seeds; losses no lower than {_FLOOR:g}",
        fontsize=10,
    )
    return figure


def _lines(values: xr.DataArray, along: str, ax: Axes, **line: Any) -> None:
    """Draw one line per seed and route, one colour per route, on a log scale; (seed, route, `along`)."""
    for position, route in enumerate(values["route"].values):
        for seed in values["seed"].values:
            own = values.sel(route=route, seed=seed)
            label = str(route) if seed == values["seed"].values[0] else None
            if bool(own.notnull().any()):
                ax.plot(own[along], own, color=colour(position), linewidth=1.2, alpha=0.8, label=label, **line)
    ax.set_yscale("log")
    ax.tick_params(labelsize=8)
