"""The directory of a sweep: its points, and all of them as one lazy Dataset.  Imports no torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import tomllib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray

from tsdyn import netcdf, schema
from tsdyn.durable import ALWAYS_VERIFIED, ArchiveError, DirectoryError, write_text
from tsdyn.experiment import Experiment, digest
from tsdyn.index import Header, Index, Source
from tsdyn.segments import ARCHIVE, EXPERIMENT, claim
from tsdyn.sweep_axes import POINT, Axis, axes, checked_sweep, places, sweep_dimensions, swept_keys

SWEEP = "sweep.json"

#: A dask chunk gathers whole disk chunks of as many seeds as fit in this (opening a file costs as much as 5 MB) ...
LAZY_BYTES = 1 << 27
#: ... and, where a run holds less, the same of up to so many runs ...
RUNS_A_CHUNK = 25
#: ... but no more than this in all, so that reading one run of many stays quick.
GATHERED_BYTES = 1 << 20

Labels = tuple["str | int | float", ...]
#: Positions along one dimension.
Rows = slice | NDArray


# --- points --------------------------------------------------------------------------------------------------


def label(value: Any) -> str | int | float:
    """A coordinate value for a swept value: numbers and strings are themselves, lists join with ``-``."""
    if isinstance(value, (bool, dict)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "-".join(str(v) for v in value)
    return value  # type: ignore[no-any-return]


def point_name(values: Mapping[str, Any]) -> str:
    """Directory of one point of a sweep, such as ``overrealization=5,polarity=1.0``."""
    names = sweep_dimensions(values)
    text = ",".join(f"{names[key]}={label(value)}" for key, value in values.items())
    name = re.sub(r"[^A-Za-z0-9._+=,-]", "-", text)
    return name if len(name) <= 200 else f"{name[:180]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def sweep_points(path: Path) -> dict[str, tuple[dict[str, Any], Experiment]]:
    """Directory name → swept values and experiment of each point of the sweep in `path`.

    From ``experiment.toml``: the index beside it is for other readers, and its names are not trusted.
    """
    experiment = Experiment.from_toml(path / EXPERIMENT)
    return {point_name(values): (values, point) for values, point in experiment.points()}


def write_sweep(path: Path, experiment: Experiment) -> dict[str, Experiment]:
    """Make `path` the directory of a sweep; ``sweep.json`` lists every point and its directory for other readers.

    A sweep that holds all points of the one that is there, everything else the same, takes its place.

    Returns the experiment of each point by directory name.

    Raises:
        ArchiveError: as `claim`.
    """
    claim(path, experiment)
    points = {point_name(values): (values, point) for values, point in experiment.points()}
    listed = {
        "schema_version": schema.VERSION,
        "dimensions": sweep_dimensions(swept_keys(experiment.sweep)),
        "points": [{"directory": name, "values": values} for name, (values, _) in points.items()],
    }
    write_text(path / SWEEP, json.dumps(listed, indent=1))
    return {name: point for name, (_, point) in points.items()}


# --- one variable over the grid ------------------------------------------------------------------------------


@dataclass(eq=False)
class Stored:
    """A variable over all points of a grid, an array that reads when it is indexed; NaN where nothing is stored.

    Attributes:
        name: The variable.
        outer, inner: Its dimensions: those of the grid, those of the files.
        shape, dtype: As numpy's.
        cells: Place in the grid → files.
        labels: Dimension of the files → the grid's labels.
        skip: Whether what cannot be read is left NaN, with a warning, not an error.
    """

    name: str
    outer: tuple[str, ...]
    inner: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    cells: Mapping[tuple[int, ...], Sequence[Source]]
    labels: Mapping[str, list[Any]]
    skip: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @cached_property
    def _position(self) -> dict[str, dict[Any, int]]:
        return {dim: {value: i for i, value in enumerate(self.labels[dim])} for dim in self.inner}

    def __getitem__(self, key: Any) -> NDArray:
        """As numpy's, by integers, slices and lists; what dask asks for is read and no more."""
        key = key if isinstance(key, tuple) else (key,)
        gaps = [i for i, k in enumerate(key) if k is Ellipsis]  # `in` would compare arrays
        if gaps:
            key = (*key[: gaps[0]], *[slice(None)] * (self.ndim + 1 - len(key)), *key[gaps[0] + 1 :])
        key = (*key, *[slice(None)] * (self.ndim - len(key)))
        wanted = [np.atleast_1d(np.arange(n)[k]) for k, n in zip(key, self.shape, strict=True)]
        shape, outer = [len(w) for w in wanted], len(self.outer)
        parts: list[tuple[tuple[int, ...], Source, list[Rows], list[Rows]]] = []
        for at in np.ndindex(*shape[:outer]):
            place = tuple(int(w[i]) for w, i in zip(wanted[:outer], at, strict=True))
            for source in self.cells.get(place, ()):
                part = self._part(source, wanted[outer:])
                if part is not None:
                    parts.append((at, source, *part))
        held = sum(math.prod(map(_length, target)) for *_, target in parts)
        if len(parts) == 1 and held == math.prod(shape):  # as it comes, without a copy
            _, source, rows, _ = parts[0]
            found = self._rows(source, rows).reshape(shape)
        else:
            found = np.empty(shape, self.dtype) if held == math.prod(shape) else np.full(shape, np.nan, self.dtype)
            for at, source, rows, target in parts:
                found[at][_orthogonal(target, found.shape[outer:])] = self._rows(source, rows)
        return found[tuple(0 if isinstance(k, (int, np.integer)) else slice(None) for k in key)]

    def _part(self, source: Source, wanted: Sequence[NDArray]) -> tuple[list[Rows], list[Rows]] | None:
        """Of each dimension, the rows that one file holds of the `wanted` positions, and where these are among them."""
        if self.name not in source.header.variables:
            return None
        rows, target = [], []
        for dim, positions in zip(self.inner, wanted, strict=True):
            row = np.full(len(self.labels[dim]), -1)
            there = source.header.labels[dim]
            row[[self._position[dim][value] for value in there]] = np.arange(len(there))
            asked = row[positions]
            (inside,) = np.nonzero(asked >= 0)
            if not len(inside):
                return None
            rows.append(_as_slice(asked[inside]))
            target.append(_as_slice(inside))
        return rows, target

    def _rows(self, source: Source, rows: Sequence[Rows]) -> NDArray:
        """Those rows of one file, every dimension by itself."""
        # given lists, netCDF reads row by row; the whole range and a choice from it cost one reading
        spans = [r if isinstance(r, slice) else slice(int(r.min()), int(r.max()) + 1) for r in rows]
        chosen = [slice(None) if isinstance(r, slice) else r - span.start for r, span in zip(rows, spans, strict=True)]
        try:
            with netcdf.dataset(source.path) as nc:
                stored = nc[self.name][tuple(spans)]
            kept: NDArray = stored[_orthogonal(chosen, stored.shape)]
            return kept
        except (OSError, RuntimeError, IndexError, KeyError, ValueError) as error:
            message = f"{source.path}: {self.name} cannot be read: {error}"
            if not self.skip:
                raise ArchiveError(f"{message}; `tsdyn validate` tells what is whole") from error
            warnings.warn(f"{message}; left NaN", stacklevel=2)
            return np.full([_length(r) for r in rows], np.nan, self.dtype)


