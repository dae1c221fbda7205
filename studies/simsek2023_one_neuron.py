"""Simsek et al. (2023), Figure 3: one neuron against k teacher neurons: output maps in two dimensions, error over k.

The upper map is the teacher of two nodes, the lower the neuron at which the flow ends; then the error, with seeds as
points on the closed form.
The error grows about linearly with k for bounded σ and quadratically for relu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.studies.simsek2023 import at, described, ends, flows

from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network

TITLE = "one neuron: output maps and error against k"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 3"

_ACTIVATIONS = ("erf", "sigmoid", "tanh", "softplus", "relu")
_EDGE, _PIXELS = 3.0, 61

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("one-neuron-smoke", ((1, 2), (1, 4)), ("erf", "relu"), seeds=2),
    "desk": flows("one-neuron-desk", tuple((1, k) for k in (1, 2, 3, 4, 6, 8, 12)), _ACTIVATIONS, seeds=3),
    "paper": flows("one-neuron-paper", tuple((1, k) for k in range(1, 17)), _ACTIVATIONS, seeds=20),
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Maps of teacher and student for k = 2 over x₁, x₂; error of every seed and of the one-neuron optimum over k."""
    x = torch.linspace(-_EDGE, _EDGE, _PIXELS, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x)
    ended = ends(archive)
    names = list(dict.fromkeys(ended["activation"].values.tolist()))
    maps, optima = [], []
    for name in names:
        one = at(ended, name, 1, 2)
        one = one.isel(seed=int(one["loss"].argmin("seed")))
        w, a = (torch.from_numpy(one[key].values.copy()) for key in ("weight", "outgoing"))
        optima.append((w[0, :2] * a[0].sign()).numpy())
        teacher = Network([torch.eye(2, dtype=w.dtype), torch.ones(1, 2, dtype=w.dtype)], activation=name)
        student = Network([w[:, :2], a[None]], activation=name)
        maps.append([net(grid)[:, 0].reshape(_PIXELS, _PIXELS).numpy() for net in (teacher, student)])
    ds = xr.Dataset(
        {
            "output": (("map_activation", "role", "x1", "x2"), np.array(maps), described("output, k = 2")),
            "optimum": (("map_activation", "axis"), np.array(optima), described("incoming weight w* of the neuron")),
            "error": ended["loss"].assign_attrs(described("error L of one neuron")),
            "one_neuron_error": ended["loss_copy_average"].assign_attrs(described("L*(k)")),
        },
        {"map_activation": names, "role": ["teacher", "student"], "x1": x.numpy(), "x2": x.numpy()},
    )
    return ds.drop_vars([name for name in ended.coords if name not in ("seed", "activation", "k") and name in ds])


def _plane(role: str) -> layout.Panel:
    """Panel of the output of teacher or student in the plane, with v₁, v₂ or w* marked."""

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        one = measured.isel(map_activation=0) if "map_activation" in measured.dims else measured
        own = one["output"]
        limits: dict[str, Any] = {"vmin": float(own.min()), "vmax": float(own.max())}
        shown = own.sel(role=role).T
        ax.imshow(shown, origin="lower", extent=(-_EDGE, _EDGE) * 2, cmap="viridis", **limits)
        # of relu a quarter of the plane is at the least output: a contour there would follow rounding
        levels = [v for v in MaxNLocator(7).tick_values(limits["vmin"], limits["vmax"]) if v > limits["vmin"] + 1e-9]
        ax.contour(own["x1"], own["x2"], shown, levels, colors="white", linewidths=look.points(0.4), linestyles="solid")
        marked = (
            [(1.0, 0.0, "v₁"), (0.0, 1.0, "v₂")] if role == "teacher" else [(*one["optimum"].values.tolist(), "w*")]
        )
        for x, y, name in marked:
            ax.plot([0, x], [0, y], color="white", linewidth=look.points(0.9), gid="in a field")
            ax.plot(x, y, "o", color="white", markeredgecolor="black", markersize=look.points(3), gid="in a field")
            ax.annotate(
                name, (x, y), (3, 3), textcoords="offset points", color="black", size=look.points(7), gid="in a field",
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0},
            )  # fmt: skip
        ax.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2], xlabel="x₁", ylabel="x₂")

    return drawn


