"""Open runs, sweeps and files as one lazy Dataset; a run is read as a sweep of one point.

Files are written whole or not at all (`tsdyn.archive.whole_files`), so a reader needs no lock and sees committed epochs
only, also while a run goes on.  Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import dask.array
import numpy as np
import xarray as xr
from dask.base import tokenize

from tsdyn import schema, vocabulary
from tsdyn.archive import accessor as accessor  # registers ``ds.tsdyn``
from tsdyn.archive import additions, parquet_stores, study_directories, zarr_stores
from tsdyn.archive.headers import Header, Headers, Source, when
from tsdyn.archive.joined_archives import (
    WAY_OUT,
    UnrecordedWarning,
    differing_keys,
    parameters,
    refuse_mostly_empty,
    union,
    unrecorded,
)
from tsdyn.archive.kept_samples import with_kept
from tsdyn.archive.lazy_arrays import Cells, Stored, chunks
from tsdyn.archive.recordings import FILE as RECORDING
from tsdyn.archive.recordings import Recording, flush_below, recordings_below
from tsdyn.archive.run_directory import ARCHIVE, EXPERIMENT
from tsdyn.archive.sweep_directory import is_sweep, label, point_directories, refuse_equal_labels
from tsdyn.archive.swept_values import SWEEP, dimensions
from tsdyn.archive.whole_files import ALWAYS_VERIFIED, ArchiveError, DirectoryError, local_path
from tsdyn.archive.wrong_numbers import WRONG, WRONG_THROUGH, WrongNumbersWarning, wrong_variables
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment, digest, flattened
from tsdyn.experiment.sweep_axes import (
    DIMENSIONS,
    POINT,
    Axis,
    axes,
    checked_sweep,
    places,
    sweep_dimensions,
    swept_keys,
)

Labels = tuple[str | int | float, ...]

_warned: set[Path] = set()


def open(
    path: str | Path | Sequence[str | Path],
    *,
    skip_damaged: bool = False,
    verify: bool | None = None,
    along: Literal["keys", "point"] = "keys",
) -> xr.Dataset:
    """A run, a sweep, one file or an export as one lazy Dataset; nothing is loaded.

    The swept keys of a sweep are leading dimensions, named by the key's last word (keys that vary together are
    coordinates along ``point``).  Points without a committed epoch are NaN; ``coverage`` is the share of its epochs
    that a point has.  An unfinished run shows its committed epochs.  If several runs or sweeps are opened together,
    the keys in which their experiments differ are dimensions, too.  Files and stores that ``tsdyn export``,
    ``Dataset.to_netcdf`` and ``Dataset.to_zarr`` wrote are opened like what they were written from.

    The Dataset stays valid while a run goes on or is finished: its committed epochs are then read from the files that
    hold them.  Where anything else has replaced a file, reading raises `ArchiveError` and says to open it again.

    Args:
        path: Directory of a run or a sweep, a netCDF file, a zarr store or exported tables; or a list of directories.
        skip_damaged: Whether points of a sweep that cannot be read become NaN, with a warning, instead of raising.
        verify: Whether files are first compared with the checksums beside them, which reads them whole.  By default
            files of at most 16 MB are (in a sweep, those that the index does not list); larger ones have a checksum
            per chunk, which is compared when the chunk is read.  What `fork`, `measure` of a path and ``tsdyn export``
            begin from is always compared.
        along: Whether every swept key is a dimension, or all points lie along one dimension ``point`` with the keys
            as coordinates, in which nothing is empty.

    Warns:
        UnrecordedWarning: if some points recorded fewer variables than others; they are NaN there.
        WrongNumbersWarning: once per path, if an earlier version stored wrong numbers in some variables; these have
            the attribute ``wrong``.

    Raises:
        ArchiveError: if there is nothing of tsdyn's to read, a file differs from its checksum, or a list is empty,
            holds a point twice or differs in so many keys that the product of their values would be mostly empty.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")  # nothing is loaded
        >>> ds.loss_eval.sel(overrealization=4, seed=3, epoch=slice(2, 8)).sizes["epoch"]
        7
    """
    upto = {None: ALWAYS_VERIFIED, True: math.inf, False: -1.0}[verify]
    paths = [local_path(path)] if isinstance(path, (str, Path)) else [local_path(one) for one in path]
    if not paths:
        raise DirectoryError("open: an empty list; give directories of runs or sweeps")
    if along not in ("keys", "point"):
        raise DirectoryError(f"open: along={along!r}; it is 'keys' or 'point'")
    told: list[str] = []
    if isinstance(path, (str, Path)) and not (along == "point" and is_sweep(paths[0])):
        ds = _opened(paths[0], skip_damaged, upto, told)
    else:
        ds = _opened_together(paths, skip_damaged, upto, told, as_points=along == "point")
    ds = with_kept(ds)
    if isinstance(path, (str, Path)):
        ds.encoding["source"] = str(paths[0].absolute())  # as xarray's own readers say it
    for said in told:
        warnings.warn(said, UnrecordedWarning, stacklevel=3)
    wrong = [str(name) for name, array in ds.data_vars.items() if "wrong" in array.attrs]
    for one in (p.absolute() for p in paths if wrong):
        if one not in _warned:
            _warned.add(one)
            warnings.warn(
                f"{one}: {', '.join(wrong)}: {ds[wrong[0]].attrs['wrong']}", WrongNumbersWarning, stacklevel=3
            )
    return ds


def opened(path: Path, *, skip_damaged: bool = False, upto: float = ALWAYS_VERIFIED) -> xr.Dataset:
    """`open` of one path, without its warnings; files of at most `upto` bytes are compared with their checksums."""
    return _opened(path, skip_damaged, upto, [])


def _opened(path: Path, skip_damaged: bool, upto: float, told: list[str]) -> xr.Dataset:
    """`opened`; what is to be said of it is added to `told`."""
    flush_below(path)
    if path.is_file():
        return _one_file(path, upto)
    if is_sweep(path):
        return _opened_together([path], skip_damaged, upto, told)
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist; runs are made by `tsdyn run EXPERIMENT.toml -o {path}`")
    of_a_study = study_directories.result(path)
    if of_a_study is not None:
        return study_directories.read(of_a_study)
    if not (path / EXPERIMENT).exists() and (recorded := recordings_below(path)):
        return _recordings(path, recorded, skip_damaged, upto)
    sources = Headers(path, upto).committed(".", lambda: Experiment.from_toml(path / EXPERIMENT, archived=True))
    for stores in (zarr_stores, parquet_stores):
        if not sources and stores.is_one(path):
            return _marked_as(stores.read(path), path)
    if not sources:
        raise DirectoryError(_nothing_in(path))
    return _single(sources).assign_attrs(_going_on(path, sources[0]))


def _nothing_in(path: Path) -> str:
    """What is said of a directory in which nothing is committed."""
    if (path / EXPERIMENT).exists():
        return f"{path}: holds no committed epoch yet; finish it with `tsdyn run`"
    marks = (EXPERIMENT, SWEEP, RECORDING, ARCHIVE)
    inside = [f.name for f in sorted(path.iterdir()) if any((f / mark).is_file() for mark in marks)]
    few = ", ".join(inside[:8]) + " ..." * (len(inside) > 8)
    return f"{path}: holds no archive{f'; archives in it: {few}' if inside else ''}"


def nothing_read_of(sweeps: Sequence[Path]) -> str:
    """What is said of sweeps of whose points nothing was read."""
    where = ", ".join(map(str, sweeps))
    others = sorted(file.parent.name for path in sweeps for file in path.glob(f"*/{ARCHIVE}"))
    if not others:
        return f"{where}: no point of this sweep has a committed epoch yet; go on with `tsdyn run`"
    few = ", ".join(others[:4]) + " ..." * (len(others) > 4)
    return (
        f"{where}: none of the archives in it ({few}) was read as that of a point of its {EXPERIMENT}; if that is "
        "another sweep's, put its own back (the attribute `experiment` of an archive says the rest of it)"
    )


def _single(sources: Sequence[Source]) -> xr.Dataset:
    """The Dataset of one run's files or of any one file, with the values of swept keys of the point that it is."""
    own = {name: xr.Variable(*kept) for name, kept in sources[0].swept}
    # of an unfinished run the last segment, which knows of other machines and of longer runs
    newest = [source for source in sources if not additions.is_addition(source.path)] or sources
    return _whole({(): sources}, ()).assign_coords(own).assign_attrs(newest[-1].own | when([sources]))


