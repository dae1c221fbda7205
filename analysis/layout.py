"""Lays out the panels of a sweep: its swept dimensions, names of its points, one panel per point, a common legend."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tsdyn.analysis import panels

from tsdyn import vocabulary
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.experiment.sweep_axes import POINT

#: Size of one panel in inches.
PANEL = (2.7, 2.4)
MAX_PANELS = 48
#: Dimensions that measures add; a dimension that is neither one of these nor the schema's is a swept key.
_MEASURED = ("class", "bound")


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
    """Name of a point, such as ``overrealization 3, polarity 0``; for listed points, the keys that vary among them."""
    named: dict[str, Any] = {}
    for dim, value in point.items():
        along = listed(ds) if dim == POINT else []
        named |= {key: ds[key].sel({POINT: value}).item() for key in along} if along else {dim: value}
    return panels.plain(", ".join(f"{dim} {short(v)}".removeprefix("moment ") for dim, v in named.items()))


def short(value: Any) -> str:
    """A label without trailing zeros."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def listed(ds: xr.Dataset | xr.DataArray) -> list[str]:
    """Keys that vary along ``point``."""
    return [str(c) for c in ds.coords if ds[c].dims == (POINT,) and c != POINT and c not in vocabulary.COORDINATES]


def grid(
    ds: xr.Dataset,
    draw: Callable[[dict[str, Any], Axes], object],
    *,
    title: str,
    across: Sequence[str],
    down: Sequence[str] = (),
    share: bool | Literal["row", "col"] = True,
    beside: float = 0.0,
) -> Figure:
    """Figure with one panel per point of the dimensions `across` and `down`, and `beside` inches for a legend.

    Raises:
        ValueError: if there are more than `MAX_PANELS`.
    """
    columns, rows = points(ds, across), points(ds, down)
    if len(columns) * len(rows) > MAX_PANELS:
        raise ValueError(
            f"{title}: {len(columns) * len(rows)} panels are more than {MAX_PANELS}; select a part of the sweep first"
        )
    size = (PANEL[0] * max(len(columns), 1.6) + beside, PANEL[1] * max(len(rows), 1.3) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(len(rows), len(columns), squeeze=False, sharex=share, sharey=share)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        draw({**column, **row}, cells[i, j])
        name = name_of(ds, {**column, **row})
        cells[i, j].set_title(name, fontsize=9 if len(name) < 32 else 7)
        if share:
            cells[i, j].label_outer()
    for axis in ("x", "y"):
        text = getattr(cells[-1, 0], f"get_{axis}label")()
        for panel in cells.flat:
            panel.set(**{f"{axis}label": ""})
        letters = 10 * size[0] if axis == "x" else 8.5 * size[1]
        getattr(figure, f"sup{axis}label")(textwrap.fill(text, int(letters)), fontsize=10)
    # aligned left, since a legend may be at the right
    wrapped = textwrap.fill(title, int(10 * (size[0] - beside)))
    figure.suptitle(wrapped, x=0.01, ha="left", fontsize=11)
    return figure


def two_ways(swept: Sequence[str]) -> Ways:
    """Layout with the first swept key along columns and the rest along rows."""
    return {"across": swept[:1], "down": swept[1:]}


def legend(figure: Figure) -> None:
    """Add one legend for all panels, from the first panel's lines; none if there is a single line."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside right upper", fontsize=7)


def shade_bar(figure: Figure, count: int, text: str) -> None:
    """Add the colour bar of `panels.shade` for numbers 1..count."""
    if count == 1:
        return
    norm = Normalize(1, 1 + (count - 1) / panels.LIGHTEST)
    bar = figure.colorbar(ScalarMappable(norm, colormaps["viridis"].resampled(256)), ax=figure.axes, label=text)
    bar.locator = MaxNLocator(integer=True)
    bar.ax.set_ylim(1, count)


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
