"""Simsek et al. (2023), Figure 4: the loss at the end against n, with L*(k−n+1), the regimes and u_ij.

Where only the copy-average point is a minimum (green), every seed reaches L*(k−n+1); where only the perturbed n-copy is
(orange), every seed copies, at a larger or smaller loss; in between both are, and the start decides.  The background
shades follow from the Hessians' signatures, which need no seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, assert_never

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis.panels import PALETTE
from tsdyn.studies.simsek2023 import COLOURS, NAMES, at, cosines, described, draw_cosines, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "loss at the end of gradient flow against n, with the copy-average points'"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 4"


def _curves(teachers: tuple[int, ...], students: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The sizes (n, k) with every n < k for these teachers, and every k up to 2n for these students."""
    against_n = [(n, k) for k in teachers for n in range(1, k)]
    return tuple(dict.fromkeys(against_n + [(n, k) for n in students for k in range(n + 1, 2 * n + 1)]))


EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("loss-smoke", _curves((3,), (2,)), seeds=2),
    "desk": flows("loss-desk", _curves((8, 12), (4, 8, 12)), seeds=20),
    "paper": flows("loss-paper", _curves((8, 12, 16), (4, 8, 12, 16)), seeds=20),
}


def measure(archive: xr.Dataset) -> xr.Dataset:
    """Loss and class of every seed and what theory says, over points; u_ij of three students against the largest k
    that has every n."""
    wanted = ["loss", "loss_copy_average", "loss_perturbed_copy", "index_copy_average", "index_perturbed_copy", "class"]
    ended = ends(archive)
    ds = ended[wanted]
    ds["class"] = ds["class"].assign_attrs(described("class of the student at the end"))
    k = max(_whole(ended, "k"), default=int(ended["k"].max()))
    shown = sorted({max(1, round(k * part)) for part in (0.5, 0.75, 0.92)} & set(range(1, k)))
    maps = []
    for n in shown:
        u = cosines(at(ended, "erf", n, k)).isel(seed=0, drop=True).values
        maps.append(np.pad(u, ((0, shown[-1] - n), (0, 0)), constant_values=np.nan))
    ds["cosine"] = ("map_n", "node", "teacher_node"), np.array(maps), described(f"u_ij at the end, k = {k}, seed 0")
    ds = ds.assign_coords(map_n=shown)
    return ds.drop_vars([name for name in ds.coords if name not in ("seed", "n", "k", "map_n")])


def _whole(ds: xr.Dataset, fixed: Literal["n", "k"]) -> list[int]:
    """Values of k for which every n < k is present, or of n for which every k up to 2n is."""
    pairs = list(zip(ds["n"].values.tolist(), ds["k"].values.tolist(), strict=True))
    match fixed:
        case "k":
            teachers = sorted({k for _, k in pairs})
            return [k for k in teachers if k > 2 and {n for n, o in pairs if o == k} >= set(range(1, k))]
        case "n":
            return [
                n
                for n in sorted({n for n, _ in pairs})
                if n > 1
                and (n, 2 * n) in pairs
                and (n, n + 1) in pairs
                and {k for m, k in pairs if m == n} >= set(range(n + 1, 2 * n + 1))
            ]
        case other:
            assert_never(other)


def draw(measured: xr.Dataset) -> Figure:
    """Loss against n for each k; below it the distance from L*(k−n+1) for each n, then u_ij."""
    teachers, students = _whole(measured, "k"), _whole(measured, "n")
    columns = max(len(teachers), 2)
    figure = Figure(figsize=(3.4 * columns, 5.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for ax, k in zip(top.subplots(1, columns, squeeze=False)[0], teachers, strict=False):
        one = measured.isel(point=np.flatnonzero(measured["k"] == k)).sortby("n")
        _panel(one, "n", ax)
        ax.set_title(f"teacher of k = {k}")
    top.axes[0].legend(frameon=False, fontsize="x-small")
    for ax in top.axes[len(teachers) :]:
        ax.set_axis_off()
    left, right = bottom.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.1])[0]
    ax = left.subplots()
    for colour, n in zip(PALETTE, students, strict=False):
        one = measured.isel(point=np.flatnonzero((measured["n"] == n) & (measured["k"] <= 2 * n))).sortby("k")
        excess = 100 * (one["loss"] / one["loss_copy_average"] - 1)
        ratio = (one["n"] / one["k"]).broadcast_like(excess)
        ax.plot(
            ratio.values.ravel(), excess.values.ravel(), "o", color=colour, markersize=3, alpha=0.3, markeredgewidth=0
        )
        ax.plot(one["n"] / one["k"], excess.median("seed"), "-", color=colour, linewidth=1.2, label=f"n = {n}")
    ax.axhline(0, color="black", linestyle="--", linewidth=1)
    ax.set(xlabel="n / k, every k up to 2n", ylabel="loss above L*(k−n+1), %", ylim=(-25, 12))
    ax.legend(frameon=False, fontsize="small", title="median of seeds", title_fontsize="small")
    maps = right.subplots(len(measured["map_n"]), 1, squeeze=False)[:, 0]
    for ax, n in zip(maps, measured["map_n"].values, strict=True):
        u = measured["cosine"].sel(map_n=n).isel(node=slice(0, int(n)))
        draw_cosines(u, ax, labels=False)
        ax.set_ylabel(f"n = {n}", rotation=0, ha="right", va="center")
    maps[-1].set_xlabel(str(measured["cosine"].attrs["long_name"]))
    return figure


def _panel(one: xr.Dataset, along: str, ax: Axes) -> None:
    # at n = 1 both points are the one-neuron optimum
    average, perturbed = one["index_copy_average"] == 0, (one["index_perturbed_copy"] == 0) & (one["n"] > 1)
    for x, a, p in zip(one[along].values, average.values, perturbed.values, strict=True):
        ax.axvspan(x - 0.5, x + 0.5, color=COLOURS["copy-average"], alpha=0.18 * a, linewidth=0)
        ax.axvspan(x - 0.5, x + 0.5, color=COLOURS["perturbed-copy"], alpha=0.25 * p, linewidth=0)
    x = one[along].values
    ax.plot(x, one["loss_copy_average"], "--", color="black", linewidth=1, label="L*(k−n+1)")
    ax.plot(x, one["loss_perturbed_copy"], ":", color="black", linewidth=1, label="perturbed n-copy")
    places = one[along].broadcast_like(one["loss"])
    for kind, colour in COLOURS.items():
        here = (one["class"] == kind).values
        if here.any():
            ax.plot(
                places.values[here],
                one["loss"].values[here],
                "o",
                color=colour,
                markersize=5,
                alpha=0.5,
                markeredgewidth=0,
                label=f"seeds: {NAMES[kind]}",
            )
    ax.plot(x, one["loss"].mean("seed"), "_", color="black", markersize=9, label="mean over seeds")
    ax.set(xlabel="student nodes n", ylabel="loss at the end", xlim=(x.min() - 0.5, x.max() + 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