def _as_slice(rows: NDArray) -> Rows:
    """Positions as a slice where they follow one another."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if np.array_equal(rows, np.arange(first, last + 1)) else rows


def _length(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def _orthogonal(rows: Sequence[Rows], shape: Sequence[int]) -> tuple[Any, ...]:
    """An index of which every dimension chooses for itself; slices, which copy no index, where all are."""
    if all(isinstance(r, slice) for r in rows):
        return tuple(rows)
    return np.ix_(*(np.arange(n)[r] for r, n in zip(rows, shape, strict=True)))


# --- all points as one Dataset -------------------------------------------------------------------------------


def open_sweeps(paths: Sequence[Path], *, skip_damaged: bool = False, verify: float = ALWAYS_VERIFIED) -> xr.Dataset:
    """One or several sweeps (or runs) as one lazy Dataset; nothing is loaded.

    Swept keys are leading dimensions, and so are the keys in which the experiments differ otherwise; keys that go
    together (``zip``, ``points``) are coordinates along ``point``.  Points without a committed epoch are NaN;
    ``coverage`` is the share of its recorded epochs that each point has.  Files of at most `verify` bytes are compared
    with their checksums before their headers are believed.

    Raises:
        ArchiveError: if a file cannot be read (unless `skip_damaged`), nothing is committed yet, or two directories
            hold the same point.
    """
    cells, grid, origin = _gathered(paths, skip_damaged, verify)
    sources = [source for cell in cells.values() for source in cell]
    if not sources:
        where = ", ".join(map(str, paths))
        raise DirectoryError(f"{where}: no point of this sweep has a committed epoch yet; go on with `tsdyn run`")
    versions = {source.header.version: source for source in sources}
    built = []
    for version, example in versions.items():
        own = {place: [s for s in cell if s.header.version == version] for place, cell in cells.items()}
        ds = _built({place: cell for place, cell in own.items() if cell}, grid, skip_damaged)
        try:
            built.append(schema.migrate(ds))
        except schema.SchemaError as error:
            raise DirectoryError(f"{example.path}: {error}") from error
    ds = built[0]
    for other in built[1:]:
        ds = ds.combine_first(other)
    return ds.assign_attrs(origin)


def _gathered(
    paths: Sequence[Path], skip_damaged: bool, verify: float
) -> tuple[dict[tuple[int, ...], list[Source]], tuple[Axis, ...], dict[str, str]]:
    """The files at each place of the common grid, the grid (its keys named as coordinates), and its own attributes."""
    written = [_written(path) for path in paths]
    sweeps = [values.get("sweep", {}) for values in written]
    keys = tuple(dict.fromkeys([*_differing(written), *(key for sweep in sweeps for key in swept_keys(sweep))]))
    groups = {axis.keys for sweep in sweeps for axis in axes(sweep) if axis.dimension == POINT}
    if len(groups) > 1:
        raise DirectoryError(f"open: the sweeps list points of different keys, {sorted(groups)}; open one at a time")
    listed = next(iter(groups), ())
    along = [*((key,) for key in keys if key not in listed), *groups]
    found: dict[tuple[Labels, ...], list[Source]] = {}
    for path, values, sweep in zip(paths, written, sweeps, strict=True):
        index, base = Index(path, verify), dict(_flat({k: v for k, v in values.items() if k != "sweep"}))
        for point in places(sweep).values() if sweep else ({},):
            at = tuple(tuple(label({**base, **point}.get(key, "unset")) for key in group) for group in along)
            held = found.setdefault(at, [])
            try:
                sources = index.committed(point_name(point) if sweep else ".")
            except ArchiveError as error:
                if not skip_damaged:
                    raise
                warnings.warn(f"{error}; left NaN", stacklevel=4)
                continue
            seeds = {seed for source in held for seed in source.header.labels["seed"]}
            if sources and seeds & set(sources[0].header.labels["seed"]):
                raise DirectoryError(
                    f"open: {held[0].path} and {sources[0].path} hold the same seeds of one point, "
                    f"{dict(zip(map(', '.join, along), at, strict=True))}; open one of them"
                )
            held += sources
        with suppress(ArchiveError):  # where it may not be written, the next reader reads the headers again
            index.write()
    taken = [tuple(dict.fromkeys(at[i] for at in found)) for i in range(len(along))]
    position = [{value: i for i, value in enumerate(of)} for of in taken]
    cells = {tuple(p[v] for p, v in zip(position, at, strict=True)): held for at, held in found.items() if held}
    names = sweep_dimensions(keys)
    grid = tuple(
        Axis(POINT if group == listed else names[group[0]], tuple(names[key] for key in group), of)
        for group, of in zip(along, taken, strict=True)
    )
    return cells, grid, _origin(paths, written)


def _written(path: Path) -> dict[str, Any]:
    """The experiment file as a nested dict; only its sweep is checked, for a thousand points take a while."""
    try:
        values = tomllib.loads((path / EXPERIMENT).read_text(encoding="utf-8"))
        return {**values, "sweep": checked_sweep(values.get("sweep", {}))}
    except (OSError, ValueError, RecursionError) as error:
        raise DirectoryError(f"{path}: holds no run or sweep of tsdyn's: {error}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differing(written: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which experiments differ, other than by what they sweep, their names and their seeds."""
    flat = [dict(_flat({k: v for k, v in values.items() if k not in ("sweep", "name", "seeds")})) for values in written]
    keys = dict.fromkeys(itertools.chain.from_iterable(flat))
    absent = object()
    return [key for key in keys if any(f.get(key, absent) != flat[0].get(key, absent) for f in flat)]


