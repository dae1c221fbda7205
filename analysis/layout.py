"""Lays out panels on a page: a sweep's dimensions and the words for its points, a panel per point, common legends."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import SubFigure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from tsdyn.analysis import captions, panels
from tsdyn.analysis import style as look

from tsdyn import vocabulary
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.experiment.sweep_axes import POINT

#: Height of a row of panels in inches on paper, by the number of columns.
HEIGHTS = {1: 2.2, 2: 2.0, 3: 1.75}
MAX_PANELS = 48
#: Most columns of panels on a page.
MOST_COLUMNS = 5
#: Dimensions that measures add; a dimension that is neither one of these nor the schema's is a swept key.
_MEASURED = ("class", "bound")

#: Draws one panel from what was measured.
Panel = Callable[[xr.Dataset, Axes], object]


class Ways(TypedDict):
    """Which dimensions run along columns and which along rows."""

    across: Sequence[str]
    down: Sequence[str]


def unpadded(ds: xr.Dataset) -> xr.Dataset:
    """One point without padding: nodes cut to the width of its own layer, not the widest of the sweep."""
    ends = {dim: c for dim, c in vocabulary.NODE_WIDTHS.items() if dim in ds.dims and c in ds.coords}
    return ds.isel({dim: slice(0, int(ds[c].max())) for dim, c in ends.items()})


def swept(ds: xr.Dataset | xr.DataArray) -> tuple[str, ...]:
    """Names of the swept dimensions of an archive or of a Dataset measured from one."""
    return tuple(dim for dim in swept_dimensions(ds) if dim not in _MEASURED)


def require_point(ds: xr.Dataset, figure: str) -> None:
    """Raise ValueError, naming the dimensions, if `ds` holds several points of a sweep."""
    left = swept(ds)
    if left:
        raise ValueError(f"{figure}: {', '.join(left)} left; one set of axes shows a single point, select one")


def points(ds: xr.Dataset | xr.DataArray, dims: Iterable[str]) -> list[dict[str, Any]]:
    """Every combination of labels along `dims`."""
    dims = tuple(dims)
    return [dict(zip(dims, values, strict=True)) for values in itertools.product(*(ds[d].values for d in dims))]


def name_of(ds: xr.Dataset | xr.DataArray, point: Mapping[str, Any]) -> str:
    """Words for a point, such as ``3x as many student nodes as teacher nodes, polarity p = 0``.

    For listed points, of the keys that vary among them.
    """
    named: dict[str, Any] = {}
    for dim, value in point.items():
        along = listed(ds) if dim == POINT else []
        named |= {key: ds[key].sel({POINT: value}).item() for key in along} if along else {dim: value}
    return panels.plain(", ".join(captions.words(str(dim), v) for dim, v in named.items()))


def short(value: Any) -> str:
    """A label without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(ds: xr.Dataset | xr.DataArray) -> list[str]:
    """Keys that vary along ``point``."""
    return [str(c) for c in ds.coords if ds[c].dims == (POINT,) and c != POINT and c not in vocabulary.COORDINATES]


class Cell(NamedTuple):
    """One panel of a figure: the name of its drawing function, of which part of the measured data, and its title."""

    panel: str
    at: Mapping[str, Any] = {}
    title: str = ""


def arrange(
    measured: xr.Dataset,
    drawing: Mapping[str, Panel],
    rows: Sequence[Sequence[Cell | None]],
    *,
    says: str,
    spread: captions.Spread,
    height: float | int | None = None,
    columns: Literal[1, 2] | None = None,
    share_x: bool | Literal["row", "col"] = False,
    share_y: bool | Literal["row", "col"] = False,
    widths: Sequence[float | int] | None = None,
    key: str | None = "",
    paper: Mapping[str, Any] | None = None,
) -> look.Page:
    """Page with one panel per cell, row by row, lettered A, B, ...; axes that panels share are labelled once.

    Args:
        measured: What was measured.
        drawing: Name of a panel → the function that draws it.
        rows: Cells; None leaves a place empty.
        says: What the figure shows, for its caption.
        spread: What stands for the spread over seeds.
        height: Of a row, in inches on paper.
        columns: Width in columns of the paper; two unless there is one panel in a row.
        share_x: Panels that have the same horizontal axis, as for `matplotlib.figure.Figure.subplots`.
        share_y: The same for the vertical one.
        widths: Relative widths of columns.
        key: Title of the legend above the panels; None for no legend.
        paper: Experiments by scale, for the caption.
    """
    across = max(len(row) for row in rows)
    page = look.page(columns or (1 if across == 1 else 2), (height or HEIGHTS.get(across, 1.6)) * len(rows) + 0.15)
    cells = page.body.subplots(len(rows), across, squeeze=False, sharex=share_x, sharey=share_y, width_ratios=widths)
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz")
    several = sum(cell is not None for row in rows for cell in row) > 1
    for row, places in zip(rows, cells, strict=True):
        for cell, ax in itertools.zip_longest(row, places):
            if cell is None:
                ax.set_axis_off()
                continue
            drawing[cell.panel](measured.sel(cell.at) if cell.at else measured, ax)
            heading(ax, cell.title, next(letters) if several else "")
    once(page, cells, share_x, share_y)
    if key is not None:
        legend(page, key)
    return told(page, measured, says, spread, paper)


