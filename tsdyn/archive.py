"""One experiment, one directory of netCDF: what was committed, opened lazily as one labelled Dataset.

The directory of a run is written by `Run`; whole files or none (`tsdyn.durable`), so a reader needs no lock and
sees committed epochs only, while a run goes on too.  Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from tsdyn import netcdf, schema
from tsdyn.durable import ArchiveError as ArchiveError
from tsdyn.durable import DirectoryError as DirectoryError
from tsdyn.durable import local_path as local_path
from tsdyn.durable import write_text
from tsdyn.experiment import Experiment, sweep_dimensions
from tsdyn.netcdf import bytes_per_epoch as bytes_per_epoch
from tsdyn.schema import CONSTANTS
from tsdyn.segments import ARCHIVE as ARCHIVE
from tsdyn.segments import EXPERIMENT as EXPERIMENT
from tsdyn.segments import SEGMENTS as SEGMENTS
from tsdyn.segments import Run as Run
from tsdyn.segments import claim as claim
from tsdyn.segments import segments as segments

SWEEP = "sweep.json"

#: In memory, a dask chunk gathers whole disk chunks of several seeds up to this.
LAZY_BYTES = 1 << 24

# --- a sweep's directory -------------------------------------------------------------------------------------


def point_name(values: Mapping[str, Any]) -> str:
    """Directory of one point of a sweep, such as ``overrealization=5,polarity=1.0``."""
    names = sweep_dimensions(values)
    text = ",".join(f"{names[key]}={label(value)}" for key, value in values.items())
    return re.sub(r"[^A-Za-z0-9._+=,-]", "-", text)


def label(value: Any) -> str | int | float:
    """A coordinate value for a swept value: numbers and strings are themselves, lists join with ``-``."""
    if isinstance(value, (bool, dict)):
        return json.dumps(value)
    if isinstance(value, (list, tuple)):
        return "-".join(str(v) for v in value)
    return value  # type: ignore[no-any-return]


def write_sweep(path: Path, experiment: Experiment) -> dict[str, Experiment]:
    """Make `path` the directory of a sweep; its index lists every point and its directory.

    Returns the experiment of each point by directory name.

    Raises:
        ArchiveError: as `claim`.
    """
    claim(path, experiment)
    points = sweep_points(path)
    index = {
        "schema_version": schema.VERSION,
        "dimensions": sweep_dimensions(experiment.sweep),
        "points": [{"directory": name, "values": values} for name, (values, _) in points.items()],
    }
    write_text(path / SWEEP, json.dumps(index, indent=1))
    return {name: point for name, (_, point) in points.items()}


# --- reading -------------------------------------------------------------------------------------------------

T = TypeVar("T", xr.Dataset, xr.DataArray)


def open(path: str | Path) -> xr.Dataset:
    """A run, a sweep or one file as one lazy Dataset; nothing is loaded.

    A sweep's swept keys are leading dimensions, named by the key's last word; points without an archive yet are
    NaN.  A run that is not finished shows its committed epochs.

    Args:
        path: Directory of a run or a sweep, or a netCDF file.

    Raises:
        ArchiveError: if there is nothing of tsdyn's to read there.
    """
    path = local_path(path)
    if path.is_file():
        return _open_file(path)
    if (path / SWEEP).is_file():
        return _open_sweep(path)
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist; runs are made by `tsdyn run EXPERIMENT.toml -o {path}`")
    try:
        return _open_run(path)
    except FileNotFoundError:  # an extension turned the archive into a segment in this moment
        return _open_run(path)


def _open_run(path: Path) -> xr.Dataset:
    """The archive of a finished run, the committed epochs of one that goes on."""
    if (path / ARCHIVE).is_file():
        return _open_file(path / ARCHIVE)
    try:
        parts = [_open_file(segment.path) for segment in segments(path)]
    except (FileNotFoundError, ArchiveError):
        if (path / ARCHIVE).is_file():  # the run was finished in this moment
            return _open_file(path / ARCHIVE)
        raise
    if not parts:
        raise DirectoryError(f"{path}: holds no archive and no committed epoch; finish it with `tsdyn run`")
    constants = parts[0][[name for name in CONSTANTS if name in parts[0]]]
    joined = xr.concat(
        [part.drop_vars(CONSTANTS, errors="ignore").drop_vars("death_epoch") for part in parts],
        dim="epoch",
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="override",
    )
    return joined.merge(constants, compat="override", join="exact").assign_coords(death_epoch=parts[-1]["death_epoch"])


def _open_file(path: Path) -> xr.Dataset:
    netcdf.inspect(path)
    try:
        ds = xr.open_dataset(path, engine="netcdf4", decode_times=False)
        ds = ds.assign({name: _lazily(array) for name, array in ds.data_vars.items()})
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a file that is damaged or not tsdyn's makes netCDF and xarray raise
        raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error
    try:
        return schema.migrate(ds)
    except schema.SchemaError as error:
        raise DirectoryError(f"{path}: {error}") from error


def _lazily(array: xr.DataArray) -> xr.DataArray:
    """Dask chunks made of whole disk chunks: as many seeds as fit in `LAZY_BYTES`."""
    stored = array.encoding.get("chunksizes") or array.shape
    chunks = dict(zip(array.dims, stored, strict=True))
    for dim in ("node", "node_2", "teacher_node", "teacher_node_2", "input_node"):
        if dim in chunks:
            chunks[dim] = array.sizes[dim]
    size = max(1, int(np.prod(list(chunks.values()))) * array.dtype.itemsize)
    if "seed" in chunks:
        chunks["seed"] = min(array.sizes["seed"], chunks["seed"] * max(1, LAZY_BYTES // size))
    return array.chunk(chunks)


def sweep_points(path: Path) -> dict[str, tuple[dict[str, Any], Experiment]]:
    """Directory name → swept values and experiment of each point of the sweep in `path`.

    From ``experiment.toml``: the index beside it is for other readers, and its names are not trusted.
    """
    experiment = Experiment.from_toml(path / EXPERIMENT)
    return {point_name(values): (values, point) for values, point in experiment.points()}


def _open_sweep(path: Path) -> xr.Dataset:
    experiment = Experiment.from_toml(path / EXPERIMENT)
    dims = sweep_dimensions(experiment.sweep)
    opened: dict[tuple[Any, ...], xr.Dataset] = {}
    for name, (values, _) in sweep_points(path).items():
        directory = path / name
        if (directory / ARCHIVE).is_file() or segments(directory):
            opened[tuple(label(values[key]) for key in dims)] = open(directory)
    if not opened:
        raise DirectoryError(f"{path}: no point of this sweep has a committed epoch yet; go on with `tsdyn run`")
    dims_that_differ = (*schema.NODE_WIDTHS, "input_node", "mode", "top_k")
    widest = {dim: max(ds.sizes.get(dim, 0) for ds in opened.values()) for dim in dims_that_differ}
    padded = {key: _padded(ds, widest) for key, ds in opened.items()}
    template = next(iter(padded.values()))
    labels = {dims[key]: [label(v) for v in values] for key, values in experiment.sweep.items()}

    def gather(prefix: tuple[Any, ...]) -> xr.Dataset:
        if len(prefix) == len(dims):
            return padded[prefix] if prefix in padded else _missing(template)
        dim = list(labels)[len(prefix)]
        parts = [gather((*prefix, label)) for label in labels[dim]]
        return xr.concat(
            parts,
            dim=xr.DataArray(labels[dim], dims=dim, name=dim),
            data_vars="all",
            coords="all",
            compat="override",
            join="outer",
            combine_attrs="override",
            fill_value=np.nan,
        )

    ds = gather(())
    ds.attrs = {**template.attrs, "experiment": experiment.to_toml(), "digest": experiment.digest}
    return ds


def _padded(ds: xr.Dataset, widest: Mapping[str, int]) -> xr.Dataset:
    missing = {d: (0, widest[d] - ds.sizes[d]) for d in widest if d in ds.sizes and widest[d] > ds.sizes[d]}
    if not missing:
        return ds
    indexes = {d: np.arange(widest[d]) for d in missing}
    return ds.drop_vars(list(missing)).pad(missing, constant_values=np.nan).assign_coords(indexes)


def _missing(template: xr.Dataset) -> xr.Dataset:
    """A point that has no archive yet."""
    blank = xr.full_like(template, np.nan)
    return blank.assign_coords({n: xr.full_like(c, -1) for n, c in template.coords.items() if n not in template.dims})


def write_dataset(path: Path, ds: xr.Dataset) -> None:
    """A small, loaded Dataset as one netCDF file, whole or not at all."""
    with _replacing(path, ds.nbytes) as temporary:
        ds.to_netcdf(temporary, engine="netcdf4")


def swept_dimensions(ds: xr.Dataset | xr.DataArray) -> tuple[str, ...]:
    """Dimensions of `ds` that come from swept keys."""
    return tuple(str(dim) for dim in ds.dims if str(dim) not in schema.DIMENSIONS)


def layer(ds: T, number: int) -> T:
    """One layer without padding.

    Node dimensions end where the layer does (for several widths in `ds`, where the widest of them does), so that
    selecting a node that is not there is a KeyError.  In a Dataset that holds student and teacher weights,
    ``input_node`` ends where the wider of the two layers below does.  Variables of the lowest layer alone
    (``alignment``) stay with layer 1.

    Args:
        ds: Dataset or variable of a run or a sweep, with a ``layer`` dimension.
        number: 1..L.

    Raises:
        ValueError: if `ds` has no such layer.
    """
    if "layer" not in ds.dims or number not in ds.indexes["layer"]:
        held = list(ds.indexes["layer"]) if "layer" in ds.dims else "no layer dimension"
        raise ValueError(f"layer: {number} is not in the dataset, which has {held}")
    one = ds.sel(layer=number)
    if number > 1 and isinstance(one, xr.Dataset):  # variables of the lowest layer alone have nodes but no layer
        lowest = [n for n, v in ds.data_vars.items() if "layer" not in v.dims and set(schema.NODE_WIDTHS) & set(v.dims)]
        one = one.drop_vars(lowest)
    ends = {dim: coordinate for dim, coordinate in schema.NODE_WIDTHS.items() if dim in one.dims}
    widths = {dim: int(one[coordinate].max()) for dim, coordinate in ends.items() if coordinate in one.coords}
    if "input_node" in one.dims:
        names = {one.name} if isinstance(one, xr.DataArray) else set(one.data_vars)
        below = [c for c, v in (("input_width", "weight"), ("teacher_input_width", "teacher_weight")) if v in names]
        below = below or ["input_width", "teacher_input_width"]
        widths["input_node"] = max(int(one[c].max()) for c in below if c in one.coords)
    return one.isel({dim: slice(0, width) for dim, width in widths.items()})
