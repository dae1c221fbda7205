"""Drawing functions for one set of axes each, from labelled, measured arrays; they compute nothing.

Colours: Okabe & Ito's palette for unordered things, viridis for ordered ones, RdBu for signed values, cividis for
shares.  All can be distinguished with every common kind of colour vision, and the last three also in print without
colour (RdBu's signs only by its labels).  When there are more lines than colours, line styles distinguish them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tsdyn.schema import printable

#: Okabe & Ito (2008); yellow, faint on white, comes last.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
STYLES = ("-", "--", ":", "-.")
#: Upper end of viridis that is used, since its yellow end is faint on white.
LIGHTEST = 0.92
#: A heat map of at most this many cells shows their values as numbers.
NUMBERED = 60


def axes(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new figure that no window shows."""
    return Figure(figsize=(4.5, 3.5), layout="constrained").subplots() if ax is None else ax


def axis_label(array: xr.DataArray) -> str:
    """Axis label from ``long_name`` and the units, if there are any."""
    name, units = array.attrs.get("long_name", array.name), array.attrs.get("units", "1")
    return plain(f"{name}" if units in ("1", "epoch") else f"{name} [{units}]")


def plain(text: str) -> str:
    """Text escaped so that matplotlib shows it literally: no formulas, no control characters."""
    return printable(text).replace("$", r"\$")


def colour(position: int) -> str:
    return PALETTE[position % len(PALETTE)]


