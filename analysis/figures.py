"""Figures of an archive; `FIGURES` is what ``tsdyn plot`` offers.  Draws; what it shows, the other topics measure.

For each figure ``x``

- ``measure_x(archive)`` reads a run, a sweep or a slice of one and gives a small loaded Dataset,
- ``x(ds, ax=...)`` draws one point of the sweep, measured or not, on one set of axes,
- ``draw_x(ds)`` lays panels out over the swept keys.

What is measured already stays as it is: ``measure_x(measure_x(ds))`` is ``measure_x(ds)``.  The lowest layer is shown
unless a slice holds another (``ds.sel(layer=2)``).  Colours: see `tsdyn.analysis.panels`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tsdyn.analysis import layout, lottery, matching, panels, phase, specialization, summary
from tsdyn.analysis.identity import per_point, refuse_odd
from tsdyn.analysis.layout import MAX_PANELS as MAX_PANELS
from tsdyn.analysis.layout import PANEL as PANEL
from tsdyn.analysis.panels import PALETTE as PALETTE

from tsdyn import layer as one_layer
from tsdyn import vocabulary
from tsdyn.archive import lowest_layer
from tsdyn.sweep_axes import POINT

#: Most lines in one panel: every colour in every style.
MAX_LINES = len(panels.PALETTE) * len(panels.STYLES)
#: Bands over seeds: from the 10th to the 90th percentile, about the median.
BAND = (0.1, 0.5, 0.9)


# --- what a figure reads -------------------------------------------------------------------------------------


def _needed(archive: xr.Dataset, figure: str, *, epochs: Sequence[int] | slice | None = None) -> xr.Dataset:
    """The variables that `figure` needs, with the dimensions seed and epoch that a slice may have lost.

    Args:
        archive: Run, sweep or slice.
        figure: Name in `FIGURES`.
        epochs: Positions to keep; all if None.

    Raises:
        ValueError: naming what to record.
    """
    recipe = FIGURES[figure]
    missing = recipe.missing(archive)
    if missing:
        families = {v: name for name, members in vocabulary.FAMILIES.items() for v in members}
        words = list(dict.fromkeys(families.get(name, name) for name in missing))
        raise ValueError(
            f"{figure}: the archive has no {', '.join(missing)}; record it: [record] observables = {words}"
        )
    names = [next(n for n in need.split("|") if n in archive) for need in recipe.needs]
    ds = archive[names]
    for dim in ("seed", "epoch"):
        lost = [n for n in names if dim in vocabulary.VARIABLES[n].dims and dim not in ds[n].dims]
        if lost and dim not in ds.dims:
            where = ds[dim] if dim in ds.coords else xr.DataArray(0)
            ds = ds.drop_vars(dim, errors="ignore")
            ds = ds.assign({n: ds[n].expand_dims({dim: [where.item()]}) for n in lost})
    if epochs is not None and "epoch" in ds.dims:
        ds = ds.isel(epoch=epochs)
    return ds


def _lowest(ds: xr.Dataset) -> xr.Dataset:
    return one_layer(ds, lowest_layer(ds)) if "layer" in ds.dims else ds


def _quantiles(values: xr.DataArray) -> xr.DataArray:
    found = summary.summarise(values, probabilities=BAND)["quantiles"]
    return found.assign_attrs(values.attrs)


# --- L-shape -------------------------------------------------------------------------------------------------


def measure_l_shape(archive: xr.Dataset) -> xr.Dataset:
    """``student_specialization`` and ``fanout_norm`` of one layer at the last epoch, (swept..., seed, node)."""
    if "student_specialization" in archive:
        return archive
    last = _lowest(_needed(archive, "l-shape").isel(epoch=-1)).load()
    return xr.Dataset(
        {
            "student_specialization": specialization.student_specialization(last),
            "fanout_norm": last["fanout_norm"],
        }
    )


def l_shape(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Fan-out norm against best correlation, a point a student node, a colour a seed.

    Specialized students sit at correlation 1 with any norm, the others near norm 0: the L of Tian (2020), Figure 5.
    """
    layout.require_point(ds, "l_shape")
    measured = measure_l_shape(ds)
    return panels.points(measured["student_specialization"], measured["fanout_norm"], ax=ax)


