"""Simsek et al. (2023), Figure 3: one neuron against k teacher neurons: output maps in two dimensions, error over k.

The upper map is the teacher of two nodes, the lower the neuron at which the flow ends; then the error, with seeds as
points on the closed form.
The error grows about linearly with k for bounded σ and quadratically for relu.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tsdyn.analysis.panels import PALETTE
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


def measure(archive: xr.Dataset) -> xr.Dataset:
    """Maps of teacher and student for k = 2 over x₁, x₂; error of every seed and of the one-neuron optimum over k."""
    x = torch.linspace(-_EDGE, _EDGE, _PIXELS, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x)
    ended = ends(archive)
    names = list(dict.fromkeys(ended["activation"].values.tolist()))
    maps = []
    for name in names:
        one = at(ended, name, 1, 2)
        one = one.isel(seed=int(one["loss"].argmin("seed")))
        w, a = (torch.from_numpy(one[key].values.copy()) for key in ("weight", "outgoing"))
        teacher = Network([torch.eye(2, dtype=w.dtype), torch.ones(1, 2, dtype=w.dtype)], activation=name)
        student = Network([w[:, :2], a[None]], activation=name)
        maps.append([net(grid)[:, 0].reshape(_PIXELS, _PIXELS).numpy() for net in (teacher, student)])
    ds = xr.Dataset(
        {
            "output": (("map_activation", "role", "x1", "x2"), np.array(maps), described("output, k = 2")),
            "error": ended["loss"].assign_attrs(described("error L of one neuron")),
            "one_neuron_error": ended["loss_copy_average"].assign_attrs(described("L*(k)")),
        },
        {"map_activation": names, "role": ["teacher", "student"], "x1": x.numpy(), "x2": x.numpy()},
    )
    return ds.drop_vars([name for name in ended.coords if name not in ("seed", "activation", "k") and name in ds])


def draw(measured: xr.Dataset) -> Figure:
    """Figure with maps on the left and the error on the right."""
    names = measured["map_activation"].values
    figure = Figure(figsize=(1.35 * len(names) + 3.4, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1.35 * len(names), 3.4])[0]
    panels = left.subplots(2, len(names), squeeze=False, sharex=True, sharey=True)
    for column, name in zip(panels.T, names, strict=True):
        one = measured["output"].sel(map_activation=name)
        limits = {"vmin": float(one.min()), "vmax": float(one.max())}
        for ax, role in zip(column, ("teacher", "student"), strict=True):
            ax.imshow(one.sel(role=role).T, origin="lower", extent=(-_EDGE, _EDGE) * 2, cmap="viridis", **limits)
            ax.contour(one["x1"], one["x2"], one.sel(role=role).T, 7, colors="white", linewidths=0.5)
            ax.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        column[0].set_title(name)
    for ax, text in zip(panels[:, 0], ("teacher, k = 2", "one neuron"), strict=True):
        ax.set_ylabel(f"{text}\n$x_2$")
    for ax in panels[-1]:
        ax.set_xlabel("$x_1$")
    ax = right.subplots()
    for colour, name in zip(PALETTE, names, strict=False):
        errors = measured.isel(point=np.flatnonzero((measured["activation"] == name) & (measured["k"] > 1)))
        ax.loglog(errors["k"], errors["one_neuron_error"], color=colour, linewidth=1, label=name)
        k = errors["k"].broadcast_like(errors["error"])
        ax.loglog(k.values.ravel(), errors["error"].values.ravel(), "o", color=colour, markersize=3, alpha=0.6)
    ax.set(xlabel="teacher nodes k", ylabel="error L*(k)")
    ticks = sorted({2, int(measured["k"].max())} | {k for k in (4, 8) if k < measured["k"].max()})
    ax.set_xticks(ticks, labels=list(map(str, ticks)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize="small")
    return figure
