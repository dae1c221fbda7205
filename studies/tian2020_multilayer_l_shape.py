"""After the slides of Tian (2020): the L-shape of every hidden layer of a deep student over epochs.

Fan-out norm √E β_kk against best correlation with any teacher node, one point per student node, one colour per seed.
The upright of the L grows layer by layer from the lowest: at desk scale 43, 16, 2, 4 % of the nodes of layers 1 to 4
are correlated above 0.9 at epoch 5 and 56, 43, 42, 50 % at epoch 100, where their median norm is 0.55, 0.74, 0.78, 0.77
against 0.33, 0.20, 0.34, 0.52 of nodes below 0.7.  The foot does not fall to 0, as it does in two layers from a small
start: before training norms were 0.05, 0.11, 0.23, 0.52, so torch's start stays (layer 4) or has grown (layer 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.specialization import student_specialization
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "L-shape of each hidden layer over epochs, teacher 10-15-20-25"
SOURCE = "after Tian 2020 (PMLR 119:9470), slides and released code (visualize_multi)"

_PAPER = MULTILAYER.replace(
    {
        "name": "multilayer-l-shape-paper",
        "seeds": 8,
        "student.overrealization": 5.0,
        "training.epochs": 100,
        "record.epochs": [0, 1, 5, 30, 100],
        "record.observables": ["mse", "correlation", "fanout_norm"],
        "sweep": {},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "multilayer-l-shape-smoke", "seeds": 2, "student.overrealization": 2.0, "training.epochs": 2}
        | {"data.train": 1000, "data.eval": 200}
    ),
    # 4 seeds, and 2048 samples for the norms instead of 10,240
    "desk": _PAPER.replace({"name": "multilayer-l-shape-desk", "seeds": 4, "data.eval": 2048}),
    "paper": _PAPER,
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """``student_specialization`` and ``fanout_norm`` (seed, epoch, layer, node) of the hidden layers; loaded."""
    hidden = archive[["correlation", "fanout_norm"]].isel(layer=slice(None, -1))
    found = {"student_specialization": student_specialization(hidden), "fanout_norm": hidden["fanout_norm"]}
    return xr.Dataset(found).load()


def _panel(measured: xr.Dataset, ax: Axes) -> None:
    own = measured.isel(layer=0) if "layer" in measured.dims else measured
    own = own.isel(epoch=-1) if "epoch" in own.dims else own
    panels.points(own["student_specialization"], own["fanout_norm"], ax=ax)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))


#: The panel by name; of the lowest layer at the last epoch, select another with ``measured.sel``.
PANELS: dict[str, layout.Panel] = {"l_shape": _panel}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with one row per recorded epoch and one column per hidden layer; norms on one scale per layer."""
    rows = [
        [
            layout.Cell("l_shape", {"epoch": e, "layer": at}, f"layer {at}, epoch {e}")
            for at in measured["layer"].values.tolist()
        ]
        for e in measured["epoch"].values.tolist()
    ]
    says = "Best correlation with any teacher node and fan-out norm of each student node, by layer, a colour per seed"
    return layout.arrange(
        measured, PANELS, rows, says=says, spread="points", height=1.35, share_x=True, share_y="col", key=None,
        paper=EXPERIMENTS,
    )  # fmt: skip
