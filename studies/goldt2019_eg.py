"""Goldt et al. (2019): generalization error of online learning, simulated in N dimensions and from the equation.

A student that trains only its first layer stays on a plateau until its nodes specialize; training both layers shortens
the plateau.  Simulations scatter about the equation by 1/√N, most where they leave the plateau.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tsdyn.analysis.panels import PALETTE

from tsdyn.experiment.experiment import Experiment

TITLE = "generalization error of online learning: simulation against equation"
SOURCE = "Goldt et al. 2019 (arXiv 1906.08632), Figure 1; Saad & Solla 1995"

TEACHER_NODES = 2
#: ``online.layers`` → title of its panel.
_TITLES = {"first": "first layer learns", "both": "both layers learn"}


def _online(name: str, nodes: tuple[int, ...], *, inputs: int, seeds: int, **online: int | float) -> Experiment:
    widths = [[inputs, K, 1] for K in nodes]
    return Experiment(
        kind="online",
        name=name,
        seeds=seeds,
        teacher={"widths": [inputs, TEACHER_NODES, 1], "init": "gaussian"},
        student={"widths": widths[0], "activation": "erf"},
        training={"learning_rate": 0.5},
        online=online,
        sweep={"online.layers": ["first", "both"], "student.widths": widths},
    )


EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _online("goldt-eg-smoke", (2,), inputs=60, last=10.0, points=12, seeds=2),
    "desk": _online("goldt-eg-desk", (2, 4), inputs=500, noise=0.01, last=300.0, seeds=5),
    "paper": _online("goldt-eg-paper", (2, 4, 8), inputs=784, noise=0.01, last=1000.0, seeds=10),
}


def measure(archive: xr.Dataset) -> xr.Dataset:
    """eg of simulation and equation over (layers, nodes, seed, alpha), α > 0."""
    ds = archive[["eg", "eg_equation"]].rename(eg="eg_simulation", widths="nodes").load()
    ds = ds.where(ds["alpha"] > 0, drop=True)
    nodes = archive["width"].sel(layer=1).isel(layers=0).values
    return ds.drop_vars([name for name in ds.coords if name not in ds.dims]).assign_coords(nodes=nodes)


def draw(measured: xr.Dataset) -> Figure:
    """One panel per choice of learning layers: lines are the equation, points the simulation from the same start."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    layers = measured["layers"].values.tolist()
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for ax, layer in zip(panels, layers, strict=True):
        for colour, K in zip(PALETTE, measured["nodes"].values.tolist(), strict=False):
            one = measured.sel(layers=layer, nodes=K).transpose("alpha", "seed")
            alpha = one["alpha"].values
            shown = np.unique(np.linspace(0, len(alpha) - 1, 25).astype(int))
            ax.plot(alpha, one["eg_equation"].values, color=colour, linewidth=1)
            ax.plot(alpha[shown], one["eg_simulation"].values[shown], "o", color=colour, markersize=2.5, alpha=0.6)
        title = _TITLES[layer]
        ax.set(xscale="log", yscale="log", xlabel="α = steps / N", title=title)
    panels[0].set_ylabel("generalization error")
    nodes = measured["nodes"].values.tolist()
    handles = [Line2D([], [], color=c, label=f"K = {K}") for c, K in zip(PALETTE, nodes, strict=False)]
    handles += [
        Line2D([], [], color="0.3", linewidth=1, label="equation"),
        Line2D([], [], color="0.3", marker="o", markersize=3, linestyle="", label="simulation"),
    ]
    panels[-1].legend(handles=handles, frameon=False)
    return figure
