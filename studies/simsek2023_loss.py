"""Simsek et al. (2023), Figure 4: the loss at the end against k, with L*(k−n+1), the regimes and u_ij.

The regimes say where the seeds end: all at the copy-average point, at L*(k−n+1); some there and some at the perturbed
n-copy; or all at the latter, at a loss that is still higher, or lower.  A few seeds end at neither point, on a
degenerate plateau such as L*(3), where three teacher nodes share a neuron; they do not count.  Which of the two points
are minima needs no seed, and is another thing: where seeds always average, the perturbed copy may be a minimum, too
(`simsek2023_phase_diagram`).

"Perturbed copy, still higher" was found for wide students only.  At the first k at which the perturbed copy is the
higher one, 7 of 20 seeds average for n = 8, 3 for n = 12 and for n = 16, none for n = 18; so n = 18 is run about there,
at `AROUND`.  It is a matter of seeds, since both points are minima there: of 100 seeds at (18, 25) one averages and one
ends at neither (docs/reproduction.md); of 20 each at (23, 31) and (26, 35), 4 and none average.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.style import PALETTE
from tsdyn.studies.simsek2023 import COLOURS, MARKS, NAMES, at, cosines, described, draw_cosines, ends, flows

from tsdyn.experiment.experiment import Experiment

TITLE = "loss at the end of gradient flow against k, with the copy-average points'"
SOURCE = "Simsek et al. 2023 (arXiv:2311.01644), Figure 4"


def _curves(teachers: tuple[int, ...], students: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The sizes (n, k) with every n < k for these teachers, and every k up to 2n for these students."""
    against_n = [(n, k) for k in teachers for n in range(1, k)]
    return tuple(dict.fromkeys(against_n + [(n, k) for n in students for k in range(n + 1, 2 * n + 1)]))


#: Sizes about the first k at which the perturbed copy of 18 nodes has the higher loss.
AROUND = ((18, 24), (18, 25), (18, 26))

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": flows("loss-smoke", _curves((3,), (2,)), seeds=2),
    "desk": flows("loss-desk", (*_curves((8, 12), (4, 8, 12)), *AROUND), seeds=20),
    "paper": flows("loss-paper", (*_curves((8, 12, 16), (4, 8, 12, 16)), *AROUND), seeds=20),
}


#: Where the seeds of one (n, k) end.
REGIMES = {
    "copy-average always": PALETTE[0],
    "copy-average or perturbed copy": PALETTE[3],
    "perturbed copy, still higher": PALETTE[1],
    "perturbed copy, lower": PALETTE[5],
}
_MARKS = dict(zip(REGIMES, "oDs^", strict=True))


