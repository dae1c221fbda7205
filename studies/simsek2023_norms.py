"""Simsek et al. (2023), Figure 5: norm and outgoing weight of one neuron against k teacher neurons.

Every seed ends at the one-neuron optimum; the norm falls with k (erf: 1/√(2k−1)) while the outgoing weight grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.studies.simsek2023 import described, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "norms of the one-neuron network against k"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 5"

_SIZES = tuple((1, k) for k in range(2, 11))
_ALL = ("relu", "softplus", "sigmoid", "tanh", "erf")

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("norms-smoke", ((1, 2), (1, 4)), ("erf",), seeds=2),
    # mixtures' interactions cost a thousand times as much as erf's: every second k
    "desk": flows("norms-desk", ((1, 2), (1, 4), (1, 6), (1, 8), (1, 10)), _ALL, seeds=20),
    "paper": flows("norms-paper", _SIZES, _ALL, seeds=20),
}


def relu_product(k: float) -> float:
    """‖w*‖ a* of one relu neuron against k: k g(1/√k) / g(1), with E[σ(u) σ(v)] = g(ρ) of unit u, v of correlation ρ.

    g(ρ) = (√(1 − ρ²) + (π − arccos ρ) ρ) / (2 π); the optimum is the least squares multiple along v₁ + ... + v_k.
    """
    rho = 1 / np.sqrt(k)
    return float(k * (np.sqrt(1 - rho**2) + (np.pi - np.arccos(rho)) * rho) / np.pi)


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """|w| and |a| of the flows' ends, their product, and those of the one-neuron optimum, over (activation, k)."""
    ended = ends(archive)
    norm = (ended["weight"].isel(node=0) ** 2).sum("input_node") ** 0.5
    outgoing = abs(ended["outgoing"].isel(node=0))
    values = {
        "product": (norm * outgoing, "‖w*‖ a*"),
        "norm": (norm, "‖w*‖"),
        "outgoing": (outgoing, "a*"),
        "one_neuron_product": (ended["one_neuron_norm"] * ended["one_neuron_outgoing"], "‖w‖ a of the optimum"),
        "one_neuron_norm": (ended["one_neuron_norm"], "‖w‖ of the one-neuron optimum"),
        "one_neuron_outgoing": (ended["one_neuron_outgoing"], "a of the one-neuron optimum"),
    }
    ds = xr.Dataset({name: array.assign_attrs(described(text)) for name, (array, text) in values.items()})
    return ds.drop_vars([name for name in ds.coords if name not in ("seed", "activation", "k")])


def _against_k(quantity: str) -> layout.Panel:
    """Panel of one quantity: seeds as marks, the one-neuron optimum as a line, of every activation; with guides."""

    def drawn(measured: xr.Dataset, ax: Axes) -> None:
        names = dict.fromkeys(measured["activation"].values.tolist())
        ks = np.linspace(float(measured["k"].min()), float(measured["k"].max()), 50)
        guide: dict[str, Any] = {"color": look.GUIDE, "linewidth": look.points(0.9)}
        for position, name in enumerate(names):
            one = measured.isel(point=np.flatnonzero(measured["activation"] == name)).sortby("k")
            if name == "relu" and quantity != "product":
                continue  # only the product is determined: a relu neuron may shift its scale from w to a
            line = [relu_product(k) for k in one["k"].values] if name == "relu" else one[f"one_neuron_{quantity}"]
            colour = panels.colour(position)
            ax.plot(one["k"], line, color=colour, linewidth=look.points(1))
            mark: dict[str, Any] = {
                "color": colour,
                "marker": "osD^v"[position],
                "markersize": look.points(2.6),
                "markeredgewidth": 0,
            }
            ax.plot([], [], linewidth=look.points(1), label=name, **mark)  # the legend shows the mark, too
            k = one["k"].broadcast_like(one[quantity]) + 0.08 * (position - len(names) / 2)
            alive = one["product"] > 1e-3
            ax.plot(
                k.where(alive).values.ravel(), one[quantity].where(alive).values.ravel(), linestyle="", **mark
            )  # fmt: skip
        if quantity == "product":
            ax.plot(ks, np.sqrt(ks), linestyle="--", **guide, label="√k")
        if quantity == "norm":
            ax.plot(ks, 1 / np.sqrt(ks), linestyle=":", **guide, label="1/√k")
        if quantity == "outgoing":
            ax.plot(ks, ks, linestyle="-.", **guide, label="k")
        ax.set(xlabel="teacher nodes k", ylabel=str(measured[quantity].attrs["long_name"]), ylim=(0, None))
        panels.whole_numbers(ax)

    return drawn


#: Panels by name.
PANELS: dict[str, layout.Panel] = {
    "‖w*‖ a*": _against_k("product"), "‖w*‖": _against_k("norm"), "a*": _against_k("outgoing")
}  # fmt: skip


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure with three panels: ‖w*‖ a*, ‖w*‖ and a* against k; seeds as marks, the optimum as a line."""
    died = int((measured["product"] <= 1e-3).sum())
    says = (
        "Norm and outgoing weight of one neuron against k: marks are seeds (activations side by side), lines the "
        "one-neuron optimum, of relu the exact product, its single factors depending on the start; "
        "those of erf and sigmoid lie on a* = k" + (f"; {died} relu seeds died and are not drawn" if died else "")
    )
    cells = [layout.Cell(name) for name in PANELS]
    return layout.arrange(measured, PANELS, [cells], says=says, spread="none", height=2.0, paper=EXPERIMENTS)