def _going_on(path: Path, file: Source) -> dict[str, str]:
    """Global attributes of an unfinished run: the experiment of its directory, where one of its files names a shorter.

    It is empty for a finished run, whose archive says what it is of, and where there is no experiment file to read.
    """
    if file.path.name == ARCHIVE:
        return {}
    try:
        mine = Experiment.from_toml(path / EXPERIMENT, archived=True)
    except ExperimentError:  # the files can be read without; `tsdyn validate` names it
        return {}
    return {"experiment": mine.to_toml(), "digest": mine.digest, "name": mine.name}


def _marked_as(ds: xr.Dataset, path: Path) -> xr.Dataset:
    """A Dataset that somebody else's reader gave, brought to the present version of the schema and marked."""
    given = ds.attrs.get("schema_version", schema.VERSION), ds.attrs.get(WRONG_THROUGH)
    wrong = [name for name in wrong_variables(*given, str(ds.attrs.get("experiment", ""))) if name in ds]
    try:
        ds = schema.migrate(ds)
    except schema.SchemaError as error:
        raise DirectoryError(f"{path}: {error}") from error
    return ds.assign({name: ds[name].assign_attrs(wrong=f"{WRONG}; in {path}") for name in wrong})


def _recordings(path: Path, folders: Sequence[Path], skip_damaged: bool, upto: float) -> xr.Dataset:
    """Recordings as one lazy Dataset: seeds joined, and the keys of their configs as leading dimensions.

    In the directory of one config, or of one seed, its config is an attribute and no dimension.
    """
    headers, found = Headers(path, upto), dict[Path, tuple[Recording, list[Source]]]()
    for folder in folders:
        try:
            of = Recording.of_directory(folder)
            name = os.path.relpath(folder, path)
            found[folder] = of, headers.committed(name, lambda of=of: of)  # type: ignore[misc]
        except ArchiveError as error:
            if not skip_damaged:
                raise
            warnings.warn(f"{error}; left NaN", stacklevel=6)
    with suppress(ArchiveError):  # as for sweeps
        headers.write()
    held = {folder: (of, sources) for folder, (of, sources) in found.items() if sources}
    if not held:
        raise DirectoryError(f"{path}: holds recordings of which nothing is committed yet")
    several = folders[0].parent.parent == path
    keys = tuple(dict.fromkeys(key for of, _ in held.values() for key in of.config)) if several else ()
    names = sweep_dimensions(keys)
    labels = {folder: tuple(label(of.config.get(key, "unset")) for key in keys) for folder, (of, _) in held.items()}
    taken = [_in_order(at[i] for at in labels.values()) for i in range(len(keys))]
    cells: dict[tuple[int, ...], list[Source]] = {}
    seeds: dict[tuple[tuple[int, ...], int], Path] = {}
    for folder, (of, sources) in held.items():
        place = tuple(values.index(value) for values, value in zip(taken, labels[folder], strict=True))
        other = seeds.setdefault((place, of.seed), folder)
        if other != folder:
            raise DirectoryError(f"{path}: {other} and {folder} hold the same seed of one config; move one away")
        cells.setdefault(place, []).extend(sources)
    grid = tuple(
        Axis(names[key], (names[key],), tuple((value,) for value in values))
        for key, values in zip(keys, taken, strict=True)
    )
    ds = _whole(cells, grid, skip_damaged).assign_attrs({"name": path.absolute().name})
    if grid:
        share = np.zeros([len(values) for values in taken])
        for place in cells:
            share[place] = 1.0
        dims = tuple(axis.dimension for axis in grid)
        ds = ds.assign_coords(coverage=xr.Variable(dims, share, vocabulary.COORDINATES["coverage"].attrs))
    _, (first, *_) = next(iter(held.values()))
    one = first.own if "recording" in first.own else Source.of(first.path).own
    return ds.assign_attrs(one | {"name": path.absolute().name})


