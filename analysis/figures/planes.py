"""Boundaries of nodes in the plane of a two-dimensional input, still or animated."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.figures.reading import variables_of
from tsdyn.analysis.identity import per_point

from tsdyn import layer as one_layer
from tsdyn.archive.selecting import lowest_layer

#: Epochs shown as panels.
SNAPSHOTS = 4


def snapshots(epochs: NDArray) -> NDArray:
    """Positions of up to `SNAPSHOTS` epochs, in geometric steps from the first to the last: most happens early."""
    last = float(epochs[-1])
    wanted = [0.0, last ** (1 / 3) * 0.6, last ** (1 / 3) * 1.8, last] if last > 20 else np.linspace(0, last, SNAPSHOTS)
    return np.unique([int(np.abs(epochs - epoch).argmin()) for epoch in wanted])


def measure_boundaries(archive: xr.Dataset) -> xr.Dataset:
    """Weights and biases of the lowest layer of the first seed and its fan-out norms, at every epoch.

    Raises:
        ValueError: if inputs are not in the plane.
    """
    if "extent" in archive:
        return archive
    needed = variables_of(archive, "boundaries").isel(seed=0)
    if "layer" not in needed.dims:
        if int(needed["layer"]) != 1:
            raise ValueError(f"boundaries: drawn for the lowest layer only, not layer {int(needed['layer'])}")
    else:
        needed = one_layer(needed, lowest_layer(needed))
    inputs = int(needed["input_width"].max())
    if inputs != 2:
        raise ValueError(
            f"boundaries: inputs have {inputs} dimensions, and a map needs the plane: [teacher] widths = [2, ...]"
        )
    measured = needed.isel(input_node=slice(0, 2)).load()
    extent = 3.0 * per_point(archive, lambda point: point.data.std)
    words = {"units": "1", "long_name": "three standard deviations of the inputs", "source": "tsdyn"}
    return measured.assign(extent=extent.assign_attrs(words)).assign_attrs(captions.told(archive))


def boundaries(ds: xr.Dataset, *, ax: Axes | None = None, strongest: float | None = None) -> Axes:
    """Boundaries of the nodes of the lowest layer for one seed (the first) at one epoch (the last).

    Teacher nodes are dashed and black; student nodes are coloured, wider and darker with larger fan-out norm ‖v_k‖,
    which the legend gives.  The axes span three standard deviations of the inputs.  Source: Tian (2020), Figure 3.

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
    for axis in "xy":
        panels.whole_numbers(ax, axis)
    strength = (now["fanout_norm"] / strongest).fillna(0.0).clip(0, 1)
    panels.lines(now["weight"], now["bias"], strength, ax)
    panels.lines(
        now["teacher_weight"],
        now["teacher_bias"],
        None,
        ax,
        color="black",
        linestyle=(0, (5, 3)),
        linewidth=look.points(1.0),
    )
    return ax


def _boundary_names(norms: xr.DataArray) -> list[str]:
    """Legend entries of the student nodes with their fan-out norms, if there is one point and few nodes."""
    if norms.ndim == 1 and norms.size <= 2 * len(panels.PALETTE):
        numbers = panels.node_numbers(norms["node"].values)
        return [f"student {j}: ‖v‖ = {float(norm):.2g}" for j, norm in zip(numbers, norms, strict=True)]
    return ["student node"]


def _boundary_key(page: look.Page, measured: xr.Dataset) -> None:
    """Legend: colours of student nodes with their fan-out norms at the last epoch, where there is room for them."""
    from matplotlib.lines import Line2D

    dashed = Line2D([], [], color="black", linestyle="--", linewidth=look.points(1), label="teacher node")
    last = measured.isel(epoch=-1) if "epoch" in measured.dims else measured
    names = _boundary_names(layout.unpadded(last)["fanout_norm"])
    own = [Line2D([], [], color=panels.colour(k), label=name) for k, name in enumerate(names)]
    layout.legend(page, handles=[dashed, *own])


@look.styled
def draw_boundaries(ds: xr.Dataset) -> look.Page:
    """Panels of `boundaries` at up to `SNAPSHOTS` epochs, one row per point; widths are comparable along a row."""
    measured = measure_boundaries(ds)
    chosen = snapshots(np.atleast_1d(measured["epoch"].values))
    shown = measured.isel(epoch=chosen)

    def draw(at: dict[str, Any], ax: Axes) -> None:
        point = {dim: value for dim, value in at.items() if dim != "epoch"}
        strongest = float(np.fmax.reduce(measured["fanout_norm"].sel(point).values, axis=None)) or 1.0
        boundaries(shown.sel(at), ax=ax, strongest=strongest)

    title = (
        "Boundaries of student nodes (wide: large ‖v‖) and teacher nodes (dashed), seed "
        f"{int(measured['seed'])}; {captions.NODES}"
    )
    figure = layout.grid(
        shown, draw, across=("epoch",), down=layout.swept(measured), title=layout.headed(title, measured),
        spread="none",
    )  # fmt: skip
    _boundary_key(figure, shown)
    return figure


@look.styled
def animate_boundaries(ds: xr.Dataset, *, interval: int = 150) -> FuncAnimation:
    """Animation of `boundaries` over all recorded epochs of one point; ``.save("x.gif", writer="pillow")`` writes it.

    Args:
        ds: One point of a sweep.
        interval: Milliseconds per frame.

    Raises:
        ValueError: if several points are left.
    """
    layout.require_point(ds, "animate_boundaries")
    measured = measure_boundaries(ds)
    strongest = float(np.fmax.reduce(measured["fanout_norm"].values, axis=None)) or 1.0
    figure = look.page(1, 3.4)
    ax = figure.body.subplots()
    _boundary_key(figure, measured)

    def frame(position: int) -> list[Any]:
        ax.clear()
        now = measured.isel(epoch=position)
        boundaries(now, ax=ax, strongest=strongest)
        ax.set_title(layout.headed(f"seed {int(now['seed'])}, epoch {int(now['epoch'])}", now))
        names = _boundary_names(layout.unpadded(now)["fanout_norm"])
        for text, name in zip(figure.legends_below[0].get_texts()[1:], names, strict=True):
            text.set_text(name)
        return []

    frame(measured.sizes["epoch"] - 1)
    for _ in range(2):  # the second pass knows how wide the legend is
        figure.draw_without_rendering()
    figure.set_layout_engine(
        "none"
    )  # the layout is fixed once: computing it for every frame would take most of the time
    frame(0)
    return FuncAnimation(figure, frame, frames=measured.sizes["epoch"], interval=interval, init_func=list)