def _errors(measured: xr.Dataset, ax: Axes) -> None:
    """Error against k: seeds as marks on the line of the one-neuron optimum; guides of slope 1 and 2."""
    names = measured["map_activation"].values.tolist()
    largest = float(measured["k"].max())
    for position, name in enumerate(names):
        errors = measured.isel(point=np.flatnonzero((measured["activation"] == name) & (measured["k"] > 1))).sortby("k")
        colour = panels.colour(position)
        line: dict[str, Any] = {"color": colour, "linewidth": look.points(1)}
        ax.plot(errors["k"], errors["one_neuron_error"], **line)
        shape = panels.mark(position)
        ax.plot([], [], marker=shape, markersize=look.points(2.6), label=name, **line)  # the legend shows the mark, too
        k = errors["k"].broadcast_like(errors["error"])
        died = errors["error"] > 1.05 * errors["one_neuron_error"]
        for chosen, face in ((~died, colour), (died, "none")):
            ax.plot(
                k.where(chosen).values.ravel(), errors["error"].where(chosen).values.ravel(), color=colour,
                marker=shape, linestyle="", markersize=look.points(2.6), markerfacecolor=face,
                markeredgewidth=look.points(0.6),
            )  # fmt: skip
    layout.decades(ax)
    layout.decades(ax, "x")
    ks = [float(k) for k in np.unique(measured["k"]) if k > 1]
    ax.set_xticks([k for k in ks if len(ks) <= 7 or k in (2, 3, 4, 6, 8, 12, 16)])
    ax.set_xticks([], minor=True)
    low, high = ax.get_ylim()
    for slope, style in ((1, "--"), (2, ":")):
        ends = np.array([2.0, largest])
        start = (low * high) ** 0.5 / largest**slope * largest ** (slope / 2)
        ax.plot(
            ends,
            start * ends**slope,
            color=look.GUIDE,
            linestyle=style,
            linewidth=look.points(0.9),
            label=f"slope {slope}",
        )
    ax.set(xlabel="teacher nodes k", ylabel="error L*(k)")


#: Panels by name; maps are of the first activation unless selected.
PANELS: dict[str, layout.Panel] = {
    "teacher": _plane("teacher"), "one neuron": _plane("student"), "error against k": _errors
}  # fmt: skip


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with the maps of each activation above, their outputs' bars, and the error against k below."""
    names = measured["map_activation"].values.tolist()
    page = look.page(2, 4.9)
    above, below = page.body.subfigures(2, 1, height_ratios=(1.25, 1), squeeze=False)[:, 0]
    cells = above.subplots(2, len(names), squeeze=False, sharex=True, sharey=True)
    letters = iter("ABCDEFGHIJKLMNOP")
    for column, name in zip(cells.T, names, strict=True):
        for ax, role in zip(column, ("teacher", "one neuron"), strict=True):
            PANELS[role](measured.sel(map_activation=name), ax)
            layout.heading(ax, name if role == "teacher" else "one neuron", next(letters))
            ax.label_outer()
        bar = above.colorbar(column[0].images[0], ax=column, location="bottom", aspect=12, pad=0.02, label="output")
        bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes = below.subplots(1, 2, width_ratios=(2.2, 1))
    axes[1].set_axis_off()
    _errors(measured, axes[0])
    layout.heading(axes[0], "error of one neuron", next(letters))
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center left")
    says = (
        "Output of the teacher of k = 2 and of the one neuron at which the flow ends (colour and white contours: "
        "output), with v₁, v₂, the incoming weights of teacher nodes 1 and 2, and w*, the neuron's; below, the error "
        "against k: marks are seeds, lines the one-neuron optimum, hollow marks seeds that died (relu) and stay at the "
        "loss of a zero student"
    )
    return layout.told(page, measured, says, "points", EXPERIMENTS)
