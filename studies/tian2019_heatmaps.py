"""Tian et al. (2019), Figure 10: β* and H* before and after training, student nodes in the order of their teacher's.

Before, no student node belongs to a teacher node.  After, the entries of the nodes that correlate best stand out along
the diagonal, in H* = β* ∘ D* more than in β*.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tsdyn.analysis.figures import PANEL
from tsdyn.analysis.matching import assignment
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn import layer as one_layer
from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "SOURCE", "TITLE", "draw", "measure", "order"]

TITLE = "heat maps of β* and H* before and after training, nodes reordered"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 10"

_MOMENTS = {"A": "β*", "H_star": "H*"}

_PAPER = MULTILAYER.replace(
    {
        "name": "heatmaps-paper",
        "student.overrealization": 10.0,
        "record.epochs": [0, 30],
        "record.observables": ["mse", "correlation", "A", "H_star"],
        "data.eval": 1024,
        "sweep": {},
    }
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _PAPER.replace(
        {"name": "heatmaps-smoke", "seeds": 2, "student.overrealization": 2.0, "data.train": 1000, "data.eval": 200}
        | {"training.epochs": 2}
    ),
    # 4 seeds, 2x: enough for every teacher node to find its own
    "desk": _PAPER.replace({"name": "heatmaps-desk", "seeds": 4, "student.overrealization": 2.0}),
    "paper": _PAPER,
}


def order(correlation: NDArray) -> NDArray:
    """Order of one layer's student nodes, (teacher_node, node) -> (node,): first each teacher node's partner in the
    one-to-one matching, in the order of the teacher's nodes, then the others, sorted by their best teacher node.
    """
    filled = np.nan_to_num(correlation, nan=-2.0)
    partners = assignment(correlation)
    first = [int(k) for k in partners[~np.isnan(partners)]]
    rest = [k for k in np.lexsort((-filled.max(0), filled.argmax(0))) if k not in first]
    return np.array([*first, *rest])


def measure(archive: xr.Dataset) -> xr.Dataset:
    """``A`` and ``H_star`` (layer, epoch, teacher_node, position) of the first seed at both ends of the run, student
    nodes in the last epoch's `order`; and of every seed ``contrast_A`` and ``contrast_H_star`` (layer, seed, epoch):
    mean |entry| of matched pairs over that of all others.  Loaded.
    """
    ends = archive[["correlation", *_MOMENTS]].isel(epoch=[0, -1]).load()
    maps: dict[str, list[xr.DataArray]] = {name: [] for name in _MOMENTS}
    contrasts: dict[str, list[xr.DataArray]] = {name: [] for name in _MOMENTS}
    hidden = [int(at) for at in ends["layer"].values[:-1]]
    for at in hidden:
        own = one_layer(ends, at)
        for name in _MOMENTS:
            values = own[name].transpose("seed", "epoch", "teacher_node", "node")
            ordered = []
            for seed in values["seed"].values:
                final = own["correlation"].sel(seed=seed).isel(epoch=-1).transpose("teacher_node", "node").values
                ordered.append(values.sel(seed=seed).values[..., order(final)])
            stacked = np.stack(ordered)  # (seed, epoch, teacher_node, position)
            maps[name].append(
                xr.DataArray(stacked[0], dims=("epoch", "teacher_node", "position")).assign_coords(
                    teacher_node=np.arange(stacked.shape[2]), position=np.arange(stacked.shape[3])
                )
            )
            contrasts[name].append(xr.DataArray(_contrast(stacked), dims=("seed", "epoch")))
    along = xr.DataArray(hidden, dims="layer", name="layer")
    columns = maps | {f"contrast_{name}": parts for name, parts in contrasts.items()}
    found = {
        name: xr.concat(parts, along, coords="minimal", compat="override", join="outer", combine_attrs="override")
        for name, parts in columns.items()
    }
    for name, array in found.items():
        symbol = _MOMENTS[name.removeprefix("contrast_")]
        what = f"matched entries of {symbol} over all others" if name.startswith("contrast") else symbol
        array.attrs = {"units": "1", "long_name": what, "source": SOURCE}
    return xr.Dataset(found).assign_coords(epoch=ends["epoch"].values, seed=ends["seed"].values)


def _contrast(values: NDArray) -> NDArray:
    """Mean |entry| of matched pairs over that of all others, (..., teacher_node, position) -> (...).

    Matched nodes are the first positions, in the teacher's order.
    """
    matched = np.eye(*values.shape[-2:]) > 0
    size = np.abs(values)
    found: NDArray = size[..., matched].mean(-1) / size[..., ~matched].mean(-1)
    return found


def draw(measured: xr.Dataset) -> Figure:
    """Figure with a column per layer; rows β* and H*, before and after; teacher nodes down, student nodes across."""
    layers, epochs = measured["layer"].values, measured["epoch"].values
    rows = list(itertools.product(_MOMENTS, epochs))
    figure = Figure(figsize=(PANEL[0] * 1.15 * len(layers), 1.35 * len(rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), len(layers), squeeze=False)
    for (name, epoch), row in zip(rows, panels, strict=True):
        for at, ax in zip(layers, row, strict=True):
            own = measured[name].sel(epoch=epoch, layer=at)
            own = own.dropna("teacher_node", how="all").dropna("position", how="all")
            limit = float(np.abs(own).max())
            ax.imshow(own, vmin=-limit, vmax=limit, cmap="RdBu_r", aspect="auto", interpolation="nearest")
            contrast = float(measured[f"contrast_{name}"].sel(epoch=epoch, layer=at).mean("seed"))
            ax.set_title(f"layer {at}: matched over others {contrast:.1f}", fontsize=8)
            ax.tick_params(labelsize=6)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        row[0].set_ylabel(f"{_MOMENTS[name]}, epoch {epoch}\nteacher node", fontsize=8)
    figure.supxlabel("student node, in the order of the teacher nodes; the matched first", fontsize=9)
    figure.suptitle(f"β* and H* of seed {int(measured['seed'][0])}; each panel on its own scale", fontsize=10)
    return figure
