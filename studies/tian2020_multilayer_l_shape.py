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
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis.figures import PANEL
from tsdyn.analysis.panels import axis_label, points
from tsdyn.analysis.specialization import student_specialization
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure"]

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


def measure(archive: xr.Dataset) -> xr.Dataset:
    """``student_specialization`` and ``fanout_norm`` (seed, epoch, layer, node) of the hidden layers; loaded."""
    hidden = archive[["correlation", "fanout_norm"]].isel(layer=slice(None, -1))
    found = {"student_specialization": student_specialization(hidden), "fanout_norm": hidden["fanout_norm"]}
    return xr.Dataset(found).load()


def draw(measured: xr.Dataset) -> Figure:
    """Figure with one row per recorded epoch and one column per hidden layer; norms on one scale per layer."""
    epochs, layers = measured["epoch"].values, measured["layer"].values
    figure = Figure(figsize=(PANEL[0] * len(layers) + 1, PANEL[1] * 0.8 * len(epochs) + 0.6), layout="constrained")
    cells = figure.subplots(len(epochs), len(layers), squeeze=False, sharex=True, sharey="col")
    for epoch, row in zip(epochs, cells, strict=True):
        for layer, ax in zip(layers, row, strict=True):
            own = measured.sel(epoch=epoch, layer=layer)
            points(own["student_specialization"], own["fanout_norm"], ax=ax)
            ax.set(xlabel="", ylabel="")
            ax.set_title(f"layer {layer}" if epoch == epochs[0] else "", fontsize=9)
            ax.tick_params(labelsize=7)
            ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
        row[0].set_ylabel(f"epoch {epoch}", fontsize=9)
    figure.supxlabel(axis_label(measured["student_specialization"]), fontsize=9)
    figure.supylabel(axis_label(measured["fanout_norm"]), fontsize=9)
    handles, labels = cells[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", title="seed", fontsize=8, title_fontsize=8)
    figure.suptitle("fan-out norm against best correlation, one point per student node", fontsize=10)
    return figure
