"""Simsek et al. (2023), Figure 5: norm and outgoing weight of one neuron against k teacher neurons.

Every seed ends at the one-neuron optimum; the norm falls with k (erf: 1/√(2k−1)) while the outgoing weight grows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis.panels import PALETTE
from tsdyn.studies.simsek2023 import described, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "norms of the one-neuron network against k"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 5"

_SIZES = tuple((1, k) for k in range(2, 11))
_SMOOTH = ("erf", "tanh", "sigmoid", "softplus")

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("norms-smoke", ((1, 2), (1, 4)), ("erf",), seeds=2),
    # mixtures' interactions cost a thousand times as much as erf's, so 5 seeds of each
    "desk": flows("norms-desk", _SIZES, ("erf", "tanh"), seeds=20),
    "paper": flows("norms-paper", _SIZES, _SMOOTH, seeds=20),
}


def measure(archive: xr.Dataset) -> xr.Dataset:
    """|w| and |a| of the flows' ends and of the one-neuron optimum, over (activation, k)."""
    ended = ends(archive)
    values = {
        "norm": (ended["weight"].isel(node=0) ** 2).sum("input_node") ** 0.5,
        "outgoing": abs(ended["outgoing"].isel(node=0)),
        "one_neuron_norm": ended["one_neuron_norm"],
        "one_neuron_outgoing": ended["one_neuron_outgoing"],
    }
    texts = ("|w|", "|a|", "|w| of the one-neuron optimum", "a of the one-neuron optimum")
    ds = xr.Dataset(
        {name: array.assign_attrs(described(text)) for (name, array), text in zip(values.items(), texts, strict=True)}
    )
    return ds.drop_vars([name for name in ds.coords if name not in ("seed", "activation", "k")])


def draw(measured: xr.Dataset) -> Figure:
    """Figure with seeds as points and the optimum as a line."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    names = dict.fromkeys(measured["activation"].values.tolist())
    for ax, quantity in zip(figure.subplots(1, 2), ("norm", "outgoing"), strict=True):
        for colour, name in zip(PALETTE, names, strict=False):
            one = measured.isel(point=np.flatnonzero(measured["activation"] == name))
            ax.plot(one["k"], one[f"one_neuron_{quantity}"], color=colour, linewidth=1, label=name)
            k = one["k"].broadcast_like(one[quantity])
            ax.plot(k.values.ravel(), one[quantity].values.ravel(), "o", color=colour, markersize=3, alpha=0.5)
        ax.set(xlabel="teacher nodes k", ylabel=measured[quantity].attrs["long_name"], ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(frameon=False)
    return figure