def draw_l_shape(ds: xr.Dataset) -> Figure:
    """Panels of `l_shape`."""
    measured = measure_l_shape(ds)
    title = f"fan-out norm against best correlation, epoch {int(measured['epoch'])}"
    return layout.grid(
        measured, lambda at, ax: l_shape(measured.sel(at), ax=ax),
        title=layout.headed(title, measured), **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip


# --- success rate and recovery -------------------------------------------------------------------------------


def measure_success_rate(archive: xr.Dataset, *, early: int = 5) -> xr.Dataset:
    """``success_rate`` and its ``success_interval`` at the recorded epoch nearest `early` and at the last."""
    if "success_rate" in archive:
        return archive
    needed = _needed(archive, "success-rate")
    epochs = needed["epoch"].values
    chosen = sorted({int(np.abs(epochs - early).argmin()), len(epochs) - 1})
    low = _lowest(needed.isel(epoch=chosen)).load()
    return xr.Dataset(
        {
            "success_rate": specialization.success_rate(low),
            "success_interval": specialization.success_interval(low),
        }
    )


def success_rate(
    ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0], label: str = "", beside: float = 0.0
) -> Axes:
    """Share of seeds in which each teacher node is recovered; last epoch solid with its 95 % interval, others dotted.

    Source: Tian (2020), Figure 7.

    Args:
        ds: One point of a sweep.
        ax: Axes.
        color: Of all its lines.
        label: In the legend, before the epoch.
        beside: Intervals stand so far beside their nodes, so that those of several curves do not hide one another.
    """
    layout.require_point(ds, "success_rate")
    measured = layout.unpadded(measure_success_rate(ds))
    ax = panels.axes(ax)
    epochs = np.atleast_1d(measured["epoch"].values)
    for epoch, line in zip(epochs[::-1], ("-", ":", "--"), strict=False):
        now = measured.sel(epoch=epoch)
        interval = now["success_interval"] if line == "-" and "success_interval" in now else None
        name = f"{label}, epoch {epoch}" if label else f"epoch {epoch}"
        panels.rate(now["success_rate"], interval, ax=ax, color=color, linestyle=line, label=name, beside=beside)
    return ax


def draw_success_rate(ds: xr.Dataset) -> Figure:
    """Panels of `success_rate`: a colour a student width, or else a value of the last swept key."""
    measured = measure_success_rate(ds)
    swept = layout.swept(measured)
    widths = [dim for dim in swept if dim in ("overrealization", "widths")][:1] or list(swept[-1:])
    curves = _lines(measured, widths)

    def draw(at: dict[str, Any], ax: Axes) -> None:
        for position, point in enumerate(curves):
            success_rate(
                measured.sel({**at, **point}), ax=ax, color=panels.colour(position),
                label=layout.name_of(measured, point),
                beside=0.3 * (position / max(1, len(curves) - 1) - 0.5) if len(curves) > 1 else 0.0,
            )  # fmt: skip

    others = [d for d in swept if d not in widths]
    figure = layout.grid(
        measured, draw, title=layout.headed("success rate", measured), beside=1.8, **layout.two_ways(others)
    )
    layout.legend(figure)
    return figure


def _lines(measured: xr.Dataset, dims: Sequence[str]) -> list[dict[str, Any]]:
    found = layout.points(measured, dims)
    if len(found) > MAX_LINES:
        raise ValueError(f"{len(found)} lines are more than {MAX_LINES} in a panel; select a part of the sweep first")
    return found


def measure_recovery(archive: xr.Dataset) -> xr.Dataset:
    """``specialization`` of one layer at every epoch, (swept..., epoch, teacher_node), mean over seeds."""
    if "specialization" in archive:
        return archive
    best = specialization.specialization(_lowest(_needed(archive, "recovery")))
    mean = summary.summarise(best)["mean"].assign_attrs(best.attrs)
    return xr.Dataset({"specialization": mean}).load()