def _origin(paths: Sequence[Path], written: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Attributes of the whole: the experiment of a single sweep, where several are."""
    if len(paths) > 1:
        return {"opened": json.dumps([str(path) for path in paths])}
    values = {k: v for k, v in written[0].items() if k != "sweep" or v}
    text = (paths[0] / EXPERIMENT).read_text(encoding="utf-8")
    try:
        return {"experiment": text, "digest": digest(values), "name": str(values.get("name", ""))}
    except (KeyError, AttributeError, TypeError) as error:
        raise DirectoryError(
            f"{paths[0] / EXPERIMENT}: is no experiment of tsdyn's: {error}; `tsdyn validate` says where"
        ) from error


def _union(headers: Sequence[Header], dim: str) -> list[Any]:
    lists = [header.labels[dim] for header in headers if dim in header.labels]
    longest = max(lists, key=len)
    return longest if all(set(found) <= set(longest) for found in lists) else sorted(set().union(*lists))


def _built(cells: Mapping[tuple[int, ...], Sequence[Source]], grid: Sequence[Axis], skip: bool) -> xr.Dataset:
    """The Dataset of all cells."""
    sources = [source for cell in cells.values() for source in cell]
    headers = list({id(s.header): s.header for s in sources}.values())
    used = (
        {"seed", "layer"}
        | {d for h in headers for d in h.labels if d in schema.PATHS}
        | {d for h in headers for dims, *_ in h.variables.values() for d in dims}
    )
    labels = {dim: _union(headers, dim) for dim in sorted(used, key=[*schema.DIMENSIONS, *used].index)}
    outer, sizes = tuple(axis.dimension for axis in grid), tuple(len(axis.values) for axis in grid)
    token = tokenize([(place, [(str(s.path), _stamp(s.path)) for s in cell]) for place, cell in cells.items()], skip)
    arrays: dict[str, xr.Variable] = {}
    for name in dict.fromkeys(name for header in headers for name in header.variables):
        holding = [header.variables[name] for header in headers if name in header.variables]
        inner, dtype, _, attrs = holding[0]
        shape = (*sizes, *(len(labels[dim]) for dim in inner))
        own = {dim: labels[dim] for dim in inner}
        stored = Stored(name, outer, tuple(inner), shape, np.dtype(dtype), cells, own, skip)
        lazy = dask.array.from_array(
            stored,
            chunks=_chunks([h for h in headers if name in h.variables], stored),
            name=f"{name}-{token}",
            asarray=False,
            meta=np.empty((0,) * len(shape), stored.dtype),
        )
        arrays[name] = xr.Variable((*outer, *inner), lazy, attrs)
    coords: dict[str, Any] = {
        dim: xr.Variable(dim, values, {"long_name": schema.DIMENSIONS.get(dim, dim)}) for dim, values in labels.items()
    }
    for axis in grid:
        if axis.dimension == POINT:
            coords[POINT] = xr.Variable(POINT, np.arange(len(axis.values)))
        coords |= {
            key: xr.Variable(axis.dimension, [value[i] for value in axis.values]) for i, key in enumerate(axis.keys)
        }
    coords |= _columns(cells, headers, labels, outer, sizes)
    return xr.Dataset(arrays, coords, sources[0].header.attrs)


def _columns(
    cells: Mapping[tuple[int, ...], Sequence[Source]],
    headers: Sequence[Header],
    labels: Mapping[str, list[Any]],
    outer: tuple[str, ...],
    sizes: tuple[int, ...],
) -> dict[str, xr.Variable]:
    """Coordinates beside the dimensions' own, over the grid; −1 where a point has nothing yet."""
    dims = {name: found for header in headers for name, (found, _) in header.columns.items()}
    columns = {name: np.full((*sizes, *(len(labels[d]) for d in found)), -1) for name, found in dims.items()}
    death, coverage = np.full((*sizes, len(labels["seed"])), -1), np.zeros(sizes)
    seeds = {seed: i for i, seed in enumerate(labels["seed"])}
    for place, cell in cells.items():
        for name, (found, values) in cell[0].header.columns.items():
            at: tuple[Any, ...] = (*place, *(slice(0, len(cell[0].header.labels[d])) for d in found))
            columns[name][at] = values
        for source in cell:  # of segments, the last has the word
            at = (*place, [seeds[s] for s in source.header.labels["seed"]])
            death[at] = source.death
        coverage[place] = _coverage(cell)
    variables = {"death_epoch": xr.Variable((*outer, "seed"), death), "coverage": xr.Variable(outer, coverage)}
    variables |= {name: xr.Variable((*outer, *dims[name]), values) for name, values in columns.items()}
    for name, variable in variables.items():
        variable.attrs.update(schema.COORDINATES[name].attrs)
    return variables


def _coverage(cell: Sequence[Source]) -> float:
    """Share of the recorded epochs that are committed."""
    if cell[0].path.name == ARCHIVE:
        return 1.0
    there = sum(
        len(source.header.labels[dim]) for source in cell for dim in schema.PATHS if dim in source.header.labels
    )
    experiment = Experiment.from_toml(cell[0].path.parent.parent / EXPERIMENT)
    outcomes = schema.recorded(experiment.kind, (), "end")  # a record of its own, which comes last
    there += sum(set(outcomes) <= set(source.header.variables) for source in cell) if outcomes else 0
    return there / (len(experiment.schedule) + bool(outcomes))


def _stamp(path: Path) -> int:
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0


def _chunks(headers: Sequence[Header], array: Stored) -> tuple[int, ...]:
    """Dask chunks that follow files: whole disk chunks of as many seeds as fit; of several runs only if small."""
    lengths = dict(zip(array.inner, array.shape[len(array.outer) :], strict=True))
    stored = [header.variables[array.name][2] for header in headers]
    chunk = {dim: min(n, lengths[dim]) for dim, n in zip(array.inner, np.max(stored, axis=0).tolist(), strict=True)}
    chunk |= {dim: lengths[dim] for dim in (*schema.NODE_WIDTHS, "input_node") if dim in chunk}
    whole = math.prod(chunk.values()) * array.dtype.itemsize
    size = max(1, round(whole * max(_filled(header, array) for header in headers)))
    if "seed" in chunk:
        seeds = min(lengths["seed"], chunk["seed"] * max(1, LAZY_BYTES // size))
        size, chunk["seed"] = size * seeds // chunk["seed"], seeds
    runs = [1] * len(array.outer)
    if runs:
        runs[-1] = min(array.shape[len(runs) - 1], RUNS_A_CHUNK, max(1, GATHERED_BYTES // max(1, size)))
    return (*runs, *(max(1, n) for n in chunk.values()))


def _filled(header: Header, array: Stored) -> float:
    """Share of the padded node dimensions that the largest layer of a run fills; the rest is never read."""
    own = "teacher_input_width" if array.name.startswith("teacher_") else "input_width"
    names = {**schema.NODE_WIDTHS, "input_node": own}
    sizes = {
        dim: (np.asarray(header.columns[names[dim]][1]), array.shape[len(array.outer) + i])
        for i, dim in enumerate(array.inner)
        if names.get(dim) in header.columns
    }
    return float(np.max(np.prod([widths / padded for widths, padded in sizes.values()], axis=0))) if sizes else 1.0