def told(
    page: look.Page, measured: xr.Dataset, says: str, spread: captions.Spread, paper: Mapping[str, Any] | None
) -> look.Page:
    """The page with its caption and with where its numbers are from; arguments as of `arrange`."""
    if any(marks.get_gid() == panels.SIGNS for ax in page.axes for marks in ax.collections):
        says = f"{says.rstrip('.')}; minus signs: below a quarter of the scale's negative end"
    page.say(captions.caption(measured, says, spread, paper=paper))
    page.provenance = captions.provenance(measured)
    return page


def heading(ax: Axes, title: str, letter: str = "") -> None:
    """Set the title of a panel, at its left, after its bold letter, in lines that fit its width."""
    whole = f"{letter} {title}".strip()
    size = float(ax.title.get_fontsize())
    spec = ax.get_gridspec()
    width = ax.figure.figure.get_figwidth() / (1 if spec is None else spec.ncols)
    text = "\n".join(look.wrapped(whole, size, 0.86 * width))
    if letter:
        text = rf"$\mathbf{{{letter}}}$" + text[1:]
    ax.set_title(text, loc="left")


def once(
    page: look.Page,
    cells: NDArray,
    share_x: bool | Literal["row", "col"],
    share_y: bool | Literal["row", "col"],
    *,
    part: SubFigure | None = None,
) -> None:
    """Label axes that panels share once: for the page where all are the same, or for that `part`, else for each row."""
    body = page.body if part is None else part
    drawn = [ax for ax in cells.flat if ax.axison]
    if share_x:
        _hide_ticks(cells, "x", share_x)
    if share_y:
        _hide_ticks(cells, "y", share_y)
    for axis, side in (("x", 1), ("y", 0)):
        texts = {getattr(ax, f"get_{axis}label")() for ax in drawn}
        length = page.get_figwidth() if axis == "x" else page.get_figheight()
        if len(texts) == 1 and cells.shape[side] > 1:
            for ax in drawn:
                ax.set(**{f"{axis}label": ""})
            getattr(body, f"sup{axis}label")("\n".join(look.wrapped(texts.pop(), look.points(7.5), 0.85 * length)))
            continue
        for line in cells if axis == "y" else cells.T:
            own = [ax for ax in line if ax.axison]
            if axis == "x":
                own.reverse()
            same = len({getattr(ax, f"get_{axis}label")() for ax in own}) == 1
            for position, ax in enumerate(own):
                text = getattr(ax, f"get_{axis}label")()
                fit = look.wrapped(
                    text, getattr(ax, f"{axis}axis").label.get_fontsize(), 0.8 * length / cells.shape[side]
                )
                ax.set(**{f"{axis}label": "" if same and position else "\n".join(fit)})


def _hide_ticks(cells: NDArray, axis: str, shared: bool | Literal["row", "col"]) -> None:
    """Leave tick labels only where no panel that shares the axis stands below or to the left."""
    for (row, column), ax in np.ndenumerate(cells):
        if axis == "x":
            hidden = shared != "row" and any(other.axison for other in cells[row + 1 :, column])
        else:
            hidden = shared != "col" and column > 0
        if hidden and ax.axison:
            ax.tick_params(axis=axis, which="both", **{f"label{'bottom' if axis == 'x' else 'left'}": False})
            getattr(ax, f"{axis}axis").get_offset_text().set_visible(False)


