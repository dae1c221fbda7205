"""One netCDF file of the archive: its layout on disk, and a safe way to open any netCDF file.  Imports no torch."""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import netCDF4
import numpy as np
import xarray as xr

from tsdyn import vocabulary
from tsdyn.archive import hdf5, own_process, stored_numbers
from tsdyn.archive.swept_values import Swept
from tsdyn.archive.whole_files import (
    ALWAYS_VERIFIED,
    INTACT,
    ArchiveError,
    DirectoryError,
    Stamp,
    readable,
    refuse_changed,
    replacing,
    seal_of,
    stamp,
)
from tsdyn.schema import Layout
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import COORDINATES

#: On disk, a chunk holds one seed, one layer and as many epochs as fit in this.
CHUNK_BYTES = 1 << 22
#: Limits on what a file may declare: chunks of this size or of the file's own; this many chunks, or one per KiB of the
#: file; and, since padding is declared but not stored, this many times its size in all.
DECLARED_CHUNK, DECLARED_CHUNKS, DECLARED_RATIO = 1 << 26, 1 << 20, 100_000
#: Coordinates and text, which are loaded when a file is opened, may take this many bytes, or as many as the file.
LOADED_BYTES = 1 << 20
_TILE = 16
#: Group of a file that holds all that training goes on from after the file's last epoch.
STATE = "state"
_STATE_AT = re.compile(rf"{STATE}_after_epoch_(\d{{6,}})")
#: `blocks` holds about this much of a variable in memory.
BLOCK_BYTES = 1 << 26

State = Mapping[str, np.ndarray]
#: Files are read, or written from their beginning; none is changed in its place.
Mode: TypeAlias = Literal["r", "w"]
#: Variable → one array (seed, epoch), or one array per layer from the lowest up, (seed, epoch, node...); constants
#: have no epoch.
Records = Mapping[str, np.ndarray | list[np.ndarray]]


def _opened(path: str | Path, mode: Mode) -> netCDF4.Dataset:
    """``netCDF4.Dataset(path, mode)``; a file that fails while it is opened stays open, since closing it can crash."""
    nc = netCDF4.Dataset.__new__(netCDF4.Dataset)
    try:
        nc.__init__(path, mode, format="NETCDF4")  # type: ignore[misc]
    except (OSError, RuntimeError, ValueError):
        if nc._isopen:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(nc))
        raise
    return nc


@contextmanager
def dataset(
    path: Path, mode: Mode = "r", *, only: str | None = None, upto: float | None = ALWAYS_VERIFIED
) -> Iterator[netCDF4.Dataset]:
    """An open file, under the lock of `hdf5.guarded`; values are as stored, nothing is masked or scaled.

    Args:
        path: The file.
        mode: As in ``netCDF4.Dataset``.
        only: The one variable that will be read; None for any.
        upto: A file that is read goes through `refuse_unproven` with this first; None if it just did, or if this
            process has just written it.

    Raises:
        ArchiveError: if it is refused there.
        DirectoryError: if it exists and cannot be read, or what will be read is stored in other files or in number
            types that crash the library.
        FileNotFoundError: if there is none, or it was moved, removed or replaced while it was opened, which takes
            several looks at its name.
    """
    if mode == "r" and upto is not None:
        refuse_unproven(path, upto=upto)
    with hdf5.guarded():
        before = _at(path)
        try:
            nc = _opened(path, mode)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            if mode == "r":
                _refuse_gone(path, before)
                raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error
            raise
        file = hdf5.opened(path)
        try:
            nc.set_auto_maskandscale(False)
            if mode != "w":
                if file is None:
                    _refuse_gone(path, before)
                    raise DirectoryError(
                        f"{path}: the HDF5 library cannot open it: the file system fails, or it is damaged; nothing "
                        "was changed"
                    )
                if odd := hdf5.oddities(file, _names(nc) if only is None else [only]):
                    _refuse_gone(path, before)
                    raise DirectoryError(f"{path}: {odd[0]}; it is not tsdyn's")
            yield nc
            if mode != "r":
                _flush(nc, path)
        finally:
            _close(nc, file, path)


