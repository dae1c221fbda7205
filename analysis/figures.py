"""Figures: functions of labelled data that draw and compute nothing; `FIGURES` is what ``tsdyn plot`` offers.

Axes functions take measured arrays and ``ax=``; figure functions take an archive, measure it with
`tsdyn.analysis.specialization` and lay panels out over the swept dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import specialization

from tsdyn import layer as one_layer
from tsdyn.archive import swept_dimensions

#: Okabe & Ito's palette: told apart by every common kind of colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
PANEL = (2.7, 2.4)
MAX_PANELS = 48


# --- one panel -----------------------------------------------------------------------------------------------


def _axes(ax: Axes | None) -> Axes:
    return Figure(figsize=(4.5, 3.5), layout="constrained").subplots() if ax is None else ax


def _label(array: xr.DataArray) -> str:
    return str(array.attrs.get("long_name", array.name))


def l_shape(correlation: xr.DataArray, fanout_norm: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Fan-out norm against best correlation, a point a student node and seed; both (seed, node).

    Specialized students sit at correlation 1 with any norm, the others near norm 0: the L of Tian (2020), Figure 5.
    """
    ax = _axes(ax)
    for position, seed in enumerate(correlation["seed"].values):
        points = ax.scatter(
            correlation.sel(seed=seed),
            fanout_norm.sel(seed=seed),
            s=9,
            alpha=0.6,
            linewidths=0,
            color=PALETTE[position % len(PALETTE)],
            label=f"seed {seed}",
        )
        points.sticky_edges.y.append(0.0)
    # A lower limit would stop autoscaling, and panels that share the axis would be cut at the first one's top.
    ax.update_datalim([(0.0, 0.0)], updatex=False)
    ax.set(xlim=(-0.05, 1.05), xlabel=_label(correlation), ylabel=_label(fanout_norm))
    ax.autoscale_view(scalex=False)
    return ax


