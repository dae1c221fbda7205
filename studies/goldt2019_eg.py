"""Goldt et al. (2019): generalization error of online learning, simulated in N dimensions and from the equation.

A student that trains only its first layer stays on a plateau until its nodes specialize; training both layers shortens
the plateau.  Simulations scatter about the equation by 1/√N, most where they leave the plateau.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look

from tsdyn.archive.selecting import experiment_of
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


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """eg of simulation and equation over (layers, nodes, seed, alpha), α > 0."""
    ds = archive[["eg", "eg_equation"]].rename(eg="eg_simulation", widths="nodes").load()
    ds = ds.where(ds["alpha"] > 0, drop=True)
    nodes = archive["width"].sel(layer=1).isel(layers=0).values
    return ds.drop_vars([name for name in ds.coords if name not in ds.dims]).assign_coords(nodes=nodes)


def _errors(measured: xr.Dataset, ax: Axes) -> None:
    """Simulation (points, every seed) and equation (lines) against α, of one choice of learning layers."""
    one = measured.isel(layers=0) if "layers" in measured.dims else measured
    for position, K in enumerate(one["nodes"].values.tolist()):
        own, colour = one.sel(nodes=K).transpose("alpha", "seed"), panels.colour(position)
        alpha = own["alpha"].values
        shown = np.unique(np.linspace(0, len(alpha) - 1, 18).astype(int))
        for place, seed in enumerate(own["seed"].values):
            which = shown[place % 3 :: 3] if len(shown) > 9 else shown  # seeds take turns, so that each is seen
            ax.plot(
                alpha[which], own["eg_simulation"].sel(seed=seed).values[which], linestyle="", color=colour,
                marker="osD^vP*X"[place % 8], markersize=look.points(2.6), markerfacecolor="none",
                markeredgewidth=look.points(0.6),
            )  # fmt: skip
            ax.plot(
                alpha, own["eg_equation"].sel(seed=seed), color=colour, linewidth=look.points(0.8),
                linestyle=panels.STYLES[position % 4], label=None if place else f"K = {K} student nodes",
            )  # fmt: skip
    layout.decades(ax, "x")
    ax.set_xlabel("α = steps / N")
    layout.decades(ax)
    ax.set_ylabel("generalization error")


#: The panel by name; of the first choice of learning layers unless selected.
PANELS: dict[str, layout.Panel] = {"generalization error": _errors}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """One panel per choice of learning layers: lines are the equation, points the simulation from the same start."""
    cells = [
        layout.Cell("generalization error", {"layers": at}, _TITLES[at]) for at in measured["layers"].values.tolist()
    ]
    says = (
        f"Generalization error of online learning in N = d dimensions, M = {TEACHER_NODES} teacher nodes, against the "
        "number of steps over N: simulation (marks, a shape per seed; seeds take turns along a curve) and equation "
        "(lines) from the same starts, every seed"
    )
    page = layout.arrange(
        measured, PANELS, [cells], says=says, spread="none", share_x=True, share_y=True, columns=2, height=2.2,
        paper=EXPERIMENTS,
    )  # fmt: skip
    told = experiment_of(measured) if "experiment" in measured.attrs else None
    if told is not None:
        page.say(f"{page.caption} Output noise {told.online.noise:g}.")
    return page