def _in_order(values: Iterable[Any]) -> list[Any]:
    """Values without repetition, sorted if they are all numbers."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(isinstance(value, (int, float)) for value in found) else found


def _one_file(path: Path, upto: float) -> xr.Dataset:
    source = Source.of(path, upto=upto)
    try:
        return _single([source])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DirectoryError(f"{path}: not a file of tsdyn's: {error}") from error


# --- all points as one Dataset -------------------------------------------------------------------------------


def _opened_together(
    paths: Sequence[Path], skip_damaged: bool, upto: float, told: list[str], *, as_points: bool = False
) -> xr.Dataset:
    """One or several sweeps (or runs) as one lazy Dataset, with global attributes that hold for all of them.

    With `as_points`, all points lie along one dimension.  What is to be said of it is added to `told`.

    Raises:
        ArchiveError: if a file cannot be read (unless `skip_damaged`), nothing is committed yet, or two directories
            hold the same point.
    """
    cells, grid, origin = _gathered(paths, skip_damaged, upto, as_points)
    if not cells:
        raise DirectoryError(nothing_read_of(paths))
    said = unrecorded(cells, lambda name: name in vocabulary.VARIABLES or name in schema.DECLARED)
    if said is not None:
        told.append(said)
    ds = _whole(cells, grid, skip_damaged)
    coverage = np.zeros([len(axis.values) for axis in grid])
    for place, cell in cells.items():
        coverage[place] = _coverage(cell)
    dims = tuple(axis.dimension for axis in grid)
    column = xr.Variable(dims, coverage, vocabulary.COORDINATES["coverage"].attrs)
    return ds.assign_coords(coverage=column).assign_attrs(origin | when(cells.values()))


def _whole(cells: Cells, grid: Sequence[Axis], skip: bool = False) -> xr.Dataset:
    """The Dataset of all cells, each brought from its version of the schema to the present one."""
    examples = {source.header.version: source for cell in cells.values() for source in cell}
    built = []
    for version, example in examples.items():
        own = {place: [s for s in cell if s.header.version == version] for place, cell in cells.items()}
        ds = _built({place: cell for place, cell in own.items() if cell}, grid, skip)
        try:
            built.append(schema.migrate(ds))
        except schema.SchemaError as error:
            raise DirectoryError(f"{example.path}: {error}") from error
    ds = built[0]
    for other in built[1:]:
        ds = ds.combine_first(other)
    if len(built) > 1:  # merging keeps only the first's coordinates beside the dimensions
        labels = {dim: ds.indexes[dim].tolist() for dim in ("seed", "layer")}
        ds = ds.assign_coords(_columns(cells, labels, grid))
    return _marked(ds, [source for cell in cells.values() for source in cell])


def _marked(ds: xr.Dataset, sources: Sequence[Source]) -> xr.Dataset:
    """`ds`, with the attribute ``wrong`` on variables whose numbers an earlier version computed wrongly."""
    for name in dict.fromkeys(name for source in sources for name in source.wrong):
        where = [str(source.path) for source in sources if name in source.wrong]
        told = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        ds[name] = ds[name].assign_attrs(wrong=f"{WRONG}; in {told}")
    return ds


def _gathered(
    paths: Sequence[Path], skip_damaged: bool, upto: float, as_points: bool
) -> tuple[dict[tuple[int, ...], list[Source]], tuple[Axis, ...], dict[str, str]]:
    """The files at each position of the common grid, the grid's axes (named as coordinates), and global attributes."""
    written = [_written(path) for path in paths]
    sweeps = [values.get("sweep", {}) for values in written]
    keys = tuple(dict.fromkeys([*differing_keys(written), *(key for sweep in sweeps for key in swept_keys(sweep))]))
    groups = {axis.keys for sweep in sweeps for axis in axes(sweep) if axis.dimension == POINT}
    if as_points:
        groups = {keys} if keys else set()
    if len(groups) > 1:
        raise DirectoryError(
            f"open: the sweeps list points of different keys, {sorted(groups)}; open one at a time, or all along one "
            f"dimension: {WAY_OUT}"
        )
    listed = next(iter(groups), ())
    along = [*((key,) for key in keys if key not in listed), *groups]
    found: dict[tuple[Labels, ...], list[Source]] = {}
    for path, values in zip(paths, written, strict=True):
        base = dict(flattened({k: v for k, v in values.items() if k != "sweep"}))
        for point, sources in _committed(path, values, skip_damaged, upto):
            at = tuple(tuple(label({**base, **point}.get(key, "unset")) for key in group) for group in along)
            held = found.setdefault(at, [])
            seeds = {seed for source in held for seed in source.shown("seed")}
            if sources and seeds & set(sources[0].header.labels["seed"]):
                shared = sorted(seeds & set(sources[0].header.labels["seed"]))
                where = ", ".join(f"{' and '.join(of)} = {label}" for of, label in zip(along, at, strict=True))
                raise DirectoryError(
                    f"open: {held[0].path} and {sources[0].path} hold the same seeds of one point, "
                    f"{', '.join(map(str, shared[:5]))}{f' at {where}' if where else ''}; open one of them"
                )
            held += sources
    taken = [tuple(dict.fromkeys(at[i] for at in found)) for i in range(len(along))]
    refuse_mostly_empty(paths, along, taken, len(found))
    for group, of in zip(along, taken, strict=True):
        for i, key in enumerate(group):
            refuse_equal_labels(key, (value[i] for value in of))
    position = [{value: i for i, value in enumerate(of)} for of in taken]
    cells = {tuple(p[v] for p, v in zip(position, at, strict=True)): held for at, held in found.items() if held}
    names = _named(paths, sweeps, keys)
    grid = tuple(
        Axis(POINT if group == listed else names[group[0]], tuple(names[key] for key in group), of)
        for group, of in zip(along, taken, strict=True)
    )
    return cells, grid, _origin(paths, written, names)


