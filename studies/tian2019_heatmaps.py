"""Tian et al. (2019), Figure 10: β* and H* before and after training, student nodes in the order of their teacher's.

Before, no student node belongs to a teacher node.  After, the entries of the nodes that correlate best stand out along
the diagonal, in H* = β* ∘ D* more than in β*.  The teacher is the paper's own (``teacher.init = "luck-matters"``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.matching import assignment
from tsdyn.studies.deep_layers import LUCK, RATES
from tsdyn.studies.tian2019_multilayer import PAPER as MULTILAYER

from tsdyn import layer as one_layer
from tsdyn.experiment.experiment import Experiment

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure", "order"]

TITLE = "heat maps of β* and H* before and after training, nodes reordered"
SOURCE = "Tian et al. 2019 (arXiv:1905.13405), Figure 10"

_MOMENTS = {"A": "β*", "H_star": "H*"}

_PAPER = MULTILAYER.replace(
    LUCK
    | {
        "name": "heatmaps-paper",
        "training.learning_rate": RATES["small"][0],
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


@captions.telling
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


def _map(name: str, symbol: str) -> layout.Panel:
    """Panel of one moment: entries over the largest of the layer at either epoch, teacher nodes down."""

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        one = measured.isel(layer=0) if "layer" in measured.dims else measured
        own = one[name].isel(epoch=-1) if "epoch" in one[name].dims else one[name]
        limit = float(one.attrs.get(f"largest {name}", np.nan))
        limit = limit if np.isfinite(limit) else float(np.abs(one[name]).max())
        own = own.dropna("teacher_node", how="all").dropna("position", how="all") / limit
        panels.table(own, ax=ax, limits=(-1, 1), cmap="RdBu", bar=False)
        rows, columns = own.sizes["teacher_node"], own.sizes["position"]
        shown = [0, rows - 1, columns - 1] if columns > 1.5 * rows else [0, columns - 1]
        ax.set_xticks(shown, labels=[str(n) for n in panels.node_numbers(shown)])
        ax.set_yticks([0, rows - 1], labels=[str(n) for n in panels.node_numbers([0, rows - 1])])
        ax.set(
            xlabel="student node, in the order of the teacher's; the matched first",
            ylabel=f"{symbol}, epoch {int(own['epoch'])}: teacher node",
        )

    return drawn


#: Panels by name: β* and H* of the lowest layer at the last epoch; select another with ``measured.sel``.
PANELS: dict[str, layout.Panel] = {symbol: _map(name, symbol) for name, symbol in _MOMENTS.items()}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with a column per layer; rows β* and H*, before and after; teacher nodes down, student nodes across."""
    rows: list[list[layout.Cell | None]] = []
    seed = measured["seed"].values[0]
    for name, epoch in itertools.product(_MOMENTS, measured["epoch"].values.tolist()):
        rows.append([])
        for at in measured["layer"].values.tolist():
            contrast = float(measured[f"contrast_{name}"].sel(epoch=epoch, layer=at, seed=seed))
            title = f"layer {at}, ratio {contrast:.1f}"
            rows[-1].append(layout.Cell(f"{name} of layer {at}", {"epoch": epoch, "layer": at}, title))
    drawing = {
        f"{name} of layer {at}": _scaled(symbol, name, float(np.abs(measured[name].sel(layer=at)).max()))
        for name, symbol in _MOMENTS.items()
        for at in measured["layer"].values.tolist()
    }
    sizes = abs(measured[list(_MOMENTS)])
    over = ("teacher_node", "position")
    start = (sizes.isel(epoch=0).max(over) / sizes.max(("epoch", *over))).to_array().max("variable").values
    says = (
        f"β* and H* before and after training of seed {int(seed)}, over the largest entry of each layer at either "
        f"epoch (the largest at epoch 0: {', '.join(f'{100 * share:.2g}' for share in start)} % of it in layers 1 to "
        f"{len(start)}); ratio: the mean size of matched entries over that of all others, of the same seed; teacher "
        f"{captions.NODES}"
    )
    page = layout.arrange(measured, drawing, rows, says=says, spread="none", height=1.25, key=None, paper=EXPERIMENTS)
    page.body.colorbar(page.axes[0].images[0], ax=page.axes, label="entry over the layer's largest", aspect=40)
    return page


def _scaled(symbol: str, name: str, largest: float) -> layout.Panel:
    return lambda own, ax: PANELS[symbol](own.assign_attrs({f"largest {name}": largest}), ax)
