"""Simsek et al. (2023), Figure 1: two student nodes on their way to copy one teacher node and average the other two.

On the left the incoming weights of n = 2 nodes against k = 3, seen along (1, 1, 1): teacher nodes are the corners of a
triangle, and the average of two lies opposite to the third.  Then the loss, with that of the copy-average point; relu
falls below it, since its critical point is only near that point.  On the right u_ij at the end for n = 4, k = 8.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tsdyn.analysis.panels import PALETTE
from tsdyn.studies.simsek2023 import COLOURS, at, cosines, described, draw_cosines, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "trajectories of gradient flow and order parameters at convergence"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 1"

_SIZES = ((2, 3), (4, 8))
_TIMES = {"first": 1e-2, "last": 1e4, "number": 200}

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("trajectories-smoke", _SIZES, ("erf", "relu"), seeds=2, times=_TIMES | {"number": 20}),
    "desk": flows("trajectories-desk", _SIZES, ("erf", "relu"), seeds=10, times=_TIMES),
    "paper": flows("trajectories-paper", _SIZES, ("erf", "relu"), seeds=20, times=_TIMES),
}

#: The plane orthogonal to (1, 1, 1): axes whose projections are the corners of an upright triangle.
_PLANE = np.stack([np.array([-1, 0, 1]) / np.sqrt(2), np.array([-1, 2, -1]) / np.sqrt(6)])


def measure(archive: xr.Dataset) -> xr.Dataset:
    """Paths in the plane orthogonal to v₁ + v₂ + v₃, losses along them, u_ij of the seed with the least loss."""
    path = archive[["weight", "population_loss"]].sel(layer=1, drop=True).load()
    path = path.where(path["time"] > 0, drop=True)
    ended = ends(archive).assign(path_weight=path["weight"], path_loss=path["population_loss"])
    names = list(dict.fromkeys(ended["activation"].values.tolist()))
    rows = []
    for name in names:
        small, large = at(ended, name, 2, 3), at(ended, name, 4, 8)
        w = small["path_weight"].isel(input_node=slice(0, 3)) * np.sign(small["outgoing"])
        best = int(large["loss"].argmin("seed"))
        one = {
            "path": xr.dot(w, xr.DataArray(_PLANE, dims=("axis", "input_node")), dim="input_node"),
            "path_loss": small["path_loss"],
            "copies_and_averages": small["class"] == "copy-average",
            "loss_copy_average": small["loss_copy_average"],
            "cosine": cosines(large).isel(seed=best, drop=True).rename(node="larger_node"),
            "best_loss": large["loss"].isel(seed=best, drop=True),
        }
        rows.append(xr.Dataset({key: array.drop_vars(_labels(array)) for key, array in one.items()}))
    ds = xr.concat(
        rows, dim="activation", data_vars="all", coords="minimal", compat="override", join="exact", combine_attrs="drop"
    ).assign_coords(activation=names)
    texts = {
        "path": "incoming weights across (1, 1, 1), times the sign of a",
        "path_loss": "loss L along the flow, n = 2, k = 3",
        "copies_and_averages": "whether the seed ends at the copy-average point",
        "loss_copy_average": "L*(2)",
        "cosine": "u_ij at the end, n = 4, k = 8, the seed of least loss",
        "best_loss": "its loss",
    }
    return ds.assign({key: ds[key].assign_attrs(described(text)) for key, text in texts.items()})


def _labels(array: xr.DataArray) -> list[str]:
    return [str(name) for name in array.coords if name not in ("seed", "time")]


def draw(measured: xr.Dataset) -> Figure:
    """Figure with one row per activation."""
    names = measured["activation"].values
    figure = Figure(figsize=(8.4, 2.7 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 3, squeeze=False, width_ratios=[1, 1.25, 1.25])
    for (left, middle, right), name in zip(panels, names, strict=True):
        one = measured.sel(activation=name)
        for seed in one["seed"].values:
            run = one.sel(seed=seed)
            colour = COLOURS["copy-average" if run["copies_and_averages"] else "other"]
            for node in range(run.sizes["node"]):
                x, y = run["path"].isel(node=node).transpose("axis", "time").dropna("time").values
                left.plot(x, y, color=colour, linewidth=0.8, alpha=0.7)
                left.plot(x[0], y[0], ".", color=colour, markersize=2)
                left.plot(x[-1], y[-1], "o", color=colour, markersize=4, zorder=3)
            middle.loglog(run["time"], run["path_loss"], color=colour, linewidth=0.9)
        for j, corner in enumerate(_PLANE.T, start=1):
            left.annotate("", corner, (0, 0), arrowprops={"arrowstyle": "->", "color": PALETTE[0]})
            left.annotate(f"v{j}", corner * 1.45, color=PALETTE[0], ha="center", va="center")
        edge = 1.1 * max(1.1, float(abs(one["path"]).max()))
        left.set(
            aspect="equal",
            xlim=(-edge, edge),
            ylim=(-edge, edge),
            xticks=[],
            yticks=[],
            title=f"{name}: w, n = 2, k = 3",
        )
        middle.axhline(float(one["loss_copy_average"]), color="black", linestyle="--", linewidth=0.8)
        middle.set(xlabel="time", ylabel="loss", title=f"{one.sizes['seed']} seeds, dashed L*(2)")
        middle.yaxis.set_minor_formatter(NullFormatter())
        draw_cosines(one["cosine"], right)
        right.set_title(f"u, n = 4, k = 8, loss {float(one['best_loss']):.4f}")
    return figure
