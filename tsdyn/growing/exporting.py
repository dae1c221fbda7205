"""Export archives: to a zarr store, to one netCDF file, or to Parquet tables; goes on where it was killed.

An export is made in ``.NAME.partial`` beside its target, piece by piece, and renamed when it is whole.  Imports no
torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never, get_args

import dask.array
import numpy as np
import xarray as xr
from dask.base import tokenize
from numpy.typing import NDArray

from tsdyn.archive import parquet_stores, reading
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
_PROGRESS = "progress.txt"
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

    Killed and called again, it goes on after the last whole chunk of a variable, which is of one point, or of some
    small ones, if the archive is still the same.

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
    ds = reading.open(source, verify=True)
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
        self.target = target
        self.path = target.with_name(f".{target.name}.partial")
        refuse_link(self.path)
        of, *done = self._noted()
        self.done = set(done) if of == token else set[str]()
        if not self.done and self.path.exists():
            shutil.rmtree(self.path)
        make_directory(self.path)
        write_text(self.path / _PROGRESS, "".join(f"{line}\n" for line in (token, *(done if self.done else ()))))

    def _noted(self) -> list[str]:
        """What the export is of, and the pieces that are whole; a line that was cut short is none."""
        try:
            *lines, _ = (self.path / _PROGRESS).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return [""]
        return lines or [""]

    @property
    def content(self) -> Path:
        """Where the pieces are; it becomes the target, or holds the file that does."""
        return self.path / "content"

    def add(self, piece: str) -> None:
        """Note that a piece is whole."""
        self.done.add(piece)
        with (self.path / _PROGRESS).open("a", encoding="utf-8") as file:
            file.write(f"{piece}\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, whole: Path) -> None:
        """Make a whole file or directory the target."""
        if self.target.exists():
            raise DirectoryError(f"{self.target}: appeared while it was written; nothing was overwritten")
        whole.rename(self.target)
        sync_directory(self.target.parent)
        shutil.rmtree(self.path)


class _Block(NamedTuple):
    """One chunk of a variable, as it is read at once: of one point, or of some small ones.

    Attributes:
        name: The variable's and the number of the chunk.
        variable: The variable.
        at: Where it is in the variable.
        number: Its index among the variable's chunks.
    """

    name: str
    variable: str
    at: tuple[slice, ...]
    number: tuple[int, ...]


def _blocks(ds: xr.Dataset) -> list[_Block]:
    """The chunks of all lazy variables."""
    found = []
    for name, array in ds.data_vars.items():
        if not array.chunks:
            continue
        ends = [np.cumsum((0, *sizes)).tolist() for sizes in array.chunks]
        for number in np.ndindex(*(len(sizes) for sizes in array.chunks)):
            at = tuple(slice(edge[i], edge[i + 1]) for edge, i in zip(ends, number, strict=True))
            found.append(_Block(f"{name}#{'.'.join(map(str, number))}", str(name), at, number))
    return found


def _computed(ds: xr.Dataset, block: _Block) -> NDArray:
    found: NDArray = np.asarray(ds[block.variable].data.blocks[block.number].compute())
    return found


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
    names, blocks = _pieces(ds), _blocks(ds)
    pieces = len(names) + len(blocks)
    for done, name in enumerate(names, start=1):
        if name not in part.done:
            one = _piece(ds, name)
            _clear(part.content / name, name != "coordinates")
            chunks = {key: {"chunks": _zarr_chunks(array)} for key, array in one.data_vars.items() if array.chunks}
            one.to_zarr(
                part.content, mode="a", zarr_format=zarr_format, consolidated=False, encoding=chunks, compute=False
            )
            part.add(name)
        yield done, pieces
    store: Any = zarr.open_group(str(part.content), mode="r+")
    for done, block in enumerate(blocks, start=len(names) + 1):
        if block.name not in part.done:
            store[block.variable][block.at] = _computed(ds, block)
            part.add(block.name)
        yield done, pieces
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
    """The numbers of each variable, chunk by chunk, then one file of all: a netCDF file that is cut short while it
    grows cannot be trusted.
    """
    blocks = _blocks(ds)
    make_directory(part.content)
    for done, block in enumerate(blocks, start=1):
        if block.name not in part.done:
            numbers = _computed(ds, block)
            if not (numbers.dtype.kind == "f" and np.isnan(numbers).all()):  # padding takes no space
                with (part.content / f"{block.name}.npy").open("wb") as file:
                    np.save(file, numbers)
                    file.flush()
                    os.fsync(file.fileno())
            part.add(block.name)
        yield done, len(blocks) + 1
    lazy = {name: ds[name].variable for name in dict.fromkeys(block.variable for block in blocks)}
    held = {name: xr.Variable(a.dims, _kept(part.content, name, a), a.attrs) for name, a in lazy.items()}
    whole = ds.assign(held)[[*ds.data_vars]].assign_attrs(ds.attrs)
    whole.to_netcdf(part.path / "whole.nc", engine="netcdf4", encoding=_netcdf_encoding(whole))
    yield len(blocks) + 1, len(blocks) + 1
    part.finish(part.path / "whole.nc")


def _kept(folder: Path, name: str, array: xr.Variable) -> Any:
    """The chunks of a variable in a folder, as a dask array; NaN where there is no file."""

    def chunk(block_id: tuple[int, ...]) -> NDArray:
        file = folder / f"{name}#{'.'.join(map(str, block_id))}.npy"
        if file.exists():
            found: NDArray = np.load(file, allow_pickle=False)
            return found
        sizes = [of[i] for of, i in zip(array.chunks or (), block_id, strict=True)]
        return np.full(sizes, np.nan, array.dtype)

    meta = np.empty((0,) * array.ndim, array.dtype)
    return dask.array.map_blocks(chunk, chunks=array.chunks, dtype=array.dtype, meta=meta)


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
    work = [(name, list(parquet_tables.blocks(ds, variables))) for name, variables in tables.items()]
    pieces, done = sum(len(blocks) + 1 for _, blocks in work), 0
    for name, blocks in work:
        folder = part.path / name
        for number, block in enumerate(blocks):
            piece = f"{name}#{number}"
            if name not in part.done and piece not in part.done:
                make_directory(folder)
                parquet_tables.write(ds, tables[name], block, folder / f"{number:08d}.parquet")
                part.add(piece)
            done += 1
            yield done, pieces
        if name not in part.done:
            parquet_tables.join(sorted(folder.glob("*.parquet")), part.content / f"{name}.parquet")
            part.add(name)
            shutil.rmtree(folder)
        done += 1
        yield done, pieces
    write_text(part.content / parquet_stores.DESCRIPTION, json.dumps(parquet_stores.described(ds, tables), indent=1))
    part.finish(part.content)