class _FewDecades(LogLocator):
    """Ticks at a few powers of ten; over less than two decades at 1, 2 and 5 of each, over less than a third at few."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        span = float(np.log10(vmax / vmin)) if 0 < vmin < vmax else 9.0
        if span < 0.7:
            return MaxNLocator(nbins=3).tick_values(vmin, vmax)
        self.set_params(subs=(1.0, 2.0, 5.0) if span < 1.5 else (1.0,), numticks=6 if span < 1.5 else 5)
        return super().tick_values(vmin, vmax)


class _Powers(Formatter):
    """Numbers as they are where all of an axis are between 0.001 and 10,000, else all as powers of ten."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        if value <= 0 or self.axis is None:
            return ""
        low, high = sorted(self.axis.get_view_interval())
        if low > 9e-4 and high < 3e4:
            return f"{value:g}"
        power = int(np.floor(np.log10(value) + 1e-9))
        front = value / 10.0**power
        return rf"$10^{{{power}}}$" if abs(front - 1) < 1e-6 else rf"${front:g}\times 10^{{{power}}}$"


def decades(ax: Axes, axis: str = "y") -> None:
    """Make the axis ``x`` or ``y`` logarithmic, with few ticks that are read at once."""
    getattr(ax, f"set_{axis}scale")("log")
    own = getattr(ax, f"{axis}axis")
    own.set_major_locator(_FewDecades())
    own.set_major_formatter(_Powers())
    own.set_minor_formatter(NullFormatter())


def legend(page: look.Page, title: str = "", *, handles: Sequence[Any] | None = None) -> None:
    """Add one legend for all panels above them, of each label once; none if there is a single line and no title."""
    found: dict[str, Any] = {}
    if handles is None:
        for ax in page.axes:
            for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
    else:
        found = {handle.get_label(): handle for handle in handles}
    if len(found) < 2 and not (found and title):
        return
    page.legend_below(list(found.values()), list(found), title)


def grid(
    ds: xr.Dataset,
    draw: Callable[[dict[str, Any], Axes], object],
    *,
    title: str,
    across: Sequence[str],
    down: Sequence[str] = (),
    share: bool = True,
    spread: captions.Spread = "curves",
) -> look.Page:
    """Page with one panel per point of the dimensions `across` and `down`; a single row of many goes over several.

    Raises:
        ValueError: if there are more than `MAX_PANELS`.
    """
    columns, rows = points(ds, across), points(ds, down)
    if len(columns) * len(rows) > MAX_PANELS:
        raise ValueError(
            f"{title}: {len(columns) * len(rows)} panels are more than {MAX_PANELS}; select a part of the sweep first"
        )
    cells: list[list[Cell | None]] = [
        [Cell("panel", {}, name_of(ds, {**column, **row})) for column in columns] for row in rows
    ]
    chosen = [{**column, **row} for row in rows for column in columns]
    most = MOST_COLUMNS if len(columns) % 4 else 4
    if len(columns) > most:
        flat = [cell for row in cells for cell in row]
        broken = -(-len(columns) // -(-len(columns) // most))
        cells = [
            flat[i : i + broken] + [None] * (broken - len(flat[i : i + broken])) for i in range(0, len(flat), broken)
        ]
    left = iter(chosen)
    return arrange(
        ds, {"panel": lambda _, ax: draw(next(left), ax)}, cells, says=title, spread=spread, share_x=share,
        share_y=share, key=None,
    )  # fmt: skip


def two_ways(swept: Sequence[str]) -> Ways:
    """Layout with the first swept key along columns and the rest along rows."""
    return {"across": swept[:1], "down": swept[1:]}


def shade_bar(page: look.Page, labels: Sequence[int], text: str) -> None:
    """Add the colour bar of `style.shade` for nodes with these consecutive `labels`: one step per node, by number."""
    numbers, count = panels.node_numbers(labels), len(labels)
    if count == 1:
        return
    shades = ListedColormap([look.shade(i, count) for i in range(count)])
    bar = page.body.colorbar(
        ScalarMappable(Normalize(numbers[0] - 0.5, numbers[-1] + 0.5), shades), ax=page.axes, label=text, aspect=30
    )
    bar.set_ticks(panels.node_ticks(numbers))


def place(ds: xr.Dataset) -> str:
    """Description of a slice: its swept keys, seed, layer and epoch that have a single value."""
    own = [c for c in ds.coords if ds[c].ndim == 0 and c not in vocabulary.COORDINATES and c not in _MEASURED]
    keys = [c for c in own if c not in vocabulary.DIMENSIONS and c != POINT]
    higher = {"layer": int(ds["layer"])} if "layer" in own and int(ds["layer"]) > 1 else {}
    return name_of(ds, {str(c): ds[c].item() for c in keys} | higher)


def headed(text: str, ds: xr.Dataset) -> str:
    """Title with the description of a slice appended."""
    at = place(ds)
    return f"{text}; {at}" if at else text