def recovery(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Best correlation of each teacher node against epoch, mean over seeds, dark to light from the first to the last.

    Source: Tian (2020), Figure 8.
    """
    layout.require_point(ds, "recovery")
    ax = panels.nodes(layout.unpadded(measure_recovery(ds))["specialization"], ax=ax)
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.05)
    return ax


def draw_recovery(ds: xr.Dataset) -> Figure:
    """Panels of `recovery`."""
    return _by_teacher_node(measure_recovery(ds), recovery, "best correlation of each teacher node, mean over seeds")


def _by_teacher_node(measured: xr.Dataset, panel: Callable[..., Axes], title: str) -> Figure:
    """Panels of the sweep, a shade a teacher node."""
    figure = layout.grid(
        measured, lambda at, ax: panel(measured.sel(at), ax=ax),
        title=layout.headed(title, measured), **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    layout.shade_bar(figure, int(layout.unpadded(measured).sizes["teacher_node"]), "teacher node")
    return figure


# --- curves over epochs --------------------------------------------------------------------------------------


def curve(values: xr.DataArray, *, ax: Axes | None = None, color: str = panels.PALETTE[0], label: str = "") -> Axes:
    """Median over seeds against epoch with the band from the 10th to the 90th percentile; (seed, epoch)."""
    ax = panels.band(_quantiles(values), ax=ax, color=color, label=label or None)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def measure_curves(archive: xr.Dataset, name: str) -> xr.Dataset:
    """Quantiles over seeds of a variable over (swept..., seed, epoch), under its name; (swept..., epoch, quantile)."""
    if name in archive and "quantile" in archive[name].dims:
        return archive
    return xr.Dataset({name: _quantiles(archive[name])}).load()


def draw_curves(measured: xr.Dataset, *, log: bool = False) -> Figure:
    """A band a value of the last swept key (of every layer, if there are several), panels over the others."""
    (name,) = measured.data_vars
    values = measured[name]
    swept = layout.swept(measured)
    layered = "layer" in values.dims and values.sizes["layer"] > 1
    if "layer" in values.dims and not layered:
        values = values.isel(layer=0)
    chosen = ("layer",) if layered else swept[-1:]
    curves = _lines(measured, chosen)

    def draw(at: dict[str, Any], ax: Axes) -> None:
        for position, point in enumerate(curves):
            panels.band(
                values.sel({**at, **point}), ax=ax, color=panels.colour(position),
                linestyle=panels.style(position), label=layout.name_of(measured, point) or None,
            )  # fmt: skip
        if log:
            ax.set_yscale("log")
        ax.set_ylabel(panels.axis_label(values))

    others = [d for d in swept if d not in chosen]
    beside = 1.4 if len(curves) > 1 else 0.0
    title = layout.headed(f"{panels.axis_label(values)}: median and 10th to 90th percentile of seeds", measured)
    figure = layout.grid(measured, draw, title=title, beside=beside, **layout.two_ways(others))
    layout.legend(figure)
    return figure


def measure_loss(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of ``mse_eval``, or of ``loss_eval`` where that was not recorded."""
    if any("quantile" in array.dims for array in archive.data_vars.values() if array.name in ("mse_eval", "loss_eval")):
        return archive
    needed = _needed(archive, "loss")
    return measure_curves(needed, str(next(iter(needed.data_vars))))


def loss(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """Evaluation mse (or loss) against epoch on a log scale, with its band over seeds."""
    layout.require_point(ds, "loss")
    (values,) = measure_loss(ds).data_vars.values()
    ax = panels.band(values, ax=ax, color=color)
    ax.set(yscale="log", ylabel=panels.axis_label(values))
    return ax


def draw_loss(ds: xr.Dataset) -> Figure:
    """Panels of `loss`, a colour a value of the last swept key."""
    return draw_curves(measure_loss(ds), log=True)


def measure_specialization(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of ρ̄ at each hidden layer, (swept..., [layer,] epoch, quantile)."""
    if "mean_specialization" in archive:
        return archive
    return _by_layer(_needed(archive, "specialization"), specialization.mean_specialization)


def mean_specialization(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """ρ̄, the mean best correlation, of the lowest layer against epoch, with its band over seeds.

    Source: Tian (2020), Figure 6; Tian et al. (2019), Figure 7.
    """
    return _lowest_band(measure_specialization(ds), "mean_specialization", ax, color)


def draw_specialization(ds: xr.Dataset) -> Figure:
    """Panels of `mean_specialization`, a colour a hidden layer, or a value of the last swept key."""
    return draw_curves(measure_specialization(ds))


def measure_rank(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of r̄, the mean rank of the final winners, at each hidden layer."""
    if "mean_rank" in archive:
        return archive
    return _by_layer(_needed(archive, "rank"), specialization.mean_rank)


def mean_rank(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """r̄, the mean rank of the last epoch's winners, of the lowest layer against epoch, with its band; 0 is the first.

    Source: Tian et al. (2019), Figure 7.
    """
    return _lowest_band(measure_rank(ds), "mean_rank", ax, color)


def draw_rank(ds: xr.Dataset) -> Figure:
    """Panels of `mean_rank`, colours as in `draw_specialization`."""
    return draw_curves(measure_rank(ds))


def _by_layer(needed: xr.Dataset, measure: Callable[[xr.Dataset], xr.DataArray]) -> xr.Dataset:
    hidden = needed.isel(layer=slice(0, -1)) if "layer" in needed.dims and needed.sizes["layer"] > 1 else needed
    values = measure(hidden)
    return measure_curves(values.to_dataset(), str(values.name))


def _lowest_band(measured: xr.Dataset, name: str, ax: Axes | None, color: str) -> Axes:
    layout.require_point(measured, name)
    values = measured[name]
    values = values.isel(layer=0) if "layer" in values.dims else values
    ax = panels.band(values, ax=ax, color=color)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def measure_winners(archive: xr.Dataset) -> xr.Dataset:
    """``winner_rank`` of one layer at every epoch, (swept..., epoch, teacher_node), mean over seeds."""
    if "winner_rank" in archive:
        return archive
    ranks = lottery.winner_rank(_lowest(_needed(archive, "winners")))
    return xr.Dataset({"winner_rank": summary.summarise(ranks)["mean"].assign_attrs(ranks.attrs)}).load()


def winners(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Rank of each teacher node's final winner against epoch, mean over seeds; 0 at the start if luck decided.

    Source: Tian et al. (2019), Figures 19 to 21.
    """
    layout.require_point(ds, "winners")
    ax = panels.nodes(layout.unpadded(measure_winners(ds))["winner_rank"], ax=ax)
    ax.set_ylim(bottom=-0.02)
    return ax


def draw_winners(ds: xr.Dataset) -> Figure:
    """Panels of `winners`."""
    return _by_teacher_node(measure_winners(ds), winners, "rank of each teacher node's final winner, mean over seeds")


# --- heat maps -----------------------------------------------------------------------------------------------


def measure_correlation(archive: xr.Dataset) -> xr.Dataset:
    """``correlation`` of the first seed at the last epoch and ``node_order``; (swept..., teacher_node, node)."""
    return _ordered(archive, "correlation")


def correlation_map(ds: xr.Dataset, *, ax: Axes | None = None, bar: bool = True) -> Axes:
    """Correlations of one seed (the first) at one epoch (the last), student nodes ordered by their best teacher node.

    Grey: dead nodes.
    """
    layout.require_point(ds, "correlation_map")
    return _map(measure_correlation(ds), "correlation", 1.0, ax, bar)


def draw_correlation(ds: xr.Dataset) -> Figure:
    """Panels of `correlation_map`."""
    measured = measure_correlation(ds)
    figure = layout.grid(
        measured, lambda at, ax: correlation_map(measured.sel(at), ax=ax, bar=False),
        title=layout.headed(f"correlation, seed {int(measured['seed'])}, epoch {int(measured['epoch'])}", measured),
        share=False, **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="correlation")
    return figure


def measure_couplings(archive: xr.Dataset) -> xr.Dataset:
    """β* (``A``) and ``H_star`` of the first seed at the first and last epoch, and ``node_order`` of the last."""
    return _ordered(archive, "couplings")


def coupling_map(ds: xr.Dataset, *, variable: str = "H_star", ax: Axes | None = None, bar: bool = True) -> Axes:
    """β* (``A``) or H* (``H_star``) of one seed at the last epoch, student nodes ordered by their best teacher node.

    Where students specialize both become a staircase: the diagonal dominates.  Source: Tian et al. (2019), Figure 10.

    Raises:
        ValueError: if `variable` is neither.
    """
    if variable not in ("A", "H_star"):
        raise ValueError(f"coupling_map: variable={variable!r}; it is 'A' (β*) or 'H_star'")
    layout.require_point(ds, "coupling_map")
    measured = measure_couplings(ds)
    largest = float(np.fmax.reduce(np.abs(measured[variable].values), axis=None, initial=0.0)) or 1.0
    now = measured.isel(epoch=-1) if "epoch" in measured.dims else measured
    return _map(now, variable, largest, ax, bar)


def draw_couplings(ds: xr.Dataset) -> Figure:
    """β* and H* before and after training, a row a point of the sweep; each pair on one scale."""
    measured = measure_couplings(ds)
    names = {"β*": "A", "H*": "H_star"}
    cells = measured.assign_coords(moment=list(names))

    def draw(at: dict[str, Any], ax: Axes) -> None:
        point = {dim: value for dim, value in at.items() if dim not in ("moment", "epoch")}
        own, name = measured.sel(point), names[at["moment"]]
        largest = float(np.fmax.reduce(np.abs(own[name].values), axis=None, initial=0.0)) or 1.0
        ax.figure.colorbar(_map(own.sel(epoch=at["epoch"]), name, largest, ax, False).images[0], ax=ax)

    return layout.grid(
        cells, draw, across=("moment", "epoch"), down=layout.swept(measured), share=False,
        title=layout.headed(f"student nodes ordered by best teacher node, seed {int(measured['seed'])}", measured),
    )  # fmt: skip


def _ordered(archive: xr.Dataset, figure: str) -> xr.Dataset:
    if "node_order" in archive:
        return archive
    needed = _lowest(_needed(archive, figure).isel(seed=0))
    ends = needed.isel(epoch=[-1] if figure == "correlation" else sorted({0, needed.sizes["epoch"] - 1})).load()
    order = matching.node_order(ends.isel(epoch=-1)).drop_vars("epoch")
    ends = ends.isel(epoch=-1) if figure == "correlation" else ends
    return ends.assign(node_order=order)


def _map(one: xr.Dataset, variable: str, largest: float, ax: Axes | None, bar: bool) -> Axes:
    own = layout.unpadded(one)
    order = own["node_order"].values.astype(int)  # padding comes last, and is cut already
    values = own[variable].transpose("teacher_node", "node").isel(node=order[order < own.sizes["node"]])
    ax = panels.table(values, ax=ax, limits=(-largest, largest), cmap="RdBu_r", bar=bar)
    ax.set(xlabel="student node, by best teacher node", ylabel="teacher node")
    ax.set_yticks(*_node_ticks(values.sizes["teacher_node"]))
    ax.set_xticks([])
    return ax


def _node_ticks(count: int) -> tuple[list[int], list[str]]:
    """Counted from 1; about eight of them."""
    step = max(1, round(count / 8))
    return list(range(0, count, step)), [str(1 + i) for i in range(0, count, step)]


# --- spectra -------------------------------------------------------------------------------------------------

#: Epochs whose spectra are drawn.
SPECTRA = 4


def measure_spectrum(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of ``hessian_eigenvalue`` at up to `SPECTRA` epochs; (swept..., epoch, mode, quantile)."""
    if "hessian_eigenvalue" in archive and "quantile" in archive["hessian_eigenvalue"].dims:
        return archive
    needed = _needed(archive, "spectrum")
    chosen = np.unique(np.linspace(0, needed.sizes["epoch"] - 1, SPECTRA).round().astype(int))
    return measure_curves(needed.isel(epoch=chosen), "hessian_eigenvalue")


def spectrum(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Largest eigenvalues of the Hessian in descending order, dark to light over epochs, with their bands over seeds.

    On a log scale; where some are not positive, on one that is linear near 0.
    """
    layout.require_point(ds, "spectrum")
    values = measure_spectrum(ds)["hessian_eigenvalue"]
    values = values.assign_coords(mode=values["mode"] + 1)
    ax = panels.axes(ax)
    epochs = np.atleast_1d(values["epoch"].values)
    for position, epoch in enumerate(epochs):
        own = values.sel(epoch=epoch) if "epoch" in values.dims else values
        panels.band(own, along="mode", ax=ax, color=panels.shade(position, len(epochs)), label=f"epoch {epoch}")
    smallest, largest = (float(f.reduce(values.values, axis=None)) for f in (np.fmin, np.fmax))
    if smallest > 0:
        ax.set_yscale("log")
    elif largest > smallest:
        ax.set_yscale("symlog", linthresh=1e-3 * max(largest, -smallest))
    ax.set(xlabel="eigenvalue, largest first", ylabel="eigenvalue of the Hessian")
    return ax


def draw_spectrum(ds: xr.Dataset) -> Figure:
    """Panels of `spectrum`."""
    measured = measure_spectrum(ds)
    figure = layout.grid(
        measured, lambda at, ax: spectrum(measured.sel(at), ax=ax), beside=1.0,
        title=layout.headed("spectrum of the Hessian, median and 10th to 90th percentile of seeds", measured),
        **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    layout.legend(figure)
    return figure


# --- boundaries in the plane ---------------------------------------------------------------------------------

#: Epochs shown as panels.
SNAPSHOTS = 4


def measure_boundaries(archive: xr.Dataset) -> xr.Dataset:
    """Weights and biases of the lowest layer of the first seed and its fan-out norms, at every epoch.

    Raises:
        ValueError: if inputs are not in the plane.
    """
    if "extent" in archive:
        return archive
    needed = _needed(archive, "boundaries").isel(seed=0)
    if "layer" not in needed.dims:
        if int(needed["layer"]) != 1:
            raise ValueError(f"boundaries: of the lowest layer, not of layer {int(needed['layer'])}")
    else:
        needed = one_layer(needed, lowest_layer(needed))
    inputs = int(needed["input_width"].max())
    if inputs != 2:
        raise ValueError(
            f"boundaries: inputs have {inputs} dimensions, and a map needs the plane: [teacher] widths = [2, ...]"
        )
    measured = needed.isel(input_node=slice(0, 2)).load()
    return measured.assign(extent=3.0 * per_point(archive, lambda point: point.data.std))


def boundaries(ds: xr.Dataset, *, ax: Axes | None = None, strongest: float | None = None) -> Axes:
    """Where each node of the lowest layer switches on, of one seed (the first) at one epoch (the last).

    Teacher nodes dashed and black, student nodes coloured, the wider and darker the larger their fan-out norm ‖v_k‖,
    which the legend says.  Over three standard deviations of the inputs.  Source: Tian (2020), Figure 3.

    Args:
        ds: One point of a sweep.
        ax: Axes.
        strongest: Fan-out norm drawn at full width; the largest of `ds` at any epoch if None.
    """
    layout.require_point(ds, "boundaries")
    measured = layout.unpadded(measure_boundaries(ds))
    if strongest is None:
        strongest = float(np.fmax.reduce(measured["fanout_norm"].values, axis=None)) or 1.0
    now = measured.isel(epoch=-1) if "epoch" in measured.dims else measured
    ax = panels.axes(ax)
    extent = float(measured["extent"])
    ax.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    strength = (now["fanout_norm"] / strongest).fillna(0.0).clip(0, 1)
    panels.lines(now["weight"], now["bias"], strength, ax)
    panels.lines(
        now["teacher_weight"], now["teacher_bias"], None, ax, color="black", linestyle=(0, (5, 3)), linewidth=1.0
    )
    return ax


def _boundary_names(norms: xr.DataArray) -> list[str]:
    """Of the coloured lines of a legend: each student node with its fan-out norm, where there is one point and few."""
    if norms.ndim == 1 and norms.size <= 2 * len(panels.PALETTE):
        return [f"student {k + 1}: ‖v‖ = {float(norms[k]):.2g}" for k in range(norms.size)]
    return ["student node"]


def _boundary_key(figure: Figure, measured: xr.Dataset) -> None:
    """Legend: colours of student nodes with their fan-out norms at the last epoch, where there is room for them."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="black", linestyle="--", linewidth=1, label="teacher node")]
    last = measured.isel(epoch=-1) if "epoch" in measured.dims else measured
    for k, name in enumerate(_boundary_names(layout.unpadded(last)["fanout_norm"])):
        handles.append(Line2D([], [], color=panels.colour(k), linewidth=2, label=name))
    figure.legend(handles=handles, loc="outside right upper", fontsize=7)


def draw_boundaries(ds: xr.Dataset) -> Figure:
    """`boundaries` at up to `SNAPSHOTS` epochs, a row a point of the sweep; widths comparable along a row."""
    measured = measure_boundaries(ds)
    chosen = np.unique(np.linspace(0, measured.sizes["epoch"] - 1, SNAPSHOTS).round().astype(int))
    shown = measured.isel(epoch=chosen)

    def draw(at: dict[str, Any], ax: Axes) -> None:
        point = {dim: value for dim, value in at.items() if dim != "epoch"}
        strongest = float(np.fmax.reduce(measured["fanout_norm"].sel(point).values, axis=None)) or 1.0
        boundaries(shown.sel(at), ax=ax, strongest=strongest)

    title = f"boundaries, seed {int(measured['seed'])}; wide: large ‖v‖"
    figure = layout.grid(
        shown, draw, across=("epoch",), down=layout.swept(measured), title=layout.headed(title, measured), beside=1.6
    )  # fmt: skip
    _boundary_key(figure, shown)
    return figure


def animate_boundaries(ds: xr.Dataset, *, interval: int = 150) -> FuncAnimation:
    """`boundaries` over all recorded epochs of one point; ``.save("x.gif", writer="pillow")``, or ``.to_jshtml()``.

    Args:
        ds: One point of a sweep.
        interval: Milliseconds a frame.

    Raises:
        ValueError: if several points are left.
    """
    layout.require_point(ds, "animate_boundaries")
    measured = measure_boundaries(ds)
    strongest = float(np.fmax.reduce(measured["fanout_norm"].values, axis=None)) or 1.0
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    ax = figure.subplots()
    _boundary_key(figure, measured)

    def frame(position: int) -> list[Any]:
        ax.clear()
        now = measured.isel(epoch=position)
        boundaries(now, ax=ax, strongest=strongest)
        ax.set_title(layout.headed(f"seed {int(now['seed'])}, epoch {int(now['epoch'])}", now), fontsize=10)
        names = _boundary_names(layout.unpadded(now)["fanout_norm"])
        for text, name in zip(figure.legends[0].get_texts()[1:], names, strict=True):
            text.set_text(name)
        return []

    frame(measured.sizes["epoch"] - 1)
    for _ in range(2):  # the second pass knows how wide the legend is
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once; every frame again would take most of the time
    frame(0)
    return FuncAnimation(figure, frame, frames=measured.sizes["epoch"], interval=interval, init_func=list)


# --- phase diagram -------------------------------------------------------------------------------------------


def measure_phase(archive: xr.Dataset) -> xr.Dataset:
    """``fraction`` of seeds in which none, some or all teacher nodes are recovered; (swept..., class).

    At the last epoch; of a single point at every epoch.
    """
    if "fraction" in archive:
        return archive
    needed = _lowest(_needed(archive, "phase"))
    needed = needed.isel(epoch=-1) if layout.swept(needed) else needed
    return xr.Dataset({"fraction": phase.fractions(phase.recovery_class(needed))}).load()


def phase_diagram(ds: xr.Dataset, *, of: str | None = None, ax: Axes | None = None) -> Axes:
    """Shares of seeds by class: stacked against one swept key (or epoch), or of one class over two swept keys.

    Args:
        ds: An archive, or ``fraction`` (..., class) of any measure with classes (`tsdyn.analysis.phase.fractions`).
        of: The class shown over two keys; the last if None.
        ax: Axes.

    Raises:
        ValueError: if neither one nor two keys are left, or there is no such class.
    """
    shares = measure_phase(ds)["fraction"]
    along = [str(dim) for dim in shares.dims if dim != "class"]
    if len(along) == 1:
        ax = panels.stack(shares, ax=ax)
        if along[0] == POINT:
            keys = layout.listed(shares)
            labels = zip(*([layout.short(v) for v in shares[key].values.tolist()] for key in keys), strict=True)
            panels.name_ticks(ax, "x", [", ".join(at) for at in labels])
            ax.set_xlabel(", ".join(keys))
        return ax
    if len(along) != 2:
        raise ValueError(f"phase_diagram: over {', '.join(map(str, along)) or 'nothing'}; one or two swept keys it is")
    names = [str(name) for name in shares["class"].values]
    if of is not None and of not in names:
        raise ValueError(f"phase_diagram: no class {of!r}; there are {', '.join(names)}")
    own = shares.sel({"class": of or names[-1]}).transpose(along[1], along[0])
    ax = panels.table(own, ax=ax, limits=(0, 1), cmap="cividis", bar=False)
    panels.numbers(own, ax)
    for axis, dim in zip("xy", along, strict=True):
        panels.name_ticks(
            ax, axis, [layout.name_of(own, at).removeprefix(f"{dim} ") for at in layout.points(own, [dim])]
        )
        ax.set(**{f"{axis}label": str(dim)})
    ax.invert_yaxis()
    return ax


def draw_phase(ds: xr.Dataset) -> Figure:
    """`phase_diagram` over the first two swept keys, a panel a class, a row a point of the others."""
    measured = measure_phase(ds)
    swept = layout.swept(measured)
    long_name = str(measured["fraction"].attrs["long_name"])
    if len(swept) < 2:
        figure = layout.grid(
            measured, lambda at, ax: phase_diagram(measured, ax=ax), across=(), beside=1.0,
            title=layout.headed(long_name, measured),
        )  # fmt: skip
        layout.legend(figure)
        return figure
    figure = layout.grid(
        measured,
        lambda at, ax: phase_diagram(
            measured.sel({d: v for d, v in at.items() if d != "class"}), of=at["class"], ax=ax
        ),
        across=("class",),
        down=swept[2:],
        title=layout.headed(long_name, measured),
    )
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, label="share of seeds")
    return figure


# --- what there is -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A figure by name.

    Attributes:
        shows: One line.
        needs: Variables of the archive; ``a|b`` where either will do.
        draw: Of an archive.
    """

    shows: str
    needs: tuple[str, ...]
    draw: Callable[[xr.Dataset], Figure]

    def missing(self, archive: xr.Dataset) -> list[str]:
        """Needed variables that were not recorded."""
        return [need.split("|")[0] for need in self.needs if not any(n in archive for n in need.split("|"))]

    def __call__(self, archive: xr.Dataset) -> Figure:
        refuse_odd(archive, "plot")
        return self.draw(archive)


#: What ``tsdyn plot DIR NAME`` draws.
FIGURES: Mapping[str, Recipe] = {
    "l-shape": Recipe("fan-out norm against best correlation", ("correlation", "fanout_norm"), draw_l_shape),
    "success-rate": Recipe("share of seeds that recover each teacher node", ("correlation",), draw_success_rate),
    "recovery": Recipe("best correlation of each teacher node over epochs", ("correlation",), draw_recovery),
    "loss": Recipe("evaluation mse or loss over epochs", ("mse_eval|loss_eval",), draw_loss),
    "specialization": Recipe("mean best correlation over epochs", ("correlation",), draw_specialization),
    "rank": Recipe("mean rank of the final winners over epochs", ("correlation",), draw_rank),
    "winners": Recipe("rank of each final winner over epochs", ("correlation",), draw_winners),
    "correlation": Recipe("heat map of correlations by best match", ("correlation",), draw_correlation),
    "couplings": Recipe(
        "heat maps of β* and H* before and after", ("A", "H_star", "correlation"), draw_couplings
    ),
    "spectrum": Recipe("largest eigenvalues of the Hessian", ("hessian_eigenvalue",), draw_spectrum),
    "boundaries": Recipe(
        "boundaries in the plane over epochs (also .gif)",
        ("weight", "bias", "teacher_weight", "teacher_bias", "fanout_norm"),
        draw_boundaries,
    ),
    "phase": Recipe("share of seeds by what they recover", ("correlation",), draw_phase),
}  # fmt: skip