def regime(point: xr.Dataset) -> str:
    """Regime of one (n, k): at which of the two points seeds end, and where all copy, which has the smaller loss."""
    found = set(point["class"].values.tolist()) - {"other"}
    if found != {"perturbed-copy"}:
        return "copy-average or perturbed copy" if "perturbed-copy" in found else "copy-average always"
    lower = float(point["loss_perturbed_copy"]) < float(point["loss_copy_average"])
    return "perturbed copy, lower" if lower else "perturbed copy, still higher"


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Loss and class of every seed, what theory says and the regime, over points; u_ij of one student per regime.

    The students of the examples are the widest of which there is one; ``example`` names n and k of each.
    """
    wanted = ["loss", "loss_copy_average", "loss_perturbed_copy", "index_copy_average", "index_perturbed_copy", "class"]
    ended = ends(archive)
    ds = ended[wanted]
    ds["class"] = ds["class"].assign_attrs(described("class of the student at the end"))
    found = [regime(ds.isel(point=i)) for i in range(ds.sizes["point"])]
    ds["regime"] = "point", found, described("points at which the seeds end")
    chosen = [max(_of(ds, name), key=lambda i: _interest(ds, i)) for name in REGIMES if _of(ds, name)]
    nodes, teachers = (max(int(ds[c][i]) for i in chosen) for c in ("n", "k"))
    maps = np.full((len(chosen), nodes, teachers), np.nan)
    for row, i in zip(maps, chosen, strict=True):
        n, k = int(ds["n"][i]), int(ds["k"][i])
        row[:n, :k] = cosines(at(ended, "erf", n, k)).isel(seed=0, drop=True).values
    ds["cosine"] = ("example", "node", "teacher_node"), maps, described("u_ij at the end, the first seed")
    ds = ds.assign_coords(example=chosen)
    return ds.drop_vars([name for name in ds.coords if name not in ("seed", "n", "k", "example")])


def _of(ds: xr.Dataset, name: str) -> list[int]:
    return [i for i in range(ds.sizes["point"]) if ds["regime"].values[i] == name and int(ds["n"][i]) > 1]


def _interest(ds: xr.Dataset, i: int) -> tuple[int, int, int]:
    """Examples in which the losses of seeds differ come first, then wide students against few more teacher nodes."""
    classes = len(set(ds["class"].values[i].tolist()))
    return (
        classes if ds["regime"].values[i] == "copy-average or perturbed copy" else 0,
        int(ds["n"][i]),
        -int(ds["k"][i]),
    )


def _curved(ds: xr.Dataset) -> list[int]:
    """Values of n > 1 of which two or more k up to 2n are present, without a gap, widest last."""
    own: dict[int, list[int]] = {}
    for n, k in zip(ds["n"].values.tolist(), ds["k"].values.tolist(), strict=True):
        if n > 1 and k <= 2 * n:
            own.setdefault(n, []).append(k)
    return [n for n, ks in sorted(own.items()) if len(ks) > 1 and max(ks) - min(ks) < len(ks)]


def _losses(measured: xr.Dataset, ax: Axes) -> None:
    """Mean loss of the seeds against k for each n, marks by regime, with L*(k−n+1) dashed."""
    for n in _curved(measured):
        one = measured.isel(point=np.flatnonzero((measured["n"] == n) & (measured["k"] <= 2 * n))).sortby("k")
        ax.plot(one["k"], one["loss_copy_average"], "--", color=look.GUIDE, linewidth=look.points(0.8))
        mean = one["loss"].mean("seed")
        for name, colour in REGIMES.items():
            here = np.flatnonzero(one["regime"] == name)
            ax.plot(
                one["k"][here], mean[here], linestyle="", color=colour, marker=_MARKS[name],
                markersize=look.points(3.2), markeredgewidth=0,
            )  # fmt: skip
        ax.annotate(
            f"n = {n}", (float(one["k"][-1]), float(mean[-1])), (3, 0), textcoords="offset points", va="center",
            size=look.points(6.8),
        )  # fmt: skip
    ax.set(xlabel="teacher nodes k", ylabel="loss at the end, mean over seeds")
    ax.margins(x=0.12)
    panels.whole_numbers(ax, "x", 8)


def _example(measured: xr.Dataset, ax: Axes) -> None:
    """Loss of each seed at one (n, k), in order, with both points' losses and the first seed's u_ij in an inset."""
    one = measured.isel(example=0) if "example" in measured.dims else measured
    own = one.isel(point=int(one["example"]))
    ranked = np.argsort(own["loss"].values)
    place = np.arange(1, len(ranked) + 1)
    for kind, colour in COLOURS.items():
        here = own["class"].values[ranked] == kind
        ax.plot(
            place[here], own["loss"].values[ranked][here], linestyle="", color=colour, marker=MARKS[kind],
            markersize=look.points(3.4), markeredgewidth=0, zorder=3, label=f"seed at {NAMES[kind]}",
        )  # fmt: skip
    ax.axhline(float(own["loss_copy_average"]), color=look.GUIDE, linestyle="--", label="L*(k−n+1)")
    ax.axhline(float(own["loss_perturbed_copy"]), color=look.GUIDE, linestyle=":", label="perturbed n-copy")
    values = [*own["loss"].values.tolist(), float(own["loss_copy_average"]), float(own["loss_perturbed_copy"])]
    low, high = np.nanmin(values), np.nanmax(values)
    room = max(high - low, 0.02 * high)
    ax.set(ylim=(low - 0.15 * room, high + 1.1 * room), xlabel="seed, by loss", ylabel="loss at the end")
    panels.whole_numbers(ax, "x", 4)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    inset = ax.inset_axes((0.3, 0.58, 0.42, 0.4))
    u = one["cosine"].dropna("node", how="all").dropna("teacher_node", how="all")
    draw_cosines(u, inset, labels=False)


#: Panels by name; the example of the first regime unless selected.
PANELS: dict[str, layout.Panel] = {"loss against k": _losses, "seeds": _example}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: A, mean loss against k with its regimes; B, the losses of all seeds of one student per regime."""
    page = look.page(2, 3.9)
    above, below = page.body.subfigures(2, 1, height_ratios=(1.25, 1), squeeze=False)[:, 0]
    ax = above.subplots()
    _losses(measured, ax)
    layout.heading(ax, "", "A")
    handles = [
        Line2D([], [], color=c, marker=_MARKS[name], linestyle="", markersize=look.points(3.2), label=name)
        for name, c in REGIMES.items()
        if name in measured["regime"]
    ]
    ax.legend(handles=handles, loc="upper left")
    examples = measured["example"].values.tolist()
    cells = below.subplots(1, len(examples), squeeze=False)[0]
    for position, (i, ax) in enumerate(zip(examples, cells, strict=True)):
        own = measured.isel(point=i)
        _example(measured.isel(example=position), ax)
        ax.set_title(f"$\\mathbf{{B{position + 1}}}$ n = {int(own['n'])}, k = {int(own['k'])}", loc="left")
        if position:
            ax.set_ylabel("")
    layout.legend(page)
    below.colorbar(cells[-1].child_axes[0].images[0], ax=list(cells), label="uᵢⱼ", aspect=15)
    missing = [name for name in REGIMES if name not in measured["regime"]]
    says = (
        "Loss at the end of gradient flow: mean over seeds against k, dashed L*(k−n+1), marked by whether seeds end at "
        "the copy-average point, the perturbed n-copy or some at each; below, the losses of all seeds of one student "
        "per regime, inset uᵢⱼ of the first seed; seeds at neither point end on degenerate plateaus such as L*(3) and "
        "do not count for regimes"
    ) + "".join(f"; at no n and k here all seeds are of “{name}”" for name in missing)
    return layout.told(page, measured, says, "none", EXPERIMENTS)