def _named(paths: Sequence[Path], sweeps: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, str]:
    """Key → dimension: the names that each sweep was given when it began; whole keys where two would share one."""
    names = sweep_dimensions(keys)
    for path, sweep in reversed(list(zip(paths, sweeps, strict=True))):  # the first one's win
        names |= dimensions(path, swept_keys(sweep)) if sweep else {}
    shared = [name for name in names.values() if list(names.values()).count(name) > 1]
    return {key: key if name in shared else name for key, name in names.items()}


def _committed(
    path: Path, written: Mapping[str, Any], skip_damaged: bool, upto: float
) -> Iterator[tuple[dict[str, Any], list[Source]]]:
    """Swept values and files of each point of a sweep; a run is a point without swept values."""
    headers, sweep = Headers(path, upto), written.get("sweep", {})
    alone = cache(lambda: Experiment.from_dict({k: v for k, v in written.items() if k != "sweep"}))
    points = [(point, partial(_at, alone, point)) for point in (places(sweep).values() if sweep else ({},))]
    names = point_directories(path, points) if sweep else ["."]
    for name, (point, expected) in zip(names, points, strict=True):
        sources: list[Source] = []
        try:
            sources = headers.committed(name, expected)
            for source in sources:
                dims = set(source.header.labels)
                if not {"seed", "layer"} <= dims or not set(vocabulary.PATHS) & dims:
                    raise DirectoryError(
                        f"{source.path}: is not the archive of a run; `tsdyn.open` opens such a file by itself"
                    )
        except ArchiveError as error:
            if not skip_damaged:
                raise
            warnings.warn(f"{error}; left NaN", stacklevel=7)
        yield point, sources
    if sweep:
        with suppress(ArchiveError):  # where the index cannot be written, the next reader reads the headers again
            headers.write()


