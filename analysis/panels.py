"""Drawing functions for one set of axes each, from labelled, measured arrays; they compute nothing but quantiles.

Colours: `tsdyn.analysis.style`'s palette for unordered things, viridis as far as it is seen on white for ordered ones,
RdBu for signed values (blue is positive, a minus sign on what is clearly negative), cividis for shares.  When there
are more lines than colours, line styles distinguish them; what is marked has a mark of its own, so that a print in grey
can be read.  One rule for the spread over seeds: from five seeds on the median with the middle 80 % as a band,
below every seed as a thin line; shares with Wilson's intervals as a band.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tsdyn.analysis import style as look
from tsdyn.analysis.style import LIGHTEST, PALETTE, shade

from tsdyn.schema import printable

__all__ = [
    "LIGHTEST", "NUMBERED", "PALETTE", "STYLES", "axes", "axis_label", "colour", "formulas", "lines", "mark",
    "name_ends", "name_ticks", "node_numbers", "node_ticks", "nodes", "numbers", "plain", "points", "rate", "shade",
    "signs", "spread", "stack", "style", "table", "whole_numbers",
]  # fmt: skip

STYLES = ("-", "--", ":", "-.")
#: A heat map of at most this many cells shows their values as numbers.
NUMBERED = 60


def axes(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new figure of one column that no window shows."""
    return look.page(1, 2.4).body.subplots() if ax is None else ax


def axis_label(array: xr.DataArray) -> str:
    """Axis label from ``long_name`` and the units, if there are any."""
    name, units = array.attrs.get("long_name", array.name), array.attrs.get("units", "1")
    return formulas(plain(f"{name}" if units in ("1", "epoch") else f"{name} [{units}]"))


def formulas(text: str) -> str:
    """`text` whose symbols with an index, such as ``β*_jj``, are set as formulas, a root with what stands below it.

    Only single letters count as symbols: names of variables stay as they are.
    """

    def formula(found: re.Match[str]) -> str:
        root, letter, star, below = found.groups()
        symbol = f"{letter}{'^*' if star else ''}_{{{below}}}"
        return rf"$\sqrt{{{root.split()[0]}\,{symbol}}}$" if root else f"${symbol}$"

    return re.sub(r"(?:√(E ))?(?<![A-Za-z0-9_$])([^\W\d_])(\*?)_([a-z0-9]{1,2})(?![A-Za-z0-9_])", formula, text)


def plain(text: str) -> str:
    """Text escaped so that matplotlib shows it literally: no formulas, no control characters."""
    return printable(text).replace("$", r"\$")


def colour(position: int) -> str:
    """Colour of the line at `position`; the palette's colours repeat."""
    return PALETTE[position % len(PALETTE)]


