"""One number over epochs, as a median with a band over seeds: loss, specialization, rank of the winners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tsdyn.analysis import layout, lottery, panels, specialization, summary
from tsdyn.analysis.figures.reading import in_lowest_layer, over_seeds, variables_of
from tsdyn.analysis.figures.teacher_nodes import by_teacher_node, lines_of


def curve(values: xr.DataArray, *, ax: Axes | None = None, color: str = panels.PALETTE[0], label: str = "") -> Axes:
    """Median over seeds against epoch with the band from the 10th to the 90th percentile; (seed, epoch)."""
    ax = panels.band(over_seeds(values), ax=ax, color=color, label=label or None)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def measure_curves(archive: xr.Dataset, name: str) -> xr.Dataset:
    """Quantiles over seeds of a variable over (swept..., seed, epoch), under its name; (swept..., epoch, quantile)."""
    if name in archive and "quantile" in archive[name].dims:
        return archive
    return xr.Dataset({name: over_seeds(archive[name])}).load()


def draw_curves(measured: xr.Dataset, *, log: bool = False) -> Figure:
    """Panels over the swept keys with one band per value of the last key (per layer, if there are several)."""
    (name,) = measured.data_vars
    values = measured[name]
    swept = layout.swept(measured)
    layered = "layer" in values.dims and values.sizes["layer"] > 1
    if "layer" in values.dims and not layered:
        values = values.isel(layer=0)
    chosen = ("layer",) if layered else swept[-1:]
    curves = lines_of(measured, chosen)

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
    needed = variables_of(archive, "loss")
    return measure_curves(needed, str(next(iter(needed.data_vars))))


def loss(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """Evaluation mse (or loss) against epoch on a log scale, with its band over seeds."""
    layout.require_point(ds, "loss")
    (values,) = measure_loss(ds).data_vars.values()
    ax = panels.band(values, ax=ax, color=color)
    ax.set(yscale="log", ylabel=panels.axis_label(values))
    return ax


def draw_loss(ds: xr.Dataset) -> Figure:
    """Panels of `loss`, one colour per value of the last swept key."""
    return draw_curves(measure_loss(ds), log=True)


def measure_specialization(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of ρ̄ at each hidden layer, (swept..., [layer,] epoch, quantile)."""
    if "mean_specialization" in archive:
        return archive
    return _by_layer(variables_of(archive, "specialization"), specialization.mean_specialization)


def mean_specialization(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """ρ̄, the mean best correlation, of the lowest layer against epoch, with its band over seeds.

    Source: Tian (2020), Figure 6; Tian et al. (2019), Figure 7.
    """
    return _lowest_band(measure_specialization(ds), "mean_specialization", ax, color)


def draw_specialization(ds: xr.Dataset) -> Figure:
    """Panels of `mean_specialization`, one colour per hidden layer, or per value of the last swept key."""
    return draw_curves(measure_specialization(ds))


def measure_rank(archive: xr.Dataset) -> xr.Dataset:
    """Quantiles over seeds of r̄, the mean rank of the final winners, at each hidden layer."""
    if "mean_rank" in archive:
        return archive
    return _by_layer(variables_of(archive, "rank"), specialization.mean_rank)


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
    ranks = lottery.winner_rank(in_lowest_layer(variables_of(archive, "winners")))
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
    return by_teacher_node(measure_winners(ds), winners, "rank of each teacher node's final winner, mean over seeds")