def _at(alone: Callable[[], Experiment], point: Mapping[str, Any]) -> Experiment:
    return alone().at(point) if point else alone()


def _written(path: Path) -> dict[str, Any]:
    """The experiment file as a nested dict; only its sweep is checked, since checking a thousand points takes long."""
    try:
        values = tomllib.loads((path / EXPERIMENT).read_text(encoding="utf-8-sig"))
        return {**values, "sweep": checked_sweep(values.get("sweep", {}))}
    except (OSError, ValueError, RecursionError) as error:
        raise DirectoryError(f"{path}: holds no run or sweep of tsdyn's: {error}") from error


def _origin(paths: Sequence[Path], written: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, str]:
    """Global attributes of the Dataset: the experiment of a single sweep, or the directories of several.

    Several that differ in their seeds alone have one experiment, too: that of all seeds.
    """
    if len(paths) > 1:
        opened = {"opened": json.dumps([str(path) for path in paths])}
        if differing_keys(written) or any(values["sweep"] != written[0]["sweep"] for values in written):
            return opened
        each = [Experiment.from_toml(path / EXPERIMENT, archived=True) for path in paths]
        seeds = sorted({seed for one in each for seed in one.seed_labels})
        asked = dict.fromkeys(name for one in each for name in one.record.observables)
        joined = each[0].replace({"seeds": seeds, "record.observables": list(asked)})
        return opened | {"experiment": joined.to_toml(), "digest": joined.digest, "name": joined.name}
    values = {k: v for k, v in written[0].items() if k != "sweep" or v}
    text = (paths[0] / EXPERIMENT).read_text(encoding="utf-8-sig")
    try:
        found = {"experiment": text, "digest": digest(values), "name": str(values.get("name", ""))}
        return found | ({DIMENSIONS: json.dumps(names)} if names else {})
    except (KeyError, AttributeError, TypeError) as error:
        raise DirectoryError(
            f"{paths[0] / EXPERIMENT}: is not an experiment of tsdyn's: {error}; `tsdyn validate` says where"
        ) from error