def success_rate(rate: xr.DataArray, *, ax: Axes | None = None, color: str = PALETTE[0], **style: Any) -> Axes:
    """Success rate against teacher node, counted from 1; (teacher_node,).  Tian (2020), Figure 7."""
    ax = _axes(ax)
    ax.plot(rate["teacher_node"] + 1, rate, color=color, marker="o", markersize=2.5, linewidth=1.2, **style)
    ax.set(ylim=(-0.05, 1.05), xlabel="teacher node", ylabel=_label(rate))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def recovery(best: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Best correlation of each teacher node against epoch, mean over seeds; (seed, epoch, teacher_node).

    Dark to light: teacher node 1 to the last.  Tian (2020), Figure 8.
    """
    ax = _axes(ax)
    nodes = best.sizes["teacher_node"]
    for j, node in enumerate(best["teacher_node"].values):
        curve = best.sel(teacher_node=node).mean("seed")
        ax.plot(curve["epoch"], curve, color=_node_colour(j, nodes), linewidth=1.2)
    ax.set(ylim=(-0.05, 1.05), xlabel="epoch", ylabel=_label(best))
    return ax


def _node_colour(position: int, nodes: int) -> Any:
    return colormaps["viridis"](0.92 * position / max(1, nodes - 1))


def curve(values: xr.DataArray, *, ax: Axes | None = None, color: str = PALETTE[0], label: str | None = None) -> Axes:
    """Median over seeds against epoch with the band from the 10th to the 90th percentile; (seed, epoch)."""
    ax = _axes(ax)
    low, middle, high = values.quantile([0.1, 0.5, 0.9], dim="seed").values
    ax.fill_between(values["epoch"], low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(values["epoch"], middle, color=color, label=label, linewidth=1.4)
    ax.set(xlabel="epoch", ylabel=_label(values))
    return ax


def correlation_map(correlation: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Heat map of one member's correlations, student nodes ordered by their best teacher node; (teacher_node, node)."""
    ax = _axes(ax)
    values = np.nan_to_num(correlation.transpose("teacher_node", "node").values)
    order = np.lexsort((-values.max(0), values.argmax(0)))
    image = ax.imshow(values[:, order], vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="correlation")
    ax.set(xlabel="student node, ordered by best match", ylabel="teacher node")
    return ax


# --- whole figures -------------------------------------------------------------------------------------------


def _lowest(archive: xr.Dataset, figure: str, *variables: str) -> xr.Dataset:
    missing = [v for v in variables if v not in archive]
    if missing:
        families = sorted({v.split("_")[0] if v.startswith(("loss", "mse")) else v for v in missing})
        raise ValueError(
            f"{figure}: the archive has no {', '.join(missing)}; record it: [record] observables = {families}"
        )
    return (
        one_layer(archive[list(variables)], 1).load()
        if "layer" in archive[list(variables)].dims
        else archive[list(variables)].load()
    )


def _points(ds: xr.Dataset, dims: tuple[str, ...]) -> list[dict[str, Any]]:
    return [dict(zip(dims, values, strict=True)) for values in itertools.product(*(ds[d].values for d in dims))]


def _title(point: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{dim} {value:g}" if isinstance(value, float) else f"{dim} {value}" for dim, value in point.items()
    )


def _grid(
    ds: xr.Dataset,
    draw: Callable[[dict[str, Any], Axes], object],
    *,
    swept: tuple[str, ...],
    title: str,
    share: bool = True,
    beside: float = 0.0,
) -> Figure:
    """A panel a point: the first swept dimension along columns, the rest along rows; `beside` inches for a legend."""
    columns, rows = swept[:1], swept[1:]
    across, down = _points(ds, columns), _points(ds, rows)
    if len(across) * len(down) > MAX_PANELS:
        raise ValueError(
            f"{title}: {len(across) * len(down)} panels are more than {MAX_PANELS}; select a part of the sweep first"
        )
    figure = Figure(
        figsize=(PANEL[0] * max(len(across), 1.6) + beside, PANEL[1] * max(len(down), 1.3) + 0.4), layout="constrained"
    )
    panels = figure.subplots(len(down), len(across), squeeze=False, sharex=share, sharey=share)
    for (i, row), (j, column) in itertools.product(enumerate(down), enumerate(across)):
        draw({**column, **row}, panels[i, j])
        panels[i, j].set_title(_title({**column, **row}), fontsize=9)
        panels[i, j].label_outer()
    for axis in ("x", "y"):
        text = getattr(panels[-1, 0], f"get_{axis}label")()
        for panel in panels.flat:
            panel.set(**{f"{axis}label": ""})
        getattr(figure, f"sup{axis}label")(text, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_l_shape(measured: xr.Dataset) -> Figure:
    """Panels of `l_shape` from ``student_specialization`` and ``fanout_norm``, both (swept..., seed, node)."""
    return _grid(
        measured,
        lambda at, ax: l_shape(measured["student_specialization"].sel(at), measured["fanout_norm"].sel(at), ax=ax),
        swept=swept_dimensions(measured),
        title=f"fan-out norm against best correlation, epoch {int(measured['epoch'])}",
    )


def measure_l_shape(archive: xr.Dataset) -> xr.Dataset:
    """``student_specialization`` and ``fanout_norm`` of the lowest layer at the last epoch, loaded."""
    last = _lowest(archive.isel(epoch=-1), "l-shape", "correlation", "fanout_norm")
    return xr.Dataset(
        {
            "student_specialization": specialization.student_specialization(last),
            "fanout_norm": last["fanout_norm"],
        }
    )


def draw_success_rate(measured: xr.Dataset) -> Figure:
    """Panels of `success_rate` from (swept..., epoch, teacher_node): a colour a width, the last epoch solid."""
    rate = measured["success_rate"]
    swept = swept_dimensions(rate)
    lines = [dim for dim in swept if dim in ("overrealization", "widths")][:1] or list(swept[-1:])
    curves = _points(measured, tuple(lines))

    def draw(at: dict[str, Any], ax: Axes) -> None:
        for position, point in enumerate(curves):
            for epoch, style in zip(rate["epoch"].values[::-1], ("-", ":", "--"), strict=False):
                success_rate(
                    rate.sel({**at, **point, "epoch": epoch}),
                    ax=ax,
                    color=PALETTE[position % len(PALETTE)],
                    linestyle=style,
                    label=f"{_title(point)} epoch {epoch}".strip(),
                )

    panels = tuple(d for d in swept if d not in lines)
    figure = _grid(measured, draw, swept=panels, title="success rate", beside=1.8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    return figure


def measure_success_rate(archive: xr.Dataset, *, early: int = 5) -> xr.Dataset:
    """``success_rate`` of the lowest layer at the recorded epoch nearest `early` and at the last, loaded."""
    epochs = archive["epoch"].values
    chosen = sorted({int(epochs[np.abs(epochs - early).argmin()]), int(epochs[-1])})
    low = _lowest(archive.sel(epoch=chosen), "success-rate", "correlation")
    return xr.Dataset({"success_rate": specialization.success_rate(low)})


def draw_recovery(measured: xr.Dataset) -> Figure:
    """Panels of `recovery` from ``specialization`` (swept..., seed, epoch, teacher_node)."""
    best = measured["specialization"]
    figure = _grid(
        measured,
        lambda at, ax: recovery(best.sel(at), ax=ax),
        swept=swept_dimensions(best),
        title="best correlation of each teacher node, mean over seeds",
    )
    nodes = best.sizes["teacher_node"]
    shades = colormaps["viridis"].resampled(256)
    bar = figure.colorbar(ScalarMappable(Normalize(1, nodes / 0.92), shades), ax=figure.axes, label="teacher node")
    bar.locator = MaxNLocator(integer=True)
    bar.ax.set_ylim(1, nodes)
    return figure


def measure_recovery(archive: xr.Dataset) -> xr.Dataset:
    """``specialization`` of the lowest layer at every epoch, loaded."""
    return xr.Dataset({"specialization": specialization.specialization(_lowest(archive, "recovery", "correlation"))})


def draw_loss(archive: xr.Dataset) -> Figure:
    """Evaluation loss (or mse) against epoch on a log scale, a colour a point of the sweep."""
    name = next((v for v in ("mse_eval", "loss_eval") if v in archive), "loss_eval")
    values = _lowest(archive, "loss", name)[name]
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    points = _points(values.to_dataset(), swept_dimensions(values))
    for position, point in enumerate(points):
        curve(values.sel(point), ax=ax, color=PALETTE[position % len(PALETTE)], label=_title(point) or None)
    ax.set_yscale("log")
    if len(points) > 1:
        ax.legend(fontsize=7)
    return figure


def draw_correlation(archive: xr.Dataset) -> Figure:
    """`correlation_map` of the first seed at the last epoch, a panel a point of the sweep."""
    last = _lowest(archive.isel(epoch=-1, seed=0), "correlation", "correlation")["correlation"]

    def draw(at: dict[str, Any], ax: Axes) -> None:
        own = last.sel(at)
        correlation_map(own.dropna("node", how="all").dropna("teacher_node", how="all"), ax=ax)

    return _grid(
        last.to_dataset(),
        draw,
        swept=swept_dimensions(last),
        title=f"correlation, seed {int(last['seed'])}, epoch {int(last['epoch'])}",
        share=False,
    )


#: What ``tsdyn plot DIR NAME`` draws.
FIGURES: Mapping[str, Callable[[xr.Dataset], Figure]] = {
    "l-shape": lambda archive: draw_l_shape(measure_l_shape(archive)),
    "success-rate": lambda archive: draw_success_rate(measure_success_rate(archive)),
    "recovery": lambda archive: draw_recovery(measure_recovery(archive)),
    "loss": draw_loss,
    "correlation": draw_correlation,
}