def refuse_unproven(path: Path, *, upto: float = math.inf) -> None:
    """Refuse a file that could be damaged where the library crashes or never returns; a process of its own reads any.

    That is a file of at most `upto` bytes that differs from its checksum, and one without a checksum of which a process
    of its own could not read all, which is tried once while the file is unchanged.

    Raises:
        ArchiveError: naming the file and the way out.
        FileNotFoundError: as `refuse_changed`.
    """
    if own_process.within():
        return
    refuse_changed(path, upto=upto)
    with readable(path):
        now = stamp(path)
    if now.sealed is None and (why := _unreadable(path.absolute(), now)) is not None:
        raise ArchiveError(
            f"{path}: has no checksum beside it ({seal_of(path).name}) and was not opened: the process in which it was "
            f"read first {why}; put a whole copy in its place, or the checksum of one, or let `tsdyn repair` keep what "
            "can be read of its run"
        )


@lru_cache(maxsize=1 << 14)
def _unreadable(path: Path, now: Stamp) -> str | None:
    """How the process ended that read all of the file with this stamp; None if it came to its end."""
    try:
        own_process.reading(path, lambda: _read_all(path))
        if stamp(path) != now:
            raise FileNotFoundError(errno.ENOENT, "was moved, removed or replaced while it was read", str(path))
    except own_process.Crashed as error:
        if error.how == "SIGXCPU":
            return "did not come to an end in the seconds of a processor that such a file warrants"
        return f"crashed ({error.how})"
    except MemoryError:
        return "needed more memory than such a file warrants"
    return None


def _read_all(path: Path) -> None:
    """Read all that a file holds; what cannot be read, or must not, is passed by, since reading it says so."""
    said = (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)
    with suppress(*said):
        refuse_foreign(path)
        with dataset(path) as nc:
            refuse_oversized(path, nc)
            for holder in (nc, *nc.groups.values()):
                attributes(holder)
                for array in holder.variables.values():
                    with suppress(*said):
                        attributes(array)
                    for index in blocks(array):
                        with suppress(*said):
                            array[index]