def _declared(sources: Sequence[Source], name: str, many: bool) -> tuple[tuple[str, ...], np.dtype, dict[str, Any]]:
    """Dimensions, dtype and attributes of a variable in all files; where it may be missing, the dtype has NaN.

    Raises:
        ArchiveError: if its dimensions differ.
    """
    holding = {id(s.header): (s, s.header.variables[name]) for s in sources if name in s.header.variables}
    (first, declared), *others = holding.values()
    for source, other in others:
        if other.dims != declared.dims:
            raise ArchiveError(
                f"{source.path}: {name} has the dimensions {other.dims}, in {first.path} {declared.dims}: they do not "
                "fit together; `tsdyn validate` tells what is whole"
            )
    kinds = [np.dtype(declared.dtype) for _, declared in holding.values()]
    return declared.dims, np.result_type(*kinds, *([np.float32] if many else [])), declared.attrs


def _built(cells: Cells, grid: Sequence[Axis], skip: bool) -> xr.Dataset:
    """The Dataset of all cells, whose files have one version of the schema."""
    sources = [source for cell in cells.values() for source in cell]
    headers = list({id(s.header): s.header for s in sources}.values())
    used = dict.fromkeys(dim for header in headers for dim in header.labels)
    labels = {dim: union(sources, dim) for dim in sorted(used, key=[*vocabulary.DIMENSIONS, *used].index)}
    outer, sizes = tuple(axis.dimension for axis in grid), tuple(len(axis.values) for axis in grid)
    token = tokenize([(place, [(str(s.path), s.identity) for s in cell]) for place, cell in cells.items()], skip)
    read = {place: [source.to_read for source in cell] for place, cell in cells.items()}
    arrays: dict[str, xr.Variable] = {}
    for name in dict.fromkeys(name for header in headers for name in header.variables):
        inner, dtype, attrs = _declared(sources, name, many=bool(grid) or len(sources) > 1)
        shape = (*sizes, *(len(labels[dim]) for dim in inner))
        stored = Stored(name, outer, inner, shape, dtype, read, {dim: labels[dim] for dim in inner}, skip)
        lazy = dask.array.from_array(
            stored,
            chunks=chunks([h for h in headers if name in h.variables], stored),
            name=f"{name}-{token}",
            asarray=False,
            meta=np.empty((0,) * len(shape), stored.dtype),
        )
        arrays[name] = xr.Variable((*outer, *inner), lazy, attrs)
    if len(sources) == 1 and not grid:
        arrays |= {name: xr.Variable(*text) for name, text in headers[0].texts.items()}
    coords: dict[str, Any] = {}
    for dim, values in labels.items():
        held = next((h.columns[dim] for h in headers if h.columns.get(dim, ((),))[0] == (dim,)), None)
        if held is not None:
            coords[dim] = xr.Variable(dim, np.asarray(values, np.asarray(held[1]).dtype), held[2])
    for axis in grid:
        if axis.dimension == POINT:
            coords[POINT] = xr.Variable(POINT, np.arange(len(axis.values)))
        coords |= {
            key: xr.Variable(axis.dimension, [value[i] for value in axis.values]) for i, key in enumerate(axis.keys)
        }
    attrs = headers[0].attrs | (schema.united([header.attrs for header in headers]) if len(headers) > 1 else {})
    attrs |= parameters(cells, grid)
    return xr.Dataset(arrays, coords | _columns(cells, labels, grid), attrs)


