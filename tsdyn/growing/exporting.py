"""Export archives: to a zarr store, to one netCDF file, or to Parquet tables; goes on where it was killed.

An export is made in ``.NAME.partial`` beside its target, piece by piece, and renamed when it is whole.  Imports no
torch.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import xarray as xr
from dask.base import tokenize

from tsdyn.archive import reading
from tsdyn.archive.whole_files import (
    ArchiveError,
    DirectoryError,
    local_path,
    make_directory,
    refuse_link,
    refused,
    sync_directory,
    write_text,
)
from tsdyn.archive.zarr_stores import without_text
from tsdyn.growing import parquet_tables

Format = Literal["zarr", "netcdf", "parquet"]
SUFFIXES: Mapping[str, str] = {"zarr": ".zarr", "netcdf": ".nc", "parquet": ".parquet"}
#: A chunk of a zarr store holds about this much, so that a slice of a few members reads little more than it needs.
ZARR_BYTES = 1 << 23
#: File in an unfinished export: what it is an export of, and the pieces that are whole.
_PROGRESS = "progress.json"
#: What each format needs beside what tsdyn installs.
_NEEDS: Mapping[str, str] = {"zarr": "zarr", "parquet": "pyarrow"}


def export(
    path: str | Path,
    to: Format,
    output: str | Path | None = None,
    *,
    zarr_format: int = 2,
    told: Callable[[int, int], None] = lambda done, pieces: None,
) -> Path:
    """Write an archive in another format; returns where it is.

    Killed and called again, it goes on after the last whole variable (or table), if the archive is still the same.

    Args:
        path: A run, a sweep or a file.
        to: ``zarr``: a store, of format 2 with consolidated metadata, or of format 3 without, in which texts are
            numbers with the words in an attribute.  ``netcdf``: one file.  ``parquet``: a directory with one table per
            set of dimensions, long and without padding.
        output: Where to; NAME.zarr, NAME.nc or NAME.parquet beside the archive if not given.
        zarr_format: 2 or 3.
        told: Called with (pieces done, pieces) after every piece.

    Raises:
        DirectoryError: if there is something at `output`, a package is not installed, or nothing can be read.
        ArchiveError: if it cannot be written; what is whole of it is kept.
    """
    if to not in get_args(Format):
        raise DirectoryError(f"export: to={to!r}; it is one of {', '.join(get_args(Format))}")
    if zarr_format not in (2, 3):
        raise DirectoryError(f"export: zarr_format={zarr_format!r}; it is 2 or 3")
    needed = _NEEDS.get(to)
    if needed is not None and importlib.util.find_spec(needed) is None:
        extra = {"zarr": "zarr", "pyarrow": "parquet"}[needed]
        raise DirectoryError(f"export: --to {to} needs {needed}: pip install 'tsdyn[{extra}]'")
    source = local_path(path)
    name = source.absolute().name.removesuffix(".nc") + SUFFIXES[to]
    target = local_path(output) if output is not None else source.absolute().parent / name
    refuse_link(target)
    if target.exists():
        raise DirectoryError(f"{target}: is there already; nothing was overwritten: remove it, or give another with -o")
    ds = reading.open(source)
    part = _Partial(target, tokenize(ds, to, zarr_format))
    try:
        for done, pieces in _written(ds, to, part, zarr_format):
            told(done, pieces)
    except OSError as error:
        raise refused(target, error) from error
    except RuntimeError as error:  # of the netCDF library: it hides a full disk
        if isinstance(error, ArchiveError):
            raise
        raise refused(target, error, ds.nbytes) from error
    return target


def _written(ds: xr.Dataset, to: Format, part: _Partial, zarr_format: int) -> Iterator[tuple[int, int]]:
    match to:
        case "zarr":
            yield from _to_zarr(ds, part, zarr_format)
        case "netcdf":
            yield from _to_netcdf(ds, part)
        case "parquet":
            yield from _to_parquet(ds, part)
        case other:
            assert_never(other)


class _Partial:
    """The directory of an unfinished export.

    Args:
        target: Where the export is to be.
        token: What it is of; pieces of another are removed.
    """

    def __init__(self, target: Path, token: str) -> None:
        self.target, self._token = target, token
        self.path = target.with_name(f".{target.name}.partial")
        refuse_link(self.path)
        self.done: list[str] = []
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((self.path / _PROGRESS).read_text(encoding="utf-8"))
            self.done = [str(piece) for piece in kept["done"]] if kept["of"] == token else []
        if not self.done and self.path.exists():
            shutil.rmtree(self.path)
        make_directory(self.path)

    @property
    def content(self) -> Path:
        """Where the pieces are; it becomes the target, or holds the file that does."""
        return self.path / "content"

    def add(self, piece: str) -> None:
        """Note that a piece is whole."""
        self.done.append(piece)
        write_text(self.path / _PROGRESS, json.dumps({"of": self._token, "done": self.done}))

    def finish(self, whole: Path) -> None:
        """Make a whole file or directory the target."""
        if self.target.exists():
            raise DirectoryError(f"{self.target}: appeared while it was written; nothing was overwritten")
        whole.rename(self.target)
        sync_directory(self.target.parent)
        shutil.rmtree(self.path)


def _pieces(ds: xr.Dataset) -> list[str]:
    """Names of the variables; the last piece, ``coordinates``, is everything else.

    Each piece that is written to a zarr store replaces the store's attributes, so that those of the last one stay.
    """
    return [*(str(name) for name in ds.data_vars), "coordinates"]


def _piece(ds: xr.Dataset, name: str) -> xr.Dataset:
    if name == "coordinates":
        return ds.drop_vars(list(ds.data_vars))
    return xr.Dataset({name: ds[name].variable})


def _to_zarr(ds: xr.Dataset, part: _Partial, zarr_format: int) -> Iterator[tuple[int, int]]:
    import zarr

    if zarr_format == 3:
        ds = without_text(ds)
    pieces = _pieces(ds)
    for done, name in enumerate(pieces, start=1):
        if name not in part.done:
            one = _piece(ds, name)
            _clear(part.content / name, name != "coordinates")
            chunks = {key: {"chunks": _zarr_chunks(array)} for key, array in one.data_vars.items() if array.chunks}
            one.to_zarr(part.content, mode="a", zarr_format=zarr_format, consolidated=False, encoding=chunks)
            part.add(name)
        yield done, len(pieces)
    if zarr_format == 2:
        zarr.consolidate_metadata(str(part.content), zarr_format=2)
    part.finish(part.content)


def _clear(folder: Path, there: bool) -> None:
    """Remove an array that was cut short."""
    if there and folder.exists():
        shutil.rmtree(folder)


def _zarr_chunks(array: xr.DataArray) -> tuple[int, ...]:
    """The chunks that are read from disk, cut along their leading dimensions until they are small enough."""
    chunk = [sizes[0] for sizes in array.chunks or ()]
    item = array.dtype.itemsize
    for axis, dim in enumerate(array.dims):
        nbytes = item
        for size in chunk:
            nbytes *= size
        if nbytes > ZARR_BYTES and dim not in ("node", "input_node", "teacher_node"):
            chunk[axis] = 1  # divides what is read, so that no two tasks write one chunk
    return tuple(chunk)


def _to_netcdf(ds: xr.Dataset, part: _Partial) -> Iterator[tuple[int, int]]:
    """One file per variable, then one of all: a netCDF file that is cut short while it grows cannot be trusted."""
    pieces = _pieces(ds)
    make_directory(part.content)
    files = {name: part.content / f"{number}.nc" for number, name in enumerate(pieces)}
    for done, name in enumerate(pieces, start=1):
        if name not in part.done:
            _piece(ds, name).to_netcdf(files[name], engine="netcdf4", encoding=_netcdf_encoding(_piece(ds, name)))
            part.add(name)
        yield done, len(pieces) + 1
    opened = {
        name: xr.open_dataset(file, engine="netcdf4", chunks={}, decode_times=False) for name, file in files.items()
    }
    try:
        whole = opened["coordinates"].assign({n: one[n] for n, one in opened.items() if n != "coordinates"})
        whole = whole[[*ds.data_vars]].assign_attrs(ds.attrs)
        whole.to_netcdf(part.path / "whole.nc", engine="netcdf4", encoding=_netcdf_encoding(whole))
    finally:
        for one in opened.values():
            one.close()
    yield len(pieces) + 1, len(pieces) + 1
    part.finish(part.path / "whole.nc")


def _netcdf_encoding(ds: xr.Dataset) -> dict[Any, dict[str, Any]]:
    """Every block that is read at once as a chunk of the file, with a checksum and NaN where nothing is."""
    return {
        name: {"chunksizes": _zarr_chunks(array), "fletcher32": True, "_FillValue": float("nan")}
        for name, array in ds.data_vars.items()
        if array.chunks and array.dtype.kind == "f" and array.ndim
    }


def _to_parquet(ds: xr.Dataset, part: _Partial) -> Iterator[tuple[int, int]]:
    tables = parquet_tables.tables(ds)
    make_directory(part.content)
    for done, (name, variables) in enumerate(tables.items(), start=1):
        if name not in part.done:
            parquet_tables.write(ds, variables, part.content / f"{name}.parquet")
            part.add(name)
        yield done, len(tables)
    described = {"attributes": _plain(ds.attrs), "tables": {name: list(names) for name, names in tables.items()}}
    write_text(part.content / "dataset.json", json.dumps(described, indent=1))
    part.finish(part.content)


def _plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in attrs.items()}