def blocks(array: netCDF4.Variable) -> Iterator[tuple[slice, ...]]:
    """Indices that cover a variable in whole chunks, of about `BLOCK_BYTES` each."""
    if not isinstance(array.dtype, np.dtype):  # text, of which there is little
        yield tuple(slice(0, n) for n in array.shape)
        return
    step = stored_chunk(array)
    for axis in reversed(range(len(step))):
        held = math.prod(step) * array.dtype.itemsize
        step[axis] = min(array.shape[axis], step[axis] * max(1, BLOCK_BYTES // max(1, held)))
    starts = (range(0, n, max(1, s)) for n, s in zip(array.shape, step, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(c, min(c + s, n)) for c, s, n in zip(corner, step, array.shape, strict=True))


def _at(path: Path) -> tuple[int, int, int] | None:
    """Which file is at a path; None for none."""
    with suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _refuse_gone(path: Path, before: tuple[int, int, int] | None) -> None:
    """Raise FileNotFoundError if a path no longer leads to the file that it led to before."""
    if before is not None and _at(path) != before:
        raise FileNotFoundError(errno.ENOENT, "was moved, removed or replaced while it was opened", str(path))


def _names(nc: netCDF4.Dataset) -> list[str]:
    return [*nc.variables, *(f"{group}/{name}" for group, held in nc.groups.items() for name in held.variables)]


def _close(nc: netCDF4.Dataset, file: int | None, path: Path) -> None:
    """Close a file, and the second handle on it (`hdf5.opened`); what `_flush` could not write is left open.

    Raises:
        ArchiveError: if that fails.
    """
    if not nc._isopen:
        return
    try:
        nc.close()
    except (OSError, RuntimeError) as error:
        nc._isopen = 0  # so that it is not closed again, which would crash
        raise ArchiveError(f"{path}: cannot be closed: {error}: the file system fails; {INTACT}") from error
    finally:
        if file is not None and not hdf5.closed(file):
            raise ArchiveError(f"{path}: cannot be closed: the file system fails; {INTACT}")


def _flush(nc: netCDF4.Dataset, path: Path) -> None:
    """Write all to disk before the file is closed: where closing fails, as on a full network drive, it crashes."""
    nc.sync()
    try:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    except OSError:
        nc._isopen = 0  # so that netCDF4 does not try to close it: that would fail likewise
        raise


def refuse_foreign(path: Path) -> None:
    """Raise DirectoryError if the first bytes are not netCDF-4's, before any library parses the file."""
    with readable(path), path.open("rb") as file:
        if file.read(8) != b"\x89HDF\r\n\x1a\n":
            raise DirectoryError(f"{path}: not a readable netCDF file: no netCDF-4 header")


def refuse_oversized(path: Path, nc: netCDF4.Dataset) -> None:
    """Refuse a file that declares more than its own size warrants, before any of it is loaded.

    Coordinates and text, which are loaded when a file is opened, must fit in `_room`; of other variables a chunk must.

    Raises:
        DirectoryError: naming the dimension or variable that declares too much.
    """
    size, room = path.stat().st_size, _room(path)
    try:
        loaded = loaded_at_once(nc)
        for name, dimension in nc.dimensions.items():
            if name not in nc.variables and dimension.size > size:
                raise DirectoryError(
                    f"{path}: {name} declares {dimension.size} labels, more than a file of {size} bytes warrants; it "
                    "is damaged or not tsdyn's"
                )
        for name, array in nc.variables.items():
            item = array.dtype.itemsize if isinstance(array.dtype, np.dtype) else 16  # where its text is
            chunk = stored_chunk(array)
            nbytes, chunk_bytes = math.prod(array.shape) * item, math.prod(chunk) * item
            chunks = math.prod(-(-n // max(1, c)) for n, c in zip(array.shape, chunk, strict=True))
            if name in loaded:
                room -= nbytes
            if (
                room < 0
                or chunk_bytes > max(size, DECLARED_CHUNK)
                or chunks > max(size // 1024, DECLARED_CHUNKS)
                or nbytes > DECLARED_RATIO * size
            ):
                raise DirectoryError(
                    f"{path}: {name} declares the shape {array.shape} in chunks of {tuple(chunk)}, more than a "
                    f"file of {size} bytes warrants; it is damaged or not tsdyn's"
                )
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, DirectoryError):
            raise
        raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error


def _room(path: Path) -> int:
    """The most bytes of a file that may be loaded when it is opened."""
    return max(path.stat().st_size, LOADED_BYTES)


def stored_chunk(array: netCDF4.Variable) -> list[int]:
    """Shape of a variable's chunks on disk; its own shape where it is stored in one piece."""
    stored = array.chunking()
    return list(stored) if isinstance(stored, list) else list(array.shape)


def loaded_at_once(nc: netCDF4.Dataset) -> dict[str, bool]:
    """Variables that are loaded when a file is opened, coordinates and text: name → whether it is a coordinate."""
    named = {*nc.dimensions, *COORDINATES}
    holders: list[Any] = [nc, *nc.variables.values()]
    for holder in holders:
        if "coordinates" in holder.ncattrs():
            named.update(str(holder.getncattr("coordinates")).split())
    return {
        name: name in named
        for name, array in nc.variables.items()
        if name in named or not isinstance(array.dtype, np.dtype) or array.dtype.kind not in "fiu"
    }


def loaded(path: Path, array: netCDF4.Variable) -> xr.Variable:
    """A coordinate or a text of an open file, as xarray decodes it, but times stay numbers.

    Raises:
        DirectoryError: if its text is more than the file's size warrants.
    """
    attrs = attributes(array)
    if isinstance(array.dtype, np.dtype):
        values = stored_numbers.all_of(array)
        if array.dtype.kind in "iuf" and not attrs.keys() & set(_PACKING):
            return xr.Variable(array.dimensions, values, attrs)
    else:  # the size of text is known only once it is read, so it is read a little at a time
        values, room = np.empty(math.prod(array.shape), object), _room(path)
        step = max(1, LOADED_BYTES // path.stat().st_size)
        for start in range(0, len(values), step):
            where = np.unravel_index(np.arange(start, min(start + step, len(values))), array.shape or (1,))
            values[start : start + step] = [
                str(array[at] if array.shape else array[...]) for at in zip(*where, strict=True)
            ]
            room -= sum(map(len, values[start : start + step]))
            if room < 0:
                raise DirectoryError(
                    f"{path}: {array.name} holds more text than a file of {path.stat().st_size} bytes warrants; it is "
                    "damaged or not tsdyn's"
                )
        values = values.reshape(array.shape)
    return decoded(str(array.name), xr.Variable(array.dimensions, values, attrs))


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a file or of a variable in it.

    Raises:
        DirectoryError: if the file is damaged where they are.
    """
    try:
        return {name: holder.getncattr(name) for name in holder.ncattrs()}
    except (AttributeError, OSError, RuntimeError, ValueError) as error:  # netCDF4 calls a damaged one not there
        file = holder if isinstance(holder, netCDF4.Dataset) else holder.group()
        raise DirectoryError(f"{file.filepath()}: not a readable netCDF file: {error}") from error


#: Attributes by which stored numbers differ from the numbers they mean.
_PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned", "dtype")


def packing(dtype: np.dtype, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A variable's attributes that say how its numbers are packed; empty where they are stored as they are."""
    found = {name: attrs[name] for name in _PACKING if name in attrs}
    missing = all(name in ("_FillValue", "missing_value") for name in found)
    plain = missing and dtype.kind == "f" and all(np.isnan(value).all() for value in found.values())
    return {} if plain else found


def decoded(name: str, variable: xr.Variable) -> xr.Variable:
    """The numbers that stored ones mean, by ``scale_factor``, ``add_offset``, ``_FillValue``, ...; in memory."""
    return xr.conventions.decode_cf_variable(name, variable, decode_times=False, decode_timedelta=False).load()


def _tile(sizes: Sequence[int]) -> int:
    """Chunk length along a node dimension that is padded to the widest layer; chunks of padding alone take no space.

    It is the longest that wastes at most an eighth of the true sizes in chunks that are partly padding.
    """
    widest = max(sizes)
    for pieces in range(1, widest // _TILE + 1):
        tile = -(-widest // pieces)
        if sum(-(-size // tile) * tile for size in sizes) <= 1.125 * sum(sizes):
            return tile
    return min(_TILE, widest)


def _sizes(layout: Layout, epochs: int) -> dict[str, int]:
    sizes = {"seed": len(layout.seeds), "epoch": epochs, "layer": layout.depth}
    extra = (dim for dim, _ in layout.extra)
    dims = dict.fromkeys((*vocabulary.NODE_WIDTHS, "input_node", *vocabulary.SIZED, *extra))
    return sizes | {dim: layout.padded(dim) for dim in dims}


def _chunks(variable: vocabulary.Variable, layout: Layout, sizes: Mapping[str, int], itemsize: int) -> list[int]:
    chunk = dict.fromkeys(("seed", "layer"), 1)
    for dim in variable.dims:
        if dim not in ("seed", "epoch", "layer"):
            chunk[dim] = _tile(layout.node_widths(variable, dim))
    inner = math.prod(chunk[d] for d in variable.dims if d != "epoch")
    if not variable.layered:
        chunk["seed"] = min(sizes["seed"], max(1, CHUNK_BYTES // (inner * itemsize)))
        inner *= chunk["seed"]
    chunk["epoch"] = min(max(1, CHUNK_BYTES // (inner * itemsize)), max(1, sizes["epoch"]))
    return [chunk[d] for d in variable.dims]


def create(
    nc: netCDF4.Dataset,
    layout: Layout,
    epochs: Sequence[vocabulary.Label],
    variables: Sequence[str],
    dtype: str,
    attrs: Mapping[str, Any],
    swept: Sequence[Swept] = (),
) -> None:
    """Make dimensions, coordinates and empty variables in `nc`; what is never written reads as NaN.

    `epochs` are the labels along the run's dimension, ``layout.path``, and `swept` the swept values of its point.
    """
    sizes = _sizes(layout, len(epochs))
    used = {d for name in variables for d in variable_of(name).dims} | {"seed", "epoch", "layer"}
    for dim in (d for d in sizes if d in used):
        name = layout.path if dim == "epoch" else dim
        nc.createDimension(name, sizes[dim])
        labels = {
            "seed": layout.seeds,
            "epoch": epochs,
            "layer": range(1, layout.depth + 1),
            "quantile": layout.quantiles,
            "top_k": range(1, sizes["top_k"] + 1),
            "teacher_layer": range(1, sizes["teacher_layer"] + 1),
            **{d: range(sizes[d]) for d in (*vocabulary.NODE_WIDTHS, "input_node", "mode", "entry", "teacher_entry")},
            **{d: range(size) for d, size in layout.extra},
        }[dim]
        kind = "f8" if name in vocabulary.REAL_LABELS else "i8"
        labelled = nc.createVariable(name, kind, (name,), fletcher32=len(labels) > 0)
        labelled.long_name = vocabulary.DIMENSIONS[name]
        stored_numbers.put_all(labelled, np.asarray(labels, dtype=kind))
    columns = {
        "width": layout.widths,
        "teacher_width": layout.teacher_widths,
        "input_width": layout.input_widths,
        "teacher_input_width": layout.teacher_input_widths,
    }
    for name, values in columns.items():
        column = nc.createVariable(name, "i8", ("layer",), fletcher32=True)
        column.setncatts(COORDINATES[name].attrs)
        stored_numbers.put_all(column, np.asarray(values, dtype=np.int64))
    _write_layer_names(nc, layout)
    death = nc.createVariable("death_epoch", "i8", ("seed",), fletcher32=True)
    death.setncatts(COORDINATES["death_epoch"].attrs)
    stored_numbers.put_all(death, np.full(len(layout.seeds), -1))
    for name in variables:
        variable = variable_of(name)
        array = nc.createVariable(
            name,
            dtype,
            variable.along(layout.path),
            fill_value=np.nan,
            fletcher32=len(epochs) > 0 or "epoch" not in variable.dims,
            chunksizes=_chunks(variable, layout, sizes, np.dtype(dtype).itemsize),
        )
        said = dict(layout.comments).get(name)
        array.setncatts(variable.attrs | ({} if said is None else {"comment": said}))
    _write_swept(nc, swept)
    named = [*columns, *(["layer_name"] if layout.layer_names else []), "death_epoch", *(each.name for each in swept)]
    nc.setncatts({**attrs, "coordinates": " ".join(named)})


def _write_layer_names(nc: netCDF4.Dataset, layout: Layout) -> None:
    """Write the names of the layers where the layout has them; empty names where the teacher is deeper."""
    if layout.layer_names:
        names = nc.createVariable("layer_name", str, ("layer",))
        names.setncatts(COORDINATES["layer_name"].attrs)
        absent = [""] * (layout.depth - len(layout.layer_names))
        names[:] = np.asarray([*layout.layer_names, *absent], dtype=object)


def _write_swept(nc: netCDF4.Dataset, swept: Sequence[Swept]) -> None:
    """Write scalar coordinates with the values of swept keys."""
    for each in swept:
        kind: Any = str if isinstance(each.value, str) else np.asarray(each.value).dtype
        scalar = nc.createVariable(each.name, kind, ())
        scalar.setncatts(each.attrs)
        scalar[...] = np.asarray(each.value, dtype=object if kind is str else kind)


def index(
    variable: vocabulary.Variable, layout: Layout, epochs: slice, layer: int | None, members: slice = slice(None)
) -> tuple[slice | int, ...]:
    """The index of one layer of a variable in a file, without its padding."""
    at: dict[str, slice | int] = {"seed": members, "epoch": epochs}
    if layer is not None:
        at |= {"layer": layer - 1}
    inner = [dim for dim in variable.dims if dim not in ("seed", "epoch", "layer")]
    at |= {dim: slice(0, n) for dim, n in zip(inner, layout.block(variable, layer), strict=True)}
    return tuple(at[dim] for dim in variable.dims)


def bytes_per_epoch(layout: Layout, variables: Sequence[str], dtype: str) -> int:
    """Size of one recorded epoch of all members, without padding."""
    return _per_epoch(layout, tuple(map(variable_of, variables))) * len(layout.seeds) * np.dtype(dtype).itemsize


@lru_cache(maxsize=16)  # asked of every point of a sweep, several times
def _per_epoch(layout: Layout, variables: tuple[vocabulary.Variable, ...]) -> int:
    """How many numbers one epoch of one member records."""
    numbers = 0
    for variable in (each for each in variables if "epoch" in each.dims):
        layers = range(1, layout.depth + 1) if variable.layered else (None,)
        numbers += sum(math.prod(layout.block(variable, layer)) for layer in layers)
    return numbers


def stored_bytes(
    layout: Layout, variables: Sequence[str], dtype: str, epochs: int, *, depths: Mapping[str, int] | None = None
) -> int:
    """Size in a file of so many recorded epochs of all members, with the padding of the chunks that hold them.

    Args:
        layout: Of the file.
        variables: Names of variables; those that are not recorded along the run count once.
        dtype: Of their numbers.
        epochs: Number of recorded epochs.
        depths: Number of layers of each variable that are written; all layers if not given.
    """
    size = np.dtype(dtype).itemsize
    return size * _stored(layout, tuple(map(variable_of, variables)), size, epochs, tuple((depths or {}).items()))


@lru_cache(maxsize=16)
def _stored(
    layout: Layout,
    variables: tuple[vocabulary.Variable, ...],
    size: int,
    epochs: int,
    depths: tuple[tuple[str, int], ...],
) -> int:
    """How many numbers of that many bytes, padding included, a file holds; `depths` as pairs."""
    sizes, numbers = _sizes(layout, epochs), 0
    for variable in variables:
        chunk = dict(zip(variable.dims, _chunks(variable, layout, sizes, size), strict=True))
        inner = [dim for dim in variable.dims if dim not in ("seed", "epoch", "layer")]
        depth = dict(depths).get(variable.name, layout.depth)
        for layer in range(1, depth + 1) if variable.layered else (None,):
            held = dict(zip(inner, layout.block(variable, layer), strict=True))
            held |= {"seed": sizes["seed"], "epoch": epochs, "layer": 1}
            numbers += math.prod(-(-held[dim] // chunk[dim]) * chunk[dim] for dim in variable.dims)
    return numbers


def write_state(nc: netCDF4.Dataset, state: State, group: str = STATE) -> None:
    """Write a group of all that training goes on from: arrays by name."""
    held = nc.createGroup(group)
    for name, array in state.items():
        dims = tuple(f"{name}_{i}" for i in range(array.ndim))
        for dim, size in zip(dims, array.shape, strict=True):
            held.createDimension(dim, size)
        stored = held.createVariable(name, array.dtype, dims, fletcher32=array.ndim > 0, fill_value=False)
        stored_numbers.put_all(stored, array)


def read_state(nc: netCDF4.Dataset, group: str = STATE) -> dict[str, np.ndarray]:
    """The arrays of a group of `write_state`; none if the file has no such group."""
    found = nc.groups[group].variables if group in nc.groups else {}
    return {name: stored_numbers.all_of(array) for name, array in found.items()}


def state_groups(nc: netCDF4.Dataset) -> list[str]:
    """The names of the groups that hold states of all members: `STATE`, and those of states along the way.

    Development versions of 0.2 left some of a part of the members where seeds were gained, without saying of which.
    """
    members = nc.dimensions["seed"].size if "seed" in nc.dimensions else None

    def of_all(name: str) -> bool:
        death = nc.groups[name].variables.get("death_epoch")
        return members is None or death is None or death.shape == (members,)

    return [name for name in nc.groups if name == STATE or (_STATE_AT.fullmatch(name) and of_all(name))]


def state_at(epoch: int) -> str:
    """The name of the group that holds the state after an epoch along the way (``record.state_every``)."""
    return f"{STATE}_after_epoch_{epoch:06d}"


def epoch_of(group: str) -> int | None:
    """The epoch after which a group holds the state, by its name; None for `STATE`, the last one."""
    match = _STATE_AT.fullmatch(group)
    return None if match is None else int(match[1])


def write_dataset(path: Path, ds: xr.Dataset) -> None:
    """Write a small, loaded Dataset as one netCDF file, whole or not at all."""
    with replacing(path, ds.nbytes) as temporary:
        ds.to_netcdf(temporary, engine="netcdf4")