def _columns(cells: Cells, labels: Mapping[str, list[Any]], grid: Sequence[Axis]) -> dict[str, xr.Variable]:
    """Coordinates other than the dimensions' own, over the grid; −1 where a point has no file yet."""
    sources = [source for cell in cells.values() for source in cell]
    if not grid and len({id(source.header.columns) for source in sources}) == 1:
        found = {n: xr.Variable(*c) for n, c in sources[0].header.columns.items() if c[0] != (n,)}
    else:
        found = _gridded(cells, labels, grid)
    every = [s.header.columns["layer_name"][1] for s in sources if "layer_name" in s.header.columns]
    names = {tuple(name for name in each if name) for each in every}
    found.pop("layer_name", None)
    if names:
        longest = max(names, key=len)
        longest = (*longest, *("" for _ in range(len(labels["layer"]) - len(longest))))
        alike = all(longest[: len(one)] == one for one in names)  # else each recording's attribute says its own
        shown = longest if alike else tuple(f"layer {label}" for label in labels["layer"])
        found["layer_name"] = xr.Variable("layer", list(shown), vocabulary.COORDINATES["layer_name"].attrs)
    if any(source.death for source in sources):
        outer, sizes = tuple(axis.dimension for axis in grid), tuple(len(axis.values) for axis in grid)
        death = np.full((*sizes, len(labels["seed"])), -1)
        seeds = {seed: i for i, seed in enumerate(labels["seed"])}
        for place, cell in cells.items():
            for source in cell:  # the last segment wins; what was measured later knows of no deaths
                if additions.is_addition(source.path):
                    continue
                own = source.header.labels["seed"]
                at: tuple[Any, ...] = (*place, slice(None) if own is labels["seed"] else [seeds[s] for s in own])
                death[at] = source.death
        attrs = vocabulary.COORDINATES["death_epoch"].attrs
        found["death_epoch"] = xr.Variable((*outer, "seed"), death, attrs)
    return found


def _gridded(cells: Cells, labels: Mapping[str, list[Any]], grid: Sequence[Axis]) -> dict[str, xr.Variable]:
    """Coordinates of the schema that differ between files, over the grid; a cell's first file decides."""
    outer, sizes = tuple(axis.dimension for axis in grid), tuple(len(axis.values) for axis in grid)
    found: dict[str, xr.Variable] = {}
    alike: dict[int, tuple[Header, list[tuple[int, ...]]]] = {}  # files of one shape share their header
    for place, (first, *_) in cells.items():
        alike.setdefault(id(first.header), (first.header, []))[1].append(place)
    for header, theirs in alike.values():
        positions = np.array(theirs, int).reshape(len(theirs), len(grid)).T
        for name, (dims, values, attrs) in header.columns.items():
            if (
                name == "layer_name"
                or name not in vocabulary.COORDINATES
                or (name in found and found[name].dims != (*outer, *dims))
            ):
                continue
            if name not in found:
                empty = np.full((*sizes, *(len(labels[d]) for d in dims)), -1)
                found[name] = xr.Variable((*outer, *dims), empty, attrs)
            # by label: one's own may begin at 0
            where = [np.flatnonzero(np.isin(labels[d], header.labels[d])) for d in dims]
            each, *inner = np.ix_(np.arange(len(theirs)), *where)
            found[name].values[(*(along[each] for along in positions), *inner)] = values
    return found


def _coverage(cell: Sequence[Source]) -> float:
    """Share of the recorded epochs that are committed."""
    if cell[0].path.name == ARCHIVE:
        return 1.0
    cell = [source for source in cell if not additions.is_addition(source.path)]
    try:
        experiment = Experiment.from_toml(cell[0].path.parent.parent / EXPERIMENT, archived=True)
    except ExperimentError:  # `tsdyn validate` names it; the segments can be read without
        experiment = Experiment.from_toml_text(str(cell[-1].own.get("experiment")), archived=True)
    labels, along = set(experiment.labels), experiment.layout.path
    there = sum(label in labels for source in cell for label in source.header.labels[along])
    outcomes = experiment.recorded("end")  # counts as one more record, the last
    there += sum(set(outcomes) <= set(source.header.variables) for source in cell) if outcomes else 0
    return there / (len(labels) + bool(outcomes))
