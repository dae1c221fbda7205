"""Matrices of nodes by nodes, ordered by best match: correlations and couplings."""

from __future__ import annotations

from typing import Any, Literal, assert_never

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import captions, layout, matching, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.reading import in_lowest_layer, variables_of


def measure_correlation(archive: xr.Dataset) -> xr.Dataset:
    """``correlation`` of the first seed at the last epoch and ``node_order``; (swept..., teacher_node, node)."""
    return _ordered(archive, "correlation")


def correlation_map(ds: xr.Dataset, *, ax: Axes | None = None, bar: bool = True) -> Axes:
    """Correlations of one seed (the first) at one epoch (the last), student nodes ordered by their best teacher node.

    Grey: dead nodes.
    """
    layout.require_point(ds, "correlation_map")
    return _map(measure_correlation(ds), "correlation", 1.0, ax, bar)


@look.styled
def draw_correlation(ds: xr.Dataset) -> look.Page:
    """Panels of `correlation_map`."""
    measured = measure_correlation(ds)
    where = f"Correlation of student and teacher nodes, seed {int(measured['seed'])}, epoch {int(measured['epoch'])}"
    page = layout.grid(
        measured, lambda at, ax: correlation_map(measured.sel(at), ax=ax, bar=False),
        title=layout.headed(where, measured), share=False, spread="none", **layout.two_ways(layout.swept(measured)),
    )  # fmt: skip
    page.body.colorbar(page.axes[0].images[0], ax=page.axes, label="correlation", aspect=30)
    return page


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


@look.styled
def draw_couplings(ds: xr.Dataset) -> look.Page:
    """Maps of β* and H* before and after training, one row per point of the sweep; each pair on one scale."""
    measured = measure_couplings(ds)
    names = {"β*": "A", "H*": "H_star"}
    cells = measured.assign_coords(moment=list(names))

    def draw(at: dict[str, Any], ax: Axes) -> None:
        point = {dim: value for dim, value in at.items() if dim not in ("moment", "epoch")}
        own, name = measured.sel(point), names[at["moment"]]
        largest = float(np.fmax.reduce(np.abs(own[name].values), axis=None, initial=0.0)) or 1.0
        image = _map(own.sel(epoch=at["epoch"]), name, largest, ax, False).images[0]
        bar = ax.figure.colorbar(image, ax=ax, label=str(at["moment"]))
        bar.locator = MaxNLocator(nbins=4)
        bar.update_ticks()

    title = (
        "β* and H* before and after training, student nodes by best teacher node, seed "
        f"{int(measured['seed'])}; {captions.NODES}"
    )
    return layout.grid(
        cells, draw, across=("moment", "epoch"), down=layout.swept(measured), share=False, spread="none",
        title=layout.headed(title, measured),
    )  # fmt: skip


def _ordered(archive: xr.Dataset, figure: Literal["correlation", "couplings"]) -> xr.Dataset:
    if "node_order" in archive:
        return archive
    needed = in_lowest_layer(variables_of(archive, figure).isel(seed=0))
    match figure:
        case "correlation":
            shown = needed.isel(epoch=-1).load()
            last = shown
        case "couplings":
            shown = needed.isel(epoch=sorted({0, needed.sizes["epoch"] - 1})).load()
            last = shown.isel(epoch=-1)
        case other:
            assert_never(other)
    return shown.assign(node_order=matching.node_order(last).drop_vars("epoch")).assign_attrs(captions.told(archive))


def _map(one: xr.Dataset, variable: str, largest: float, ax: Axes | None, bar: bool) -> Axes:
    own = layout.unpadded(one)
    order = own["node_order"].values.astype(int)  # padding comes last and has been cut
    values = own[variable].transpose("teacher_node", "node").isel(node=order[order < own.sizes["node"]])
    ax = panels.table(values, ax=ax, limits=(-largest, largest), cmap="RdBu", bar=bar)
    ax.set(xlabel="student node, by best teacher node", ylabel="teacher node")
    numbers = panels.node_numbers(values["teacher_node"].values)
    ticks = panels.node_ticks(numbers)
    ax.set_yticks([tick - int(numbers[0]) for tick in ticks], labels=[str(tick) for tick in ticks])
    ax.set_xticks([])
    return ax