def style(position: int) -> str:
    """Line style of the line at `position`, which changes when the colours repeat."""
    return STYLES[position // len(PALETTE) % len(STYLES)]


def mark(position: int) -> str:
    """Shape of the mark at `position`, so that things of different colours differ in grey, too; the shapes repeat."""
    return "osD^vXP"[position % 7]


def whole_numbers(ax: Axes, axis: str = "x", most: int = 5) -> None:
    """Put ticks of the axis ``x`` or ``y`` at whole numbers, at most about `most`."""
    getattr(ax, f"{axis}axis").set_major_locator(MaxNLocator(integer=True, nbins=most, steps=[1, 2, 5, 10]))


def points(x: xr.DataArray, y: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Scatter plot of `y` ≥ 0 against the correlation `x`, both (seed, node): a colour for each seed.

    Points are drawn in an order that does not depend on the seed, so that no seed hides the others.
    """
    ax = axes(ax)
    count = x.sizes["seed"]
    x, y = x.transpose("seed", "node"), y.transpose("seed", "node")
    ranks = np.broadcast_to(np.arange(count)[:, None], x.shape).ravel()
    shuffled = np.random.default_rng(0).permutation(ranks.size)
    drawn = ax.scatter(
        x.values.ravel()[shuffled], y.values.ravel()[shuffled], s=look.points(2.2) ** 2, linewidths=0,
        color=[colour(int(k)) if count <= len(PALETTE) else shade(int(k), count) for k in ranks[shuffled]], gid="nodes",
    )  # fmt: skip
    drawn.sticky_edges.y.append(0.0)
    # set_ylim would stop autoscaling, and panels that share the axis would be cut at the first one's upper limit
    ax.update_datalim([(0.0, 0.0)], updatex=False)
    lowest = float(np.fmin.reduce(x.values, axis=None, initial=0.0))  # at the start all correlations may be negative
    beside = (other for other in ax.get_shared_x_axes().get_siblings(ax) if other is not ax and other.collections)
    left = min([-0.05, lowest - 0.05, *(other.get_xlim()[0] for other in beside)])
    ax.set(xlim=(left, 1.05), xlabel=axis_label(x), ylabel=axis_label(y), xticks=(0.0, 0.5, 1.0))
    ax.autoscale_view(scalex=False)
    return ax


def spread(
    values: xr.DataArray,
    *,
    along: str = "epoch",
    ax: Axes | None = None,
    color: Any = PALETTE[0],
    linestyle: Any = "-",
    label: str | None = None,
    marker: str | None = None,
    band: float = 0.2,
) -> Axes:
    """Draw `values` (seed, `along`) by the rule for spread: median and middle 80 %, or below five seeds every seed.

    A single position is drawn as a marker per seed, or as the median with an error bar, since a line needs two.  The
    opacity of the band is `band`; at 0 there is none.
    """
    ax = axes(ax)
    values = values.expand_dims("seed") if "seed" not in values.dims else values
    values = values.transpose("seed", along)
    x, rows = values[along].values, values.values
    alive = rows[np.isfinite(rows).any(1)]
    one = x.size == 1
    size = look.points(2.6)
    if len(alive) < look.FEWEST_OF_A_BAND:
        for row in alive:
            there = np.isfinite(row)
            ax.plot(
                x[there], row[there], color=color, linestyle=linestyle, linewidth=look.points(0.8), label=label,
                marker="o" if one else marker, markersize=size,
            )  # fmt: skip
            label = None
    else:
        there = np.isfinite(rows).any(0)
        x = x[there]
        low, middle, high = np.nanquantile(np.where(np.isfinite(rows), rows, np.nan)[:, there], look.BAND, axis=0)
        if one:
            ax.errorbar(
                x, middle, yerr=[middle - low, high - middle], color=color, label=label, marker="o", markersize=size
            )
        else:
            if band:
                ax.fill_between(x, low, high, color=color, alpha=band, linewidth=0, gid="band")
            ax.plot(x, middle, color=color, label=label, linestyle=linestyle, marker=marker, markersize=size)
    if along == "epoch":
        whole_numbers(ax)
    ax.set(xlabel=along)
    return ax


def rate(
    share: xr.DataArray,
    interval: xr.DataArray | None = None,
    *,
    ax: Axes | None = None,
    color: str = PALETTE[0],
    marker: str = "o",
    shift: float | int = 0.0,
    **line: Any,
) -> Axes:
    """Plot a share in [0, 1] with its interval as a band against teacher node, from 1; (teacher_node,), (…, bound).

    Where the share is 0 or 1 there is no band: those of curves that coincide there would cover the panel.

    Args:
        share, interval: What is drawn.
        ax: Axes.
        color: Of the curve and its band.
        marker: Shape of the marks of nodes.
        shift: Added to all values, so that curves that coincide are seen beside each other.
        line: Keywords of `matplotlib.axes.Axes.plot`.
    """
    ax = axes(ax)
    nodes = node_numbers(share["teacher_node"].values)
    if interval is not None:
        inside = (share.values > 0) & (share.values < 1)
        low, high = (np.where(inside, interval.isel(bound=i).values, share.values) + shift for i in (0, 1))
        ax.fill_between(nodes, low, high, color=color, alpha=0.15, linewidth=0, gid="band")
    own: dict[str, Any] = {"color": color, "marker": marker, "markersize": look.points(2.2)}
    ax.plot(nodes, share.values + shift, **(own | line))
    ends = node_ticks(nodes)
    ax.set(ylim=(-0.06, 1.06), xlabel="teacher node", ylabel=axis_label(share), xticks=ends)
    return ax


def node_numbers(labels: Any) -> NDArray:
    """Return the numbers that figures give to nodes with these labels: 1 for the label 0, as the papers count."""
    return np.asarray(labels).astype(int) + 1


def node_ticks(numbers: Any) -> list[int]:
    """Return which of consecutive node `numbers` an axis names: the first, the last, and round ones between."""
    first, last = int(numbers[0]), int(numbers[-1])
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(numbers) <= 6 * s or s == 1000)
    between = range(first + step - first % step, last, step)
    return [first, *(n for n in between if last - n >= (step + 1) // 2), *([last] if last > first else [])]


def nodes(values: xr.DataArray, *, ax: Axes | None = None) -> Axes:
    """Lines per teacher node against epoch, dark to light from the first to the last; ([seed,] epoch, teacher_node)."""
    ax = axes(ax)
    count = values.sizes["teacher_node"]
    for j in range(count):
        # as many bands as nodes lie over one another
        spread(values.isel(teacher_node=j), ax=ax, color=shade(j, count), band=0.2 if count <= 5 else 0.08)
    ax.set(xlabel="epoch", ylabel=axis_label(values))
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
    for side in ("top", "right"):
        ax.spines[side].set_visible(True)
    if bar:
        ax.figure.colorbar(image, ax=ax, label=axis_label(values))
    if limits[0] < 0:
        signs(values.values, limits[0], ax)
    return ax


#: Name of the minus signs in a heat map, for captions, which say what they are.
SIGNS = "minus"


def signs(values: NDArray, least: float | int, ax: Axes) -> None:
    """Put minus signs on the cells of a heat map below a quarter of `least` < 0: in grey, −1 and 1 are as dark."""
    rows, columns = np.nonzero(np.nan_to_num(values) < least / 4)
    if rows.size:
        colours = np.where(values[rows, columns] < 0.6 * least, "white", "black")
        size = look.points(min(4.0, 70.0 / values.shape[1]))
        ax.scatter(columns, rows, s=size**2, c=colours, marker="_", linewidths=look.points(0.6), gid=SIGNS)


def name_ends(ax: Axes, values: Mapping[str, float | int]) -> None:
    """Write the name of each curve at its right end, of which its value is given, apart from one another.

    The vertical axis is linear and has its limits.
    """
    low, high = ax.get_ylim()
    apart, lowest = 0.085 * (high - low), low
    places: list[float] = []
    for value in sorted(values.values()):
        places.append(max(float(value), lowest))
        lowest = places[-1] + apart
    over = max(0.0, places[-1] - high)
    for position in range(len(places) - 1, -1, -1):  # what would end above the panel pushes down what is below it
        over = over if position == len(places) - 1 else max(0.0, places[position] - places[position + 1] + apart)
        places[position] -= over
    for name, place in zip(sorted(values, key=lambda name: values[name]), places, strict=True):
        ax.annotate(
            name, (1.0, place), (2, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            size=look.points(6.8),
        )  # fmt: skip


def name_ticks(ax: Axes, axis: str, labels: Sequence[str]) -> None:
    """Label the positions 0, 1, 2, ... of the axis ``x`` or ``y`` with category names."""
    long = axis == "x" and sum(map(len, labels)) > 14
    turned: dict[str, Any] = {"rotation": 90 if len(labels) > 6 else 30, "ha": "center" if len(labels) > 6 else "right"}
    getattr(ax, f"set_{axis}ticks")(range(len(labels)), labels=labels, **(turned if long else {}))


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
        whole_numbers(ax)
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
                column, row, f"{value:.2g}", ha="center", va="center", fontsize=look.points(6.5), gid="in a field",
                color="white" if value < 0.5 else "black",
            )  # fmt: skip


#: Most boundaries that carry a number.
_NUMBERED_LINES = 10


def lines(weight: xr.DataArray, bias: xr.DataArray, strength: xr.DataArray | None, ax: Axes, **line: Any) -> None:
    """Boundary w·x + b = 0 of each node in the plane; (node, input_node), (node,); `strength` in [0, 1]: line widths.

    Boundaries with a strength carry the numbers of their nodes, as far as they are within the axes' limits.  A node of
    zero weight has no boundary.
    """
    numbered = strength is not None and weight.shape[0] <= _NUMBERED_LINES
    for position in range(weight.shape[0]):
        (w1, w2), b = weight.values[position], float(bias.values[position])
        length = float(np.hypot(w1, w2))
        if not length > 0:
            continue
        foot = (-b * w1 / length**2, -b * w2 / length**2)
        own = {"color": colour(position), **line}
        if strength is not None:
            own |= {"linewidth": look.points(0.5 + 2.2 * float(strength.values[position]))}
        ahead = np.array([-w2, w1]) / length
        ax.axline(foot, tuple(np.array(foot) + ahead), **own)
        if numbered:
            _number_line(ax, position, np.array(foot), ahead if ahead @ (1.0, 1e-3) >= 0 else -ahead)


def _number_line(ax: Axes, position: int, foot: NDArray, ahead: NDArray) -> None:
    """Write a node's number on its line, from the left to the right at a place of its own: lines may coincide."""
    limits = np.array([ax.get_xlim(), ax.get_ylim()])
    with np.errstate(divide="ignore", invalid="ignore"):
        crossed = np.sort((limits - foot[:, None]) / ahead[:, None], axis=1)
    first, last = float(np.nanmax(crossed[:, 0])), float(np.nanmin(crossed[:, 1]))
    if not last > first:
        return
    step = 0.08 + 0.1 * (position // 2)
    place = foot + ahead * (first + (last - first) * (1 - step if position % 2 else step))
    ax.text(
        float(place[0]), float(place[1]), str(node_numbers([position])[0]), size=look.points(look.SMALLEST),
        ha="center", va="center", zorder=5, clip_on=True,
        bbox={"boxstyle": "circle,pad=0.12", "facecolor": "white", "linewidth": 0},
    )  # fmt: skip
