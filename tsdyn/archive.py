"""One experiment, one directory of netCDF: what was committed, opened lazily as one labelled Dataset.

The directory of a run is written by `Run`; whole files or none (`tsdyn.durable`), so a reader needs no lock and
sees committed epochs only, while a run goes on too.  Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import dask.array
import numpy as np
import xarray as xr
from dask.base import tokenize
from xarray.backends import NetCDF4DataStore

from tsdyn import netcdf, schema
from tsdyn.durable import ALWAYS_VERIFIED, refuse_changed, refuse_link, replacing
from tsdyn.durable import ArchiveError as ArchiveError
from tsdyn.durable import DirectoryError as DirectoryError
from tsdyn.durable import local_path as local_path
from tsdyn.durable import write_text as write_text
from tsdyn.experiment import Experiment, ExperimentError, differences
from tsdyn.grid import LAZY_BYTES, open_sweeps
from tsdyn.grid import SWEEP as SWEEP
from tsdyn.grid import label as label
from tsdyn.grid import sweep_points as sweep_points
from tsdyn.grid import write_sweep as write_sweep
from tsdyn.netcdf import bytes_per_epoch as bytes_per_epoch
from tsdyn.points import POINT
from tsdyn.schema import CONSTANTS, VARIABLES
from tsdyn.segments import ARCHIVE as ARCHIVE
from tsdyn.segments import EXPERIMENT as EXPERIMENT
from tsdyn.segments import SEGMENTS as SEGMENTS
from tsdyn.segments import Run as Run
from tsdyn.segments import claim as claim
from tsdyn.segments import extends, segment_epochs
from tsdyn.segments import segments as segments

# --- reading -------------------------------------------------------------------------------------------------

T = TypeVar("T", xr.Dataset, xr.DataArray)


def open(
    path: str | Path | Sequence[str | Path], *, skip_damaged: bool = False, verify: bool | None = None
) -> xr.Dataset:
    """A run, a sweep or one file as one lazy Dataset; nothing is loaded.

    A sweep's swept keys are leading dimensions, named by the key's last word (keys that go together are coordinates
    along ``point``); points without a committed epoch are NaN, and ``coverage`` is the share of its epochs that a
    point has.  A run that is not finished shows its committed epochs.  Of several runs or sweeps the keys in which
    their experiments differ are dimensions, too.

    Args:
        path: Directory of a run or a sweep, or a netCDF file; or a list of directories.
        skip_damaged: Of a sweep, leave NaN what cannot be read, with a warning that names it, instead of failing.
        verify: Whether files are compared with the checksums beside them first, which reads them whole.  If not said,
            those of at most 16 MB are, of a sweep those that the index does not know; the numbers of larger ones are
            protected chunk by chunk when they are read.

    Raises:
        ArchiveError: if there is nothing of tsdyn's to read there, it is not what its checksum says, or a list is
            empty or holds a point twice.
    """
    upto = {None: ALWAYS_VERIFIED, True: math.inf, False: -1.0}[verify]
    if not isinstance(path, (str, Path)):
        paths = [local_path(one) for one in path]
        if not paths:
            raise DirectoryError("open: an empty list; give directories of runs or sweeps")
        return open_sweeps(paths, skip_damaged=skip_damaged, verify=upto)
    path = local_path(path)
    if path.is_file():
        return _open_file(path, upto)
    if (path / SWEEP).is_file():
        return open_sweeps([path], skip_damaged=skip_damaged, verify=upto)
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist; runs are made by `tsdyn run EXPERIMENT.toml -o {path}`")
    try:
        return _open_run(path, upto)
    except FileNotFoundError:  # an extension turned the archive into a segment in this moment
        return _open_run(path, upto)


def _open_run(path: Path, upto: float) -> xr.Dataset:
    """The archive of a finished run, the committed epochs of one that goes on."""
    refuse_link(path / ARCHIVE)
    if (path / ARCHIVE).is_file():
        return _of_this_run(path, _open_file(path / ARCHIVE, upto))
    try:
        parts = [_of_this_run(path, _open_file(segment.path, upto, Segmented)) for segment in segments(path)]
    except (FileNotFoundError, ArchiveError):
        if (path / ARCHIVE).is_file():  # the run was finished in this moment
            return _of_this_run(path, _open_file(path / ARCHIVE, upto))
        raise
    if not parts and any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata")):
        raise DirectoryError(f"{path}: is a zarr store; open it by xarray.open_zarr({str(path)!r})")
    if not parts:
        raise DirectoryError(f"{path}: holds no archive and no committed epoch; finish it with `tsdyn run`")
    constants = parts[0][[name for name in CONSTANTS if name in parts[0]]]
    try:
        joined = xr.concat(
            [part.drop_vars(CONSTANTS, errors="ignore").drop_vars("death_epoch") for part in parts],
            dim="epoch",
            data_vars="minimal",
            coords="minimal",
            compat="override",
            join="exact",
            combine_attrs="override",
        )
        whole = joined.merge(constants, compat="override", join="exact")
        return whole.assign_coords(death_epoch=parts[-1]["death_epoch"])
    except (ValueError, KeyError) as error:
        raise ArchiveError(
            f"{path}: its segments do not fit together: {error}; `tsdyn repair {path}` keeps what can be gone on from"
        ) from error


def _of_this_run(path: Path, ds: xr.Dataset) -> xr.Dataset:
    """`ds`, unless its file says that it is of another run than the one in `path`."""
    text, own = str(ds.attrs.get("experiment")), path / EXPERIMENT
    if own.exists() and text != own.read_text(encoding="utf-8", errors="replace"):
        try:
            mine, theirs = Experiment.from_toml(own), Experiment.from_toml_text(text)
        except ExperimentError:
            return ds  # the archive can be read without; `tsdyn validate` names it
        if mine != theirs and not extends(mine, theirs):
            raise ArchiveError(
                f"{path}: holds a file of another run; what differs from {EXPERIMENT}:\n  "
                + "\n  ".join(differences(theirs, mine))
            )
    return ds


class Segmented(netcdf.Stored):
    """A variable of a committed segment, which is the archive's once the run is finished and the segment gone."""

    def __getitem__(self, key: Any) -> np.ndarray:
        try:
            return super().__getitem__(key)
        except FileNotFoundError:
            segment = self.file.path
            whole, epochs = netcdf.File(segment.parent.parent / ARCHIVE), segment_epochs(segment)
            dims = VARIABLES[self.name].dims
            if epochs is not None and "epoch" in dims:
                with whole.opened() as nc:
                    first = int(np.searchsorted(nc["epoch"][:], epochs[0]))
                at = dims.index("epoch")
                key = (*key[:at], _later(key[at], first), *key[at + 1 :])
            return self.read(whole, key)


