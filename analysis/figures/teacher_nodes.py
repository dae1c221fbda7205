"""How well each teacher node is recovered: the L-shape, success rates, and recovery over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels, specialization
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.reading import in_lowest_layer, variables_of

#: Most lines in one panel: every colour in every style.
MAX_LINES = len(panels.PALETTE) * len(panels.STYLES)


def measure_l_shape(archive: xr.Dataset) -> xr.Dataset:
    """``student_specialization`` and ``fanout_norm`` of one layer at the last epoch, (swept..., seed, node)."""
    if "student_specialization" in archive:
        return archive
    last = in_lowest_layer(variables_of(archive, "l-shape").isel(epoch=-1)).load()
    return xr.Dataset(
        {
            "student_specialization": specialization.student_specialization(last),
            "fanout_norm": last["fanout_norm"],
        },
        attrs=captions.told(archive),
    )


def l_shape(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Fan-out norm against best correlation, one point per student node, one colour per seed.

    Specialized nodes lie at correlation 1 with any norm, the others near norm 0: the L of Tian (2020), Figure 5.
    """
    layout.require_point(ds, "l_shape")
    measured = measure_l_shape(ds)
    return panels.points(measured["student_specialization"], measured["fanout_norm"], ax=ax)


@look.styled
def draw_l_shape(ds: xr.Dataset) -> look.Page:
    """Panels of `l_shape`, students wider from left to right; each row has its own scale of norms."""
    measured = measure_l_shape(ds)
    title = (
        f"Fan-out norm against best correlation of each student node, a colour per seed, epoch {int(measured['epoch'])}"
    )
    swept = layout.swept(measured)
    rows = layout.points(measured, swept[1:])
    columns = layout.points(measured, swept[:1])
    if len(columns) > layout.MOST_COLUMNS or len(rows) * len(columns) > layout.MAX_PANELS:
        return layout.grid(
            measured, lambda at, ax: l_shape(measured.sel(at), ax=ax), title=title, spread="points",
            **layout.two_ways(swept),
        )  # fmt: skip
    cells = [[layout.Cell("l-shape", c | r, layout.name_of(measured, c | r)) for c in columns] for r in rows]
    return layout.arrange(
        measured, {"l-shape": lambda own, ax: l_shape(own, ax=ax)}, cells, says=layout.headed(title, measured),
        spread="points", share_x=True, share_y="row", key=None,
    )  # fmt: skip


def measure_success_rate(archive: xr.Dataset, *, early: int = 5) -> xr.Dataset:
    """``success_rate`` and its ``success_interval`` at the recorded epoch nearest `early` and at the last."""
    if "success_rate" in archive:
        return archive
    needed = variables_of(archive, "success-rate")
    epochs = needed["epoch"].values
    chosen = sorted({int(np.abs(epochs - early).argmin()), len(epochs) - 1})
    low = in_lowest_layer(needed.isel(epoch=chosen)).load()
    return xr.Dataset(
        {
            "success_rate": specialization.success_rate(low),
            "success_interval": specialization.success_interval(low),
        },
        attrs=captions.told(archive),
    )


#: Distance of curves that would coincide, as a share.
DODGE = 0.02


def dodged(position: int, count: int) -> float:
    """Shift of the curve at `position` of `count` in one panel, symmetric about 0."""
    return DODGE * (position - (count - 1) / 2)


def success_rate(
    ds: xr.Dataset,
    *,
    ax: Axes | None = None,
    color: str = panels.PALETTE[0],
    label: str = "",
    marker: str = "o",
    shift: float | int = 0.0,
) -> Axes:
    """Share of seeds in which each teacher node is recovered; last epoch solid with its 95 % interval, others dotted.

    Source: Tian (2020), Figure 7.

    Args:
        ds: One point of a sweep.
        ax: Axes.
        color: Colour of all its lines.
        label: Text in the legend, before the epoch.
        marker: Shape of the marks of nodes, hollow where the line is dotted.
        shift: Added to the shares, see `dodged`.
    """
    layout.require_point(ds, "success_rate")
    measured = layout.unpadded(measure_success_rate(ds))
    ax = panels.axes(ax)
    epochs = np.atleast_1d(measured["epoch"].values)
    for epoch, line in zip(epochs[::-1], ("-", ":", "--"), strict=False):
        now = measured.sel(epoch=epoch)
        interval = now["success_interval"] if line == "-" and "success_interval" in now else None
        name = f"{label}, epoch {epoch}" if label else f"epoch {epoch}"
        own: dict[str, Any] = {"linestyle": line, "label": name, "marker": marker, "shift": shift}
        if line != "-":
            own |= {"linewidth": look.points(0.9), "markersize": look.points(1.8), "markerfacecolor": "white"}
            own |= {"markeredgewidth": look.points(0.5)}
        panels.rate(now["success_rate"], interval, ax=ax, color=color, **own)
    return ax


@look.styled
def draw_success_rate(ds: xr.Dataset) -> look.Page:
    """Panels of `success_rate`, one colour per student width, or else per value of the last swept key."""
    measured = measure_success_rate(ds)
    swept = layout.swept(measured)
    widths = [dim for dim in swept if dim in ("overrealization", "widths")][:1] or list(swept[-1:])
    curves = lines_of(measured, widths)

    def draw(at: dict[str, Any], ax: Axes) -> None:
        for position, point in enumerate(curves):
            name = layout.name_of(measured, point)
            one, shift = measured.sel({**at, **point}), dodged(position, len(curves))
            success_rate(one, ax=ax, color=panels.colour(position), label=name, shift=shift)

    others = [d for d in swept if d not in widths]
    title = layout.headed(f"Share of seeds in which each teacher node is recovered; {captions.NODES}", measured)
    page = layout.grid(measured, draw, title=title, spread="shares", **layout.two_ways(others))
    layout.legend(page)
    return page


def lines_of(measured: xr.Dataset, dims: Sequence[str]) -> list[dict[str, Any]]:
    found = layout.points(measured, dims)
    if len(found) > MAX_LINES:
        raise ValueError(f"{len(found)} lines are more than {MAX_LINES} in a panel; select a part of the sweep first")
    return found


def measure_recovery(archive: xr.Dataset) -> xr.Dataset:
    """``specialization`` of one layer at every epoch, (swept..., seed, epoch, teacher_node), loaded."""
    if "specialization" in archive:
        return archive
    best = specialization.specialization(in_lowest_layer(variables_of(archive, "recovery")))
    return xr.Dataset({"specialization": best}, attrs=captions.told(archive)).load()


def recovery(ds: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Best correlation of each teacher node against epoch, dark to light from the first to the last.

    Source: Tian (2020), Figure 8.
    """
    layout.require_point(ds, "recovery")
    ax = panels.nodes(layout.unpadded(measure_recovery(ds))["specialization"], ax=ax)
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.05)
    return ax


@look.styled
def draw_recovery(ds: xr.Dataset) -> look.Page:
    """Panels of `recovery`."""
    return by_teacher_node(measure_recovery(ds), recovery, "Best correlation of each teacher node over training")


def by_teacher_node(measured: xr.Dataset, panel: Callable[..., Axes], title: str) -> look.Page:
    """Panels of the sweep, one shade per teacher node."""
    page = layout.grid(
        measured, lambda at, ax: panel(measured.sel(at), ax=ax),
        title=layout.headed(f"{title}; {captions.NODES}", measured), **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    layout.shade_bar(page, layout.unpadded(measured)["teacher_node"].values.tolist(), "teacher node")
    return page
