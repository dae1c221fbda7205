"""Copy or average over (n, k): the share of seeds in each class, and the phase boundaries, which need no seeds.

A complement to Simsek et al. (2023), Figure 4.  The boundaries are the n from which the perturbed n-copy is a minimum,
the n up to which the copy-average point is one, and the n from which the former has the smaller loss.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.studies.simsek2023 import described, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "copy or average: shares of seeds over (n, k) and seed-free borders"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), section 5 and Figure 4; the borders are computed here"


def _triangle(largest: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, k) for k in range(2, largest + 1) for n in range(1, k))


EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("phase-diagram-smoke", _triangle(3), seeds=2),
    "desk": flows("phase-diagram-desk", _triangle(10), seeds=10),
    "paper": flows("phase-diagram-paper", _triangle(20), seeds=20),
}

_BORDERS = {
    "perturbed_copy_from": ("perturbed n-copy a minimum above", "-"),
    "copy_average_to": ("copy-average a minimum below", "--"),
    "perturbed_copy_below_from": ("perturbed n-copy of smaller loss above", ":"),
}


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Share of seeds at the perturbed n-copy and at neither, over (n, k); the three borders over k, NaN for none."""
    ended = ends(archive)
    n, k = ended["n"].values, ended["k"].values
    sizes = {"n": np.arange(1, n.max() + 1), "k": np.arange(k.min(), k.max() + 1)}

    def table(values: xr.DataArray) -> np.ndarray:
        found = np.full((len(sizes["n"]), len(sizes["k"])), np.nan)
        found[n - 1, k - k.min()] = values
        return found

    perturbed = table(ended["index_perturbed_copy"]) == 0
    average = table(ended["index_copy_average"]) == 0
    # at n = 1 both are the one-neuron optimum
    below = table((ended["loss_perturbed_copy"] < ended["loss_copy_average"]) & (ended["n"] > 1)) == 1

    def border(holds: np.ndarray, nearest: np.ufunc, side: float) -> tuple[str, np.ndarray]:
        found = nearest.reduce(np.where(holds, sizes["n"][:, None] + side, np.nan), axis=0)
        return "k", found

    ds = xr.Dataset(
        {
            "perturbed_share": (("n", "k"), table((ended["class"] == "perturbed-copy").mean("seed"))),
            "other_share": (("n", "k"), table((ended["class"] == "other").mean("seed"))),
            "perturbed_copy_from": border(perturbed & (sizes["n"][:, None] > 1), np.fmin, -0.5),
            "copy_average_to": border(average, np.fmax, 0.5),
            "perturbed_copy_below_from": border(below, np.fmin, -0.5),
        },
        sizes,
    )
    texts = {
        "perturbed_share": "share of seeds at the perturbed n-copy",
        "other_share": "share of seeds at neither",
        **{name: f"{text} this n" for name, (text, _) in _BORDERS.items()},
    }
    return ds.assign({name: ds[name].assign_attrs(described(text)) for name, text in texts.items()})


#: Light to dark from averaging to copying, so that grey print shows it, too.
_SHARES = LinearSegmentedColormap.from_list("shares", ["#dbe9f6", "#08306b"])


def _diagram(measured: xr.Dataset, ax: Axes) -> None:
    """Share of seeds at the perturbed n-copy over (n, k), per cent of those at neither, and the seed-free borders."""
    k, n = measured["k"].values, measured["n"].values
    shares = measured["perturbed_share"]
    ax.pcolormesh(k, n, shares, cmap=_SHARES, vmin=0, vmax=1, shading="nearest", edgecolors="white", linewidth=0.3)
    for i, j in np.argwhere(measured["other_share"].values > 0):
        ax.text(
            k[j], n[i], f"{100 * measured['other_share'].values[i, j]:.0f}", ha="center", va="center", gid="in a field",
            fontsize=look.points(6), color="white" if float(shares[i, j]) > 0.5 else "black",
        )  # fmt: skip
    edges = np.append(k - 0.5, k[-1] + 0.5)
    colours = (look.PALETTE[1], look.PALETTE[2], look.PALETTE[6])
    for colour, (name, (text, style)) in zip(colours, _BORDERS.items(), strict=True):
        ax.stairs(
            measured[name].values, edges, baseline=None, color=colour, linewidth=look.points(1.3), linestyle=style,
            label=text,
        )  # fmt: skip
    ax.set(xlabel="teacher nodes k", ylabel="student nodes n")
    panels.whole_numbers(ax, "x", 8)
    panels.whole_numbers(ax, "y", 8)


#: The panel by name.
PANELS: dict[str, layout.Panel] = {"phase diagram": _diagram}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: light where every seed averages, dark where every seed copies; numbers: per cent that do neither."""
    says = (
        "Share of seeds that end at the perturbed n-copy (dark) rather than at the copy-average point (light); "
        "numbers: per cent of seeds at neither; borders, of which some coincide, follow from the Hessians' signatures "
        "and the losses and need no seed"
    )
    page = layout.arrange(
        measured, PANELS, [[layout.Cell("phase diagram")]], says=says, spread="none", columns=1, height=2.7,
        paper=EXPERIMENTS,
    )  # fmt: skip
    page.body.colorbar(
        ScalarMappable(Normalize(0, 1), _SHARES), ax=page.axes, label="share at the perturbed n-copy", aspect=30
    )
    return page
