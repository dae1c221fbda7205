"""What one asks first of an archive: final losses, mean correlations, dead members, cost, paper."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from tsdyn.analysis.citations import papers
from tsdyn.analysis.specialization import mean_specialization
from tsdyn.analysis.summary import quantiles

from tsdyn import schema, vocabulary
from tsdyn.archive import selecting
from tsdyn.archive.selecting import experiment_of

#: Variables whose last values are shown, those of them that the archive holds, at most `SHOWN_LOSSES`.
LOSSES = ("loss_train", "loss_eval", "mse_train", "mse_eval", "accuracy", "population_loss", "eg", "eg_equation")
SHOWN_LOSSES = 3
#: Layers of which the mean correlation is shown each; of deeper networks the mean over hidden layers is shown.
SHOWN_LAYERS = 3
#: Share of the members between the two ends of a spread.
MIDDLE = (0.1, 0.9)


class Number(NamedTuple):
    """Median over members and the middle 80 % of them; NaN where no member has a value."""

    median: float
    low: float
    high: float
    members: int

    def __str__(self) -> str:
        if not self.members:
            return "-"
        if self.members == 1:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.2g}..{self.high:.2g})"


class Row(NamedTuple):
    """One point of a sweep, or a run: its name, its last recorded numbers by name, and how many members died."""

    point: str
    numbers: Mapping[str, Number]
    dead: int


def points(ds: xr.Dataset) -> list[tuple[str, dict[str, Any]]]:
    """Name and selection of each point of a sweep; one nameless point for a run.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.overview import points
        >>> points(ds)[0]
        ('overrealization = 1', {'overrealization': np.int64(1)})
    """
    swept = selecting.swept_dimensions(ds)
    listed = [c for c in ds.coords if ds[c].ndim == 1 and ds[c].dims[0] in swept and c not in vocabulary.COORDINATES]
    found: list[tuple[str, dict[str, Any]]] = []
    for values in itertools.product(*(ds[dim].values for dim in swept)):
        at = dict(zip(swept, values, strict=True))
        own = ds[listed].sel(at)
        keys = [str(c) for c in listed if c != "point" or len(listed) == 1]
        found.append((", ".join(f"{key} = {own[key].item()}" for key in keys), at))
    return found


def rows(ds: xr.Dataset, limit: int) -> list[Row]:
    """Last recorded numbers of the first `limit` points; reads these alone.

    A point that has not recorded the sweep's last step shows its own last one.  Losses are medians over seeds with the
    middle 80 %; ``rho_l`` is the mean best correlation ρ̄ of layer l (Tian 2020, Figure 6).

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.overview import rows
        >>> [row.point for row in rows(ds, 10)]
        ['overrealization = 1', 'overrealization = 4']
    """
    return [_row(name, ds.sel(at) if at else ds) for name, at in points(ds)[:limit]]


def _row(name: str, ds: xr.Dataset) -> Row:
    death = ds["death_epoch"].values if "death_epoch" in ds.coords else np.zeros(0)
    numbers = {key: _number(values.values) for key, values in _last(ds)}
    return Row(name, numbers, int((death >= 0).sum()))


def _last(ds: xr.Dataset) -> Iterator[tuple[str, xr.DataArray]]:
    """Names and last recorded values (seed) of what is shown."""
    along = schema.path_of(ds)
    held = [n for n in LOSSES if n in ds and set(ds[n].dims) <= {"seed", along} and along in ds[n].dims]
    if not ds.sizes.get(along):
        return
    end = -1
    if held and not _all_died(ds):
        series = ds[held[0]].load()
        other = [dim for dim in series.dims if dim != along]
        there = np.flatnonzero(series.notnull().any(other).values)
        end = int(there[-1]) if there.size else -1
    now = ds.isel({along: end})
    for name in held[:SHOWN_LOSSES]:
        yield name, now[name]
    if "correlation" not in ds or not {"layer", "teacher_node", "node"} <= set(ds["correlation"].dims):
        return
    own = ds["width"].notnull() if "width" in ds.coords and ds["width"].dims == ("layer",) else None
    hidden = [int(label) for label in now["layer"].values[:-1] if own is None or bool(own.sel(layer=label))]
    if not hidden:
        return
    best = mean_specialization(now[["correlation"]].sel(layer=hidden))
    if len(hidden) > SHOWN_LAYERS:
        yield "rho", best.mean("layer")
        return
    for label in hidden:
        yield f"rho_{label}", best.sel(layer=label)


def _all_died(ds: xr.Dataset) -> bool:
    return "death_epoch" in ds.coords and bool((ds["death_epoch"] >= 0).all())


def _number(values: Any) -> Number:
    there = np.asarray(values, float).ravel()
    there = there[~np.isnan(there)]
    if not there.size:
        return Number(np.nan, np.nan, np.nan, 0)
    low, median, high = quantiles(there, (MIDDLE[0], 0.5, MIDDLE[1])).tolist()
    return Number(median, low, high, there.size)


def facts(ds: xr.Dataset) -> dict[str, str]:
    """What ran, where and at what cost, in words; keys in the order in which they are shown.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")
        >>> from tsdyn.analysis.overview import facts
        >>> facts(ds)["swept: overrealization"]
        '1, 4'
    """
    attrs = ds.attrs
    kind = "recording" if "recording" in attrs else "experiment"
    found = {kind: f"{attrs.get('name', '?')}  ({str(attrs.get('digest', '?'))[:12]})"}
    if (named := papers(ds)) and "recording" not in ds.attrs:  # a loop of the user's own is no experiment of a paper's
        found["papers"] = "; ".join(named)
    if kind == "experiment" and (told := _setting(ds)):
        found["setting"] = told
    found["made"] = ", ".join(
        [
            *([str(attrs["created"])] if "created" in attrs else []),
            f"tsdyn {attrs.get('tsdyn_version', '?')}, torch {attrs.get('torch_version', '?')}",
            f"{attrs.get('device', '?')}, {attrs.get('dtype', '?')}",
        ]
    )
    if vocabulary.WALL in attrs:
        found["wall time"] = f"{float(attrs[vocabulary.WALL]):.3g} s"
    found["dimensions"] = ", ".join(f"{dim} {size}" for dim, size in ds.sizes.items())
    found["size"] = f"{ds.nbytes / 1e6:.1f} MB as arrays"
    along = schema.path_of(ds)
    if ds.sizes.get(along):
        first, last = (ds[along].values[end] for end in (0, -1))
        found[f"{along}s"] = f"{first:g}..{last:g}, {ds.sizes[along]} recorded"
    swept = selecting.swept_dimensions(ds)
    for key, column in ds.coords.items():
        varies = column.ndim == 1 and column.dims[0] in swept
        if varies and key != "point" and key not in vocabulary.COORDINATES:
            values = list(dict.fromkeys(column.values.tolist()))
            shown = ", ".join(map(str, values[:8])) + (f", ... {values[-1]}" if len(values) > 8 else "")
            found[f"swept: {key}"] = shown
    if "coverage" in ds.coords:
        found["coverage"] = f"{int((ds.coverage >= 1).sum())} of {ds.coverage.size} points finished"
    if "death_epoch" in ds.coords:
        dead = int((ds["death_epoch"] >= 0).sum())
        found["died"] = f"{dead} members became NaN or infinite" if dead else "no member became NaN or infinite"
    return found


def _setting(ds: xr.Dataset) -> str:
    """Widths, seeds, data and rule of the experiment in one line; empty if it cannot be read."""
    try:
        e = experiment_of(ds)
    except ValueError:
        return ""
    seeds = ds.sizes.get("seed", 1)
    words = [f"{seeds} seed{'s' * (seeds != 1)}", e.kind]
    if e.kind == "training":
        rate = e.training.learning_rate
        shown = f"{rate:g}" if isinstance(rate, (int, float)) else json.dumps(rate)
        shown = "swept" if "training.learning_rate" in e.sweep else shown
        words[1] = f"teacher {'-'.join(map(str, e.teacher.widths))}"
        words += [f"N = {e.data.train}", f"{e.training.method}, rate {shown}", f"batch {e.training.batch}"]
    return ", ".join(words)


def as_json(ds: xr.Dataset, limit: int) -> dict[str, Any]:
    """The overview as JSON-able values: facts, attributes, numbers of at most `limit` points, variables."""
    return {
        "facts": facts(ds),
        "sizes": {str(dim): size for dim, size in ds.sizes.items()},
        "points": [
            {"point": row.point, "dead": row.dead, "final": {k: _plain(n) for k, n in row.numbers.items()}}
            for row in rows(ds, limit)
        ],
        "points_left_out": max(0, len(points(ds)) - limit),
        "variables": {
            str(name): {"dims": list(map(str, array.dims)), **{k: str(v) for k, v in array.attrs.items()}}
            for name, array in ds.data_vars.items()
        },
    }


def _plain(number: Number) -> dict[str, float | int | None]:
    return {key: None if value != value else value for key, value in number._asdict().items()}
