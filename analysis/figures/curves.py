"""One number over epochs, by the rule for the spread over seeds: loss, specialization, rank of the winners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, lottery, panels, specialization
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.reading import in_lowest_layer, variables_of
from tsdyn.analysis.figures.teacher_nodes import by_teacher_node, lines_of


def curve(values: xr.DataArray, *, ax: Axes | None = None, color: str = panels.PALETTE[0], label: str = "") -> Axes:
    """Median over seeds against epoch with the band of the middle 80 %, below five seeds every seed; (seed, epoch)."""
    ax = panels.spread(values, ax=ax, color=color, label=label or None)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def measure_curves(archive: xr.Dataset, name: str) -> xr.Dataset:
    """A variable over (swept..., seed, epoch), under its name, loaded."""
    if archive.attrs.get("measured") == name:
        return archive
    return xr.Dataset({name: archive[name]}, attrs={"measured": name} | captions.told(archive)).load()


@look.styled
def draw_curves(measured: xr.Dataset, *, log: bool = False, says: str = "") -> look.Page:
    """Panels over the swept keys with one curve per value of the last key (per layer, if there are several).

    Args:
        measured: From `measure_curves`.
        log: Whether the vertical axis is logarithmic.
        says: What the caption says besides the variable's name.
    """
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
            panels.spread(
                values.sel({**at, **point}), ax=ax, linestyle="-" if layered else panels.style(position),
                color=panels.shade(position, len(curves)) if layered else panels.colour(position),
                label=layout.name_of(measured, point) or None,
            )  # fmt: skip
        if log:
            layout.decades(ax)
        ax.set_ylabel(panels.axis_label(values))

    others = [d for d in swept if d not in chosen]
    title = layout.headed(panels.axis_label(values) + (f" ({says})" if says else ""), measured)
    page = layout.grid(measured, draw, title=title, **layout.two_ways(others))
    layout.legend(page)
    return page


def measure_loss(archive: xr.Dataset) -> xr.Dataset:
    """``mse_eval``, or ``loss_eval`` where that was not recorded; (swept..., seed, epoch), loaded."""
    if archive.attrs.get("measured") in ("mse_eval", "loss_eval"):
        return archive
    needed = variables_of(archive, "loss")
    return measure_curves(needed, str(next(iter(needed.data_vars))))


def loss(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """Evaluation mse (or loss) of the seeds against epoch on a log scale."""
    layout.require_point(ds, "loss")
    (values,) = measure_loss(ds).data_vars.values()
    ax = panels.spread(values, ax=ax, color=color)
    layout.decades(ax)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def draw_loss(ds: xr.Dataset) -> look.Page:
    """Panels of `loss`, one colour per value of the last swept key."""
    return draw_curves(measure_loss(ds), log=True)


def measure_specialization(archive: xr.Dataset) -> xr.Dataset:
    """ρ̄ of the seeds at each hidden layer, (swept..., [layer,] seed, epoch), loaded."""
    if archive.attrs.get("measured") == "mean_specialization":
        return archive
    return _by_layer(variables_of(archive, "specialization"), specialization.mean_specialization)


def mean_specialization(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """ρ̄, the mean best correlation, of the lowest layer against epoch, by the rule for spread.

    Source: Tian (2020), Figure 6; Tian et al. (2019), Figure 7.
    """
    return _lowest_band(measure_specialization(ds), "mean_specialization", ax, color)


def draw_specialization(ds: xr.Dataset) -> look.Page:
    """Panels of `mean_specialization`, one colour per hidden layer, or per value of the last swept key."""
    return draw_curves(measure_specialization(ds))


def measure_rank(archive: xr.Dataset) -> xr.Dataset:
    """r̄ of the seeds, the mean rank of the final winners, at each hidden layer; loaded."""
    if archive.attrs.get("measured") == "mean_rank":
        return archive
    return _by_layer(variables_of(archive, "rank"), specialization.mean_rank)


def mean_rank(ds: xr.Dataset, *, ax: Axes | None = None, color: str = panels.PALETTE[0]) -> Axes:
    """r̄, the mean rank of the last epoch's winners, of the lowest layer against epoch; 0 is the first.

    Source: Tian et al. (2019), Figure 7.
    """
    return _lowest_band(measure_rank(ds), "mean_rank", ax, color)


def draw_rank(ds: xr.Dataset) -> look.Page:
    """Panels of `mean_rank`, colours as in `draw_specialization`."""
    return draw_curves(measure_rank(ds), says=captions.RANKS)


def _by_layer(needed: xr.Dataset, measure: Callable[[xr.Dataset], xr.DataArray]) -> xr.Dataset:
    hidden = needed.isel(layer=slice(0, -1)) if "layer" in needed.dims and needed.sizes["layer"] > 1 else needed
    values = measure(hidden)
    return measure_curves(values.to_dataset().assign_attrs(needed.attrs), str(values.name))


def _lowest_band(measured: xr.Dataset, name: str, ax: Axes | None, color: str) -> Axes:
    layout.require_point(measured, name)
    values = measured[name]
    values = values.isel(layer=0) if "layer" in values.dims else values
    ax = panels.spread(values, ax=ax, color=color)
    ax.set_ylabel(panels.axis_label(values))
    return ax


def measure_winners(archive: xr.Dataset) -> xr.Dataset:
    """``winner_rank`` of one layer at every epoch, (swept..., seed, epoch, teacher_node), loaded."""
    if "winner_rank" in archive:
        return archive
    ranks = lottery.winner_rank(in_lowest_layer(variables_of(archive, "winners")))
    return xr.Dataset({"winner_rank": ranks}, attrs=captions.told(archive)).load()


def winners(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Rank of each teacher node's final winner against epoch; 0 at the start if luck decided.

    Source: Tian et al. (2019), Figures 19 to 21.
    """
    layout.require_point(ds, "winners")
    ax = panels.nodes(layout.unpadded(measure_winners(ds))["winner_rank"], ax=ax)
    ax.update_datalim([(float(ax.dataLim.x0), 0.0)], updatex=False)  # set_ylim would cut panels that share the axis
    ax.autoscale_view(scalex=False)
    return ax


@look.styled
def draw_winners(ds: xr.Dataset) -> look.Page:
    """Panels of `winners`."""
    return by_teacher_node(measure_winners(ds), winners, f"Rank of each teacher node's final winner ({captions.RANKS})")