def style(position: int) -> str:
    """Line style of the line at `position`, which changes when the colours repeat."""
    return STYLES[position // len(PALETTE) % len(STYLES)]


def shade(position: int, count: int) -> Any:
    """Colour of an item in an ordered sequence, from dark to light."""
    return colormaps["viridis"](LIGHTEST * position / max(1, count - 1))


def points(x: xr.DataArray, y: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Scatter plot of `y` ≥ 0 against the correlation `x`, both (seed, node): a colour for each seed."""
    ax = axes(ax)
    for position, seed in enumerate(x["seed"].values):
        drawn = ax.scatter(
            x.sel(seed=seed), y.sel(seed=seed), s=9, alpha=0.6, linewidths=0, color=colour(position), label=f"{seed}"
        )
        drawn.sticky_edges.y.append(0.0)
    # set_ylim would stop autoscaling, and panels that share the axis would be cut at the first one's upper limit
    ax.update_datalim([(0.0, 0.0)], updatex=False)
    lowest = float(np.fmin.reduce(x.values, axis=None, initial=0.0))  # at the start all correlations may be negative
    ax.set(xlim=(min(-0.05, lowest - 0.05), 1.05), xlabel=axis_label(x), ylabel=axis_label(y))
    ax.autoscale_view(scalex=False)
    return ax


def band(
    quantiles: xr.DataArray,
    *,
    along: str = "epoch",
    ax: Axes | None = None,
    color: Any = PALETTE[0],
    linestyle: str = "-",
    label: str | None = None,
) -> Axes:
    """Median line against `along` and the band between the lowest and highest quantile; (`along`, quantile).

    A single position is drawn as a marker with an error bar, since a line needs two.
    """
    ax = axes(ax)
    low, middle, high = (quantiles.isel(quantile=i) for i in (0, quantiles.sizes["quantile"] // 2, -1))
    x = quantiles[along]
    if x.size == 1:
        ax.errorbar(x, middle, yerr=[middle - low, high - middle], color=color, label=label, marker="o", markersize=4)
    else:
        ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        ax.plot(x, middle, color=color, label=label, linewidth=1.4, linestyle=linestyle)
    ax.set(xlabel=along)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def rate(
    share: xr.DataArray,
    interval: xr.DataArray | None = None,
    *,
    ax: Axes | None = None,
    color: str = PALETTE[0],
    beside: float = 0.0,
    **line: Any,
) -> Axes:
    """Plot a share in [0, 1] with its interval against teacher node, counted from 1; (teacher_node,), (…, bound).

    The interval is offset by `beside` from its node, so that those of several curves do not overlap.
    """
    ax = axes(ax)
    nodes = share["teacher_node"] + 1
    if interval is not None:
        low, high = (interval.isel(bound=i) for i in (0, 1))
        ax.vlines(nodes + beside, low, high, color=color, alpha=0.45, linewidth=1.5)
    ax.plot(nodes, share, color=color, marker="o", markersize=2.5, linewidth=1.2, **line)
    ax.set(ylim=(-0.05, 1.05), xlabel="teacher node", ylabel=axis_label(share))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def nodes(values: xr.DataArray, *, ax: Axes | None = None, linewidth: float = 1.2) -> Axes:
    """One line per teacher node against epoch, dark to light from the first node to the last; (epoch, teacher_node)."""
    ax = axes(ax)
    count = values.sizes["teacher_node"]
    mark = "o" if values.sizes["epoch"] == 1 else None
    for j in range(count):
        ax.plot(
            values["epoch"], values.isel(teacher_node=j),
            color=shade(j, count), linewidth=linewidth, marker=mark, markersize=4,
        )  # fmt: skip
    ax.set(xlabel="epoch", ylabel=axis_label(values))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def table(
    values: xr.DataArray,
    *,
    ax: Axes | None = None,
    limits: tuple[float | int, float | int],
    cmap: str,
    bar: bool = True,
) -> Axes:
    """Heat map of values (row, column), NaN in grey; with a colour bar of its own if `bar`."""
    ax = axes(ax)
    colours = colormaps[cmap].with_extremes(bad="0.8")
    image = ax.imshow(
        np.ma.masked_invalid(values.values), vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    if bar:
        ax.figure.colorbar(image, ax=ax, label=axis_label(values))
    return ax


def name_ticks(ax: Axes, axis: str, labels: Sequence[str]) -> None:
    """Label the positions 0, 1, 2, ... of the axis ``x`` or ``y`` with category names."""
    long = axis == "x" and sum(map(len, labels)) > 28
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if long else {}
    getattr(ax, f"set_{axis}ticks")(range(len(labels)), labels=labels, fontsize=8, **turned)


def stack(shares: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Stacked shares that sum to 1 against one dimension: areas over ``epoch``, bars otherwise; (position, class)."""
    ax = axes(ax)
    along = str(next(dim for dim in shares.dims if dim != "class"))
    shares = shares.transpose("class", along)
    classes = [str(name) for name in shares["class"].values]
    colours = [shade(i, len(classes)) for i in range(len(classes))]
    if along == "epoch" and shares.sizes[along] > 1:
        ax.stackplot(shares[along], shares.values, labels=classes, colors=colours, linewidth=0)
        ax.margins(x=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        ends = shares.cumsum("class").fillna(0.0).values
        for i, name in enumerate(classes):
            start = ends[i - 1] if i else np.zeros(len(ends[0]))
            ax.bar(range(len(ends[0])), ends[i] - start, bottom=start, width=0.8, color=colours[i], label=name)
        name_ticks(ax, "x", [f"{v:g}" if isinstance(v, float) else str(v) for v in shares[along].values.tolist()])
    ax.set(ylim=(0, 1), xlabel=along, ylabel="share of seeds")
    return ax


def numbers(values: xr.DataArray, ax: Axes) -> None:
    """Write the values of a heat map of shares in [0, 1] into its cells, if there is room."""
    if values.size > NUMBERED:
        return
    for (row, column), value in np.ndenumerate(values.values):
        if np.isfinite(value):
            ax.text(
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=8,
                color="white" if value < 0.5 else "black",
            )  # fmt: skip


def lines(weight: xr.DataArray, bias: xr.DataArray, strength: xr.DataArray | None, ax: Axes, **line: Any) -> None:
    """Boundary w·x + b = 0 of each node in the plane; (node, input_node), (node,); `strength` in [0, 1]: line widths.

    A node of zero weight has no boundary.
    """
    for position in range(weight.shape[0]):
        (w1, w2), b = weight.values[position], float(bias.values[position])
        length = float(np.hypot(w1, w2))
        if not length > 0:
            continue
        foot = (-b * w1 / length**2, -b * w2 / length**2)
        own = {"color": colour(position), **line}
        if strength is not None:
            share = float(strength.values[position])
            own |= {"linewidth": 0.6 + 2.4 * share, "alpha": 0.35 + 0.65 * share}
        ax.axline(foot, (foot[0] - w2 / length, foot[1] + w1 / length), **own)