def _later(rows: slice | int, by: int) -> slice | int:
    return slice(rows.start + by, rows.stop + by, rows.step) if isinstance(rows, slice) else rows + by


def _open_file(path: Path, upto: float, kind: type[netcdf.Stored] = netcdf.Stored) -> xr.Dataset:
    """The coordinates of one file, loaded, and its variables, lazy; up to some size as its checksum says."""
    refuse_changed(path, upto=upto)
    netcdf.refuse_foreign(path)
    file = netcdf.File(path)
    try:
        with file.opened() as nc:
            netcdf.refuse_oversized(path, nc)
        store = NetCDF4DataStore(file.manager)  # type: ignore[no-untyped-call]
        ds = xr.open_dataset(store, decode_times=False, mask_and_scale=False)
        lazy = {n: _lazily(file, a, kind) if a.dtype.kind in "fiu" else a.load() for n, a in ds.items()}
        ds = ds.drop_vars(list(lazy)).load().assign(lazy)
        return schema.migrate(ds)
    except (FileNotFoundError, ArchiveError):
        raise
    except schema.SchemaError as error:
        raise DirectoryError(f"{path}: {error}") from error
    except Exception as error:  # whatever a file that is damaged or not tsdyn's makes netCDF and xarray raise
        raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error


def _lazily(file: netcdf.File, array: xr.DataArray, kind: type[netcdf.Stored]) -> xr.Variable:
    """Dask chunks made of whole disk chunks: as many seeds as fit in `LAZY_BYTES`."""
    stored = array.encoding.get("chunksizes") or array.shape
    chunks = dict(zip(array.dims, stored, strict=True))
    for dim in ("node", "node_2", "teacher_node", "teacher_node_2", "input_node"):
        if dim in chunks:
            chunks[dim] = array.sizes[dim]
    size = max(1, int(np.prod(list(chunks.values()))) * array.dtype.itemsize)
    if "seed" in chunks:
        chunks["seed"] = min(array.sizes["seed"], chunks["seed"] * max(1, LAZY_BYTES // size))
    status = file.path.stat()
    lazy = dask.array.from_array(
        kind(file, str(array.name), array.shape, array.dtype),
        chunks=tuple(max(1, n) for n in chunks.values()),
        name=f"{array.name}-{tokenize(str(file.path.absolute()), status.st_ino, status.st_size, status.st_mtime_ns)}",
        asarray=False,
        fancy=False,
        meta=np.empty((0,) * array.ndim, array.dtype),
    )
    return xr.Variable(array.dims, lazy, {k: v for k, v in array.attrs.items() if not k.startswith("_")})


def write_dataset(path: Path, ds: xr.Dataset) -> None:
    """A small, loaded Dataset as one netCDF file, whole or not at all."""
    with replacing(path, ds.nbytes) as temporary:
        ds.to_netcdf(temporary, engine="netcdf4")


def experiment_of(ds: xr.Dataset) -> Experiment:
    """The experiment that an archive, or any slice of one, is of.

    Raises:
        ValueError: if it has none, as several archives opened together, of which each has its own.
    """
    text = ds.attrs.get("experiment")
    if text is None:
        if "opened" in ds.attrs:
            raise ValueError(
                "experiment_of: several archives opened together have several experiments; ask each by itself, "
                "tsdyn.open(one of them)"
            )
        raise ValueError(
            "experiment_of: the Dataset has no attribute 'experiment'; it is no archive of tsdyn's, or lost its "
            "attributes on the way (xarray's arithmetic drops them; ds.assign_attrs(archive.attrs) puts them back)"
        )
    return Experiment.from_toml_text(str(text))


def swept_dimensions(ds: xr.Dataset | xr.DataArray) -> tuple[str, ...]:
    """Dimensions of `ds` that come from swept keys."""
    return tuple(str(dim) for dim in ds.dims if str(dim) not in schema.DIMENSIONS)


def select(ds: T, **labels: Any) -> T:
    """The points of a sweep with the given values of swept keys, whether each is a dimension or varies with others.

    ``select(ds, polarity=1.0, learning_rate=[0.01, 0.1])``; a list keeps the dimension.  A single point along
    ``point`` loses that dimension.

    Raises:
        KeyError: if a name is no swept key, or no point has such a value; says what there is.
    """
    for name, wanted in labels.items():
        coordinate = ds.coords.get(name)
        if coordinate is None or coordinate.ndim != 1 or coordinate.dims[0] in schema.DIMENSIONS:
            there = [str(n) for n, c in ds.coords.items() if c.ndim == 1 and c.dims[0] not in schema.DIMENSIONS]
            raise KeyError(f"select: no swept key {name!r}; there are {', '.join(there) or 'none'}")
        values = wanted if isinstance(wanted, (list, tuple, np.ndarray)) else [wanted]
        missing = [value for value in values if value not in coordinate.values]
        if missing:
            held = list(dict.fromkeys(coordinate.values.tolist()))
            raise KeyError(f"select: {name} has no {missing}; it has {held}")
        ds = ds.isel({coordinate.dims[0]: np.flatnonzero(np.isin(coordinate.values, values))})
        if values is not wanted and name in ds.dims:
            ds = ds.squeeze(name)
    return ds.squeeze(POINT) if ds.sizes.get(POINT) == 1 else ds


def lowest_layer(ds: xr.Dataset | xr.DataArray) -> int:
    """Label of the lowest layer: 1, also of a slice that starts above it, or where layers are counted from."""
    return min(1, *ds.indexes["layer"].tolist())


def layer(ds: T, number: int) -> T:
    """One layer without padding.

    Node dimensions end where the layer does (for several widths in `ds`, where the widest of them does), so that
    selecting a node that is not there is a KeyError.  In a Dataset that holds student and teacher weights,
    ``input_node`` ends where the wider of the two layers below does.  Variables of the lowest layer alone
    (``alignment``) stay with the lowest layer.  A Dataset without widths (your own) is cut nowhere.

    Args:
        ds: Dataset or variable of a run or a sweep, with a ``layer`` dimension.
        number: A label of ``layer``, 1..L in an archive; layers of your own may be counted from 0.

    Raises:
        ValueError: if `ds` has no such layer.
    """
    if "layer" not in ds.dims or number not in ds.indexes["layer"]:
        held = list(ds.indexes["layer"]) if "layer" in ds.dims else "no layer dimension"
        raise ValueError(f"layer: {number} is not in the dataset, which has {held}")
    if number > lowest_layer(ds) and isinstance(ds, xr.Dataset):  # variables of the lowest alone have no layer
        lowest = [n for n, v in ds.data_vars.items() if "layer" not in v.dims and set(schema.NODE_WIDTHS) & set(v.dims)]
        ds = ds.drop_vars(lowest)
    # one cut, not one after another: dask then reads no more than it asks for
    place = int(ds.get_index("layer").get_loc(number))
    at = {name: c.isel(layer=place) for name, c in ds.coords.items() if "layer" in c.dims}
    ends = {dim: coordinate for dim, coordinate in schema.NODE_WIDTHS.items() if dim in ds.dims}
    widths = {dim: int(at[coordinate].max()) for dim, coordinate in ends.items() if coordinate in at}
    if "input_node" in ds.dims:
        names = {ds.name} if isinstance(ds, xr.DataArray) else set(ds.data_vars)
        below = [c for c, v in (("input_width", "weight"), ("teacher_input_width", "teacher_weight")) if v in names]
        below = below or ["input_width", "teacher_input_width"]
        if held := [int(at[c].max()) for c in below if c in at]:
            widths["input_node"] = max(held)
    return ds.isel({"layer": place, **{dim: slice(0, width) for dim, width in widths.items()}})
