"""One experiment, one directory of netCDF: append, commit, resume, open lazily.

Nothing is written in place: every file is written under a temporary name, flushed to disk and renamed, so a
reader sees whole files or none.  Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import netCDF4
import numpy as np
import xarray as xr

from tsdyn import schema
from tsdyn.experiment import Experiment, differences, sweep_dimensions
from tsdyn.schema import CONSTANTS, COORDINATES, VARIABLES, Layout

EXPERIMENT = "experiment.toml"
ARCHIVE = "archive.nc"
SEGMENTS = "segments"
LOCK = "LOCK"
SWEEP = "sweep.json"

#: On disk, a chunk holds one seed, one layer and as many epochs as fit in this.
CHUNK_BYTES = 1 << 22
#: In memory, a dask chunk gathers whole disk chunks of several seeds up to this.
LAZY_BYTES = 1 << 24
_TILE = 16
_SEGMENT = re.compile(r"epoch-(\d{6,})-(\d{6,})\.nc")
_MARGIN = 1 << 20

#: Variable → one array (seed, epoch), or one a layer from the lowest up, (seed, epoch, node...); constants: no epoch.
Records = Mapping[str, "np.ndarray | list[np.ndarray]"]
State = Mapping[str, np.ndarray]


class ArchiveError(RuntimeError):
    """A directory that cannot be read or written as asked; the message says which, why and the way out."""


class DirectoryError(ArchiveError):
    """A path that does not fit the request: another experiment's, not a run's, or not there at all."""


def local_path(path: str | Path) -> Path:
    """`path` as a Path, refused if netCDF would take it for a network address.

    Raises:
        ArchiveError: if it holds ``://`` or ``#``, or a control character.
    """
    text = os.fspath(path)
    if "://" in text or "#" in text or not text.isprintable():
        raise DirectoryError(
            f"{text!r}: not a local path; a name with '://', '#' or control characters would not be opened as a file"
        )
    return Path(text)


# --- one netCDF file -----------------------------------------------------------------------------------------


def _tile(sizes: Sequence[int]) -> int:
    """Chunk length along a padded node dimension: tiles of pure padding are never written, and are worth having.

    The longest that wastes at most an eighth of the true sizes in tiles that are partly padding.
    """
    widest = max(sizes)
    for pieces in range(1, widest // _TILE + 1):
        tile = -(-widest // pieces)
        if sum(-(-size // tile) * tile for size in sizes) <= 1.125 * sum(sizes):
            return tile
    return min(_TILE, widest)


def _sizes(layout: Layout, epochs: int) -> dict[str, int]:
    sizes = {"seed": len(layout.seeds), "epoch": epochs, "layer": layout.depth}
    return sizes | {dim: layout.padded(dim) for dim in (*schema.NODE_WIDTHS, "input_node", *schema.SIZED)}


def _chunks(variable: schema.Variable, layout: Layout, sizes: Mapping[str, int], itemsize: int) -> list[int]:
    chunk = dict.fromkeys(("seed", "layer"), 1)
    for dim in variable.dims:
        if dim not in ("seed", "epoch", "layer"):
            chunk[dim] = _tile(layout.node_widths(variable, dim))
    if not variable.layered:
        chunk["seed"] = sizes["seed"]
    inner = int(np.prod([chunk[d] for d in variable.dims if d != "epoch"]))
    chunk["epoch"] = min(max(1, CHUNK_BYTES // (inner * itemsize)), max(1, sizes["epoch"]))
    return [chunk[d] for d in variable.dims]


def _create(
    nc: netCDF4.Dataset,
    layout: Layout,
    epochs: Sequence[int],
    variables: Sequence[str],
    dtype: str,
    attrs: Mapping[str, Any],
) -> None:
    """Dimensions, coordinates and empty variables; what is never written reads as NaN."""
    sizes = _sizes(layout, len(epochs))
    used = {d for name in variables for d in VARIABLES[name].dims} | {"seed", "epoch", "layer"}
    for dim in (d for d in sizes if d in used):
        nc.createDimension(dim, sizes[dim])
        labels: Sequence[float] = range(sizes[dim])
        labels = {
            "seed": layout.seeds,
            "epoch": epochs,
            "layer": range(1, layout.depth + 1),
            "quantile": layout.quantiles,
        }.get(dim, labels)
        kind = "f8" if dim == "quantile" else "i8"
        index = nc.createVariable(dim, kind, (dim,), fletcher32=len(labels) > 0)
        index.long_name = schema.DIMENSIONS[dim]
        index[:] = np.asarray(labels, dtype=kind)
    columns = {
        "width": layout.widths,
        "teacher_width": layout.teacher_widths,
        "input_width": layout.input_widths,
        "teacher_input_width": layout.teacher_input_widths,
    }
    for name, values in columns.items():
        column = nc.createVariable(name, "i8", ("layer",), fletcher32=True)
        column.setncatts(COORDINATES[name].attrs)
        column[:] = np.asarray(values, dtype=np.int64)
    death = nc.createVariable("death_epoch", "i8", ("seed",), fletcher32=True)
    death.setncatts(COORDINATES["death_epoch"].attrs)
    death[:] = -1
    for name in variables:
        variable = VARIABLES[name]
        array = nc.createVariable(
            name,
            dtype,
            variable.dims,
            fill_value=np.nan,
            fletcher32=len(epochs) > 0 or "epoch" not in variable.dims,
            chunksizes=_chunks(variable, layout, sizes, np.dtype(dtype).itemsize),
        )
        array.setncatts(variable.attrs)
    nc.setncatts({**attrs, "coordinates": " ".join([*columns, "death_epoch"])})


def _index(variable: schema.Variable, layout: Layout, epochs: slice, layer: int | None) -> tuple[slice | int, ...]:
    """Where one layer of a variable sits in a file, without its padding."""
    at: dict[str, slice | int] = {"seed": slice(None), "epoch": epochs}
    if layer is not None:
        at |= {"layer": layer - 1}
    inner = [dim for dim in variable.dims if dim not in ("seed", "epoch", "layer")]
    at |= {dim: slice(0, n) for dim, n in zip(inner, layout.block(variable, layer), strict=True)}
    return tuple(at[dim] for dim in variable.dims)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _replacing(path: Path, needed: int) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` once written and synced; nothing is left otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    free = shutil.disk_usage(path.parent).free
    if free < needed + _MARGIN:
        raise ArchiveError(_no_space(path, needed + _MARGIN, free))
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        # netCDF reports a full disk as "HDF error"
        free = shutil.disk_usage(path.parent).free
        if error.errno == errno.ENOSPC or free < needed + _MARGIN:
            raise ArchiveError(_no_space(path, needed + _MARGIN, free)) from error
        raise ArchiveError(f"{path}: cannot be written: {error}; what was committed before is intact") from error
    except RuntimeError as error:
        raise ArchiveError(f"{path}: cannot be written: {error}; what was committed before is intact") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _no_space(path: Path, needed: int, free: int) -> str:
    return (
        f"{path}: no space left: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; what was committed is intact, "
        "free some space and run the same command again to go on"
    )


def write_text(path: Path, text: str) -> None:
    """A small text file, whole or not at all."""
    with _replacing(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- one run -------------------------------------------------------------------------------------------------


class Run:
    """The directory of one run, held for writing.

    Use as a context manager: entering takes the lock, leaving gives it back.

    Args:
        path: The directory; made if it does not exist.
        experiment: What the run computes; without a sweep.

    Raises:
        ArchiveError: if another process holds the directory, it holds another experiment (every difference is
            named), or it holds files that are not a run's.  Nothing is overwritten.
    """

    def __init__(self, path: str | Path, experiment: Experiment) -> None:
        if experiment.sweep:
            raise ValueError("Run: the experiment has a sweep; each point of it is a run (tsdyn.run does this)")
        self.path = local_path(path)
        self.experiment = experiment
        self.layout = experiment.layout
        self.variables = (*schema.expand(experiment.record.observables), *CONSTANTS)
        self._lock: int | None = None

    def __enter__(self) -> Run:
        claim(self.path, self.experiment)
        self._lock = lock(self.path)
        (self.path / SEGMENTS).mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether the archive of all epochs is there."""
        return (self.path / ARCHIVE).exists()

    @property
    def bytes_per_epoch(self) -> int:
        """Size of one recorded epoch, without padding."""
        return bytes_per_epoch(self.layout, self.variables, self.experiment.dtype)

    def committed(self) -> int | None:
        """Last committed epoch of training, None before the first commit."""
        found = segments(self.path)
        return found[-1][1] if found else None

    def commit(
        self,
        first: int,
        last: int,
        epochs: Sequence[int],
        records: Records,
        state: State,
        attrs: Mapping[str, Any],
    ) -> None:
        """Write the recorded `epochs` among trained epochs `first`..`last` and the state after `last`, in one rename.

        Args:
            first: First epoch of the segment.
            last: Last epoch of the segment.
            epochs: Recorded epochs among them, increasing.
            records: Their measurements, and in the first segment the constants.
            state: Everything needed to go on; arrays by name, among them ``death_epoch``.
            attrs: Global attributes.
        """
        target = self.path / SEGMENTS / f"epoch-{first:06d}-{last:06d}.nc"
        needed = self.bytes_per_epoch * len(epochs) + sum(a.nbytes for a in state.values())
        with _replacing(target, needed) as temporary, netCDF4.Dataset(temporary, "w", format="NETCDF4") as nc:
            _create(nc, self.layout, epochs, tuple(records), self.experiment.dtype, attrs)
            nc["death_epoch"][:] = state["death_epoch"]
            for name, value in records.items():
                blocks = enumerate(value, start=1) if isinstance(value, list) else ((None, value),)
                for layer, block in blocks:
                    nc[name][_index(VARIABLES[name], self.layout, slice(0, len(epochs)), layer)] = block
            group = nc.createGroup("state")
            for name, array in state.items():
                dims = tuple(f"{name}_{i}" for i in range(array.ndim))
                for dim, size in zip(dims, array.shape, strict=True):
                    group.createDimension(dim, size)
                group.createVariable(name, array.dtype, dims, fletcher32=array.ndim > 0, fill_value=False)[...] = array

    def state(self) -> dict[str, np.ndarray]:
        """State after the last committed epoch."""
        first, last = segments(self.path)[-1]
        with netCDF4.Dataset(self.path / SEGMENTS / f"epoch-{first:06d}-{last:06d}.nc") as nc:
            nc.set_auto_mask(False)
            return {name: np.asarray(array[...]) for name, array in nc["state"].variables.items()}

    def consolidate(self, attrs: Mapping[str, Any]) -> None:
        """All epochs in one file, read back and compared with the segments before these go. Repeatable."""
        target = self.path / ARCHIVE
        files = [self.path / SEGMENTS / f"epoch-{a:06d}-{b:06d}.nc" for a, b in segments(self.path)]
        epochs = self.experiment.schedule
        if not target.exists():
            with _replacing(target, self.bytes_per_epoch * len(epochs)) as temporary:
                with netCDF4.Dataset(temporary, "w", format="NETCDF4") as nc:
                    _create(nc, self.layout, epochs, self.variables, self.experiment.dtype, attrs)
                    self._copy(files, nc)
                with netCDF4.Dataset(temporary) as nc:
                    self._compare(files, nc)
        shutil.rmtree(self.path / SEGMENTS, ignore_errors=True)

    def _copy(self, files: Sequence[Path], nc: netCDF4.Dataset) -> None:
        for name, index, block in self._windows(files, nc):
            if not np.isnan(block).all():  # what is never written reads as NaN and takes no space
                nc[name][index] = block
        with netCDF4.Dataset(files[-1]) as last:
            nc["death_epoch"][:] = last["death_epoch"][:]

    def _compare(self, files: Sequence[Path], nc: netCDF4.Dataset) -> None:
        nc.set_auto_mask(False)
        for name, index, block in self._windows(files, nc):
            if not np.array_equal(nc[name][index], block, equal_nan=True):
                raise ArchiveError(
                    f"{self.path}: {name} read back differently from what was written; segments are kept"
                )

    def _windows(
        self, files: Sequence[Path], nc: netCDF4.Dataset
    ) -> Iterator[tuple[str, tuple[slice | int, ...], np.ndarray]]:
        """(variable, index into `nc`, block) over every variable, layer and chunk of epochs, from the segments."""
        position = {epoch: i for i, epoch in enumerate(self.experiment.schedule)}
        held: list[list[int]] = []
        for file in files:
            with netCDF4.Dataset(file) as segment:
                held.append([position[int(epoch)] for epoch in segment["epoch"][:]])
        for name in self.variables:
            variable = VARIABLES[name]
            layers = range(1, self.layout.depth + 1) if variable.layered else (None,)
            constant = "epoch" not in variable.dims
            length = len(position) if constant else nc[name].chunking()[variable.dims.index("epoch")]
            for start in range(0, len(position), length):
                window = range(start, min(start + length, len(position)))
                for layer in layers:
                    parts = []
                    for file, positions in zip(files[:1] if constant else files, held, strict=False):
                        inside = [i for i, p in enumerate(positions) if p in window]
                        if inside or constant:
                            epochs = slice(inside[0], inside[-1] + 1) if inside else slice(None)
                            with netCDF4.Dataset(file) as segment:
                                segment.set_auto_mask(False)
                                parts.append(np.asarray(segment[name][_index(variable, self.layout, epochs, layer)]))
                    block = parts[0] if constant else np.concatenate(parts, axis=1)
                    yield name, _index(variable, self.layout, slice(window.start, window.stop), layer), block


def bytes_per_epoch(layout: Layout, variables: Sequence[str], dtype: str) -> int:
    """Size of one recorded epoch of all members, without padding."""
    numbers = 0
    for variable in (VARIABLES[name] for name in variables if "epoch" in VARIABLES[name].dims):
        layers = range(1, layout.depth + 1) if variable.layered else (None,)
        numbers += sum(math.prod(layout.block(variable, layer)) for layer in layers)
    return numbers * len(layout.seeds) * np.dtype(dtype).itemsize


def segments(path: Path) -> list[tuple[int, int]]:
    """First and last epoch of each committed segment, in order.

    Raises:
        ArchiveError: if epochs are missing between two of them.
    """
    names = [_SEGMENT.fullmatch(entry.name) for entry in (path / SEGMENTS).glob("*.nc")]
    found = sorted((int(m[1]), int(m[2])) for m in names if m)
    for (_, end), (start, _) in itertools.pairwise(found):
        if start != end + 1:
            raise ArchiveError(f"{path}: segments end at epoch {end} and go on at {start}; epochs between are missing")
    return found


def claim(path: Path, experiment: Experiment) -> None:
    """Make `path` the directory of `experiment`, or check that it is.

    Raises:
        ArchiveError: if it holds another experiment, naming what differs, or files that are not a run's.
    """
    file = path / EXPERIMENT
    if file.exists():
        theirs = Experiment.from_toml(file)
        found = differences(experiment, theirs)
        if found:
            raise DirectoryError(
                f"{path}: holds another experiment; nothing was overwritten. What differs:\n  "
                + "\n  ".join(found)
                + "\nGive another directory with -o, or remove this one."
            )
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        what = "is not empty and holds no experiment" if path.is_dir() else "is a file"
        raise DirectoryError(f"{path}: {what}; nothing was overwritten. Give another directory with -o.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(file, experiment.to_toml())
    except OSError as error:
        raise DirectoryError(f"{path}: cannot be made: {error}; give another directory with -o") from error


def lock(path: Path) -> int:
    """An exclusive lock on the directory; the kernel frees it when the process ends, however it ends.

    Raises:
        ArchiveError: if another process holds it.
    """
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace")
        os.close(handle)
        raise ArchiveError(f"{path}: another process is writing here ({holder.strip() or 'unknown'})") from error
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.uname().nodename} pid {os.getpid()}".encode())
    return handle


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
    points = {point_name(values): (values, point) for values, point in experiment.points()}
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
    if (path / ARCHIVE).is_file():
        return _open_file(path / ARCHIVE)
    if not path.exists():
        raise DirectoryError(f"{path}: does not exist; runs are made by `tsdyn run EXPERIMENT.toml -o {path}`")
    files = [path / SEGMENTS / f"epoch-{a:06d}-{b:06d}.nc" for a, b in segments(path)]
    if not files:
        raise DirectoryError(f"{path}: holds no archive and no committed epoch; finish it with `tsdyn run`")
    parts = [_open_file(file) for file in files]
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
    try:
        ds = xr.open_dataset(path, engine="netcdf4", decode_times=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise DirectoryError(f"{path}: not a readable netCDF file: {error}") from error
    return ds.assign({name: _lazily(array) for name, array in ds.data_vars.items()})


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


def _open_sweep(path: Path) -> xr.Dataset:
    index = json.loads((path / SWEEP).read_text(encoding="utf-8"))
    experiment = Experiment.from_toml(path / EXPERIMENT)
    dims: dict[str, str] = index["dimensions"]
    opened: dict[tuple[Any, ...], xr.Dataset] = {}
    for point in index["points"]:
        directory = path / point["directory"]
        if (directory / ARCHIVE).is_file() or segments(directory):
            opened[tuple(label(point["values"][key]) for key in dims)] = open(directory)
    if not opened:
        raise DirectoryError(f"{path}: no point of this sweep has a committed epoch yet; go on with `tsdyn run`")
    dims_that_differ = (*schema.NODE_WIDTHS, "input_node", "mode")
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


def check(path: str | Path) -> list[str]:
    """What is wrong with a run, a sweep or a file, one sentence each; empty if it is whole.

    Schema, attributes, agreement with ``experiment.toml``, and every stored number read once (its checksum with it).
    """
    path = local_path(path)
    ds = open(path)
    found = schema.problems(ds, swept=swept_dimensions(ds))
    if (path / EXPERIMENT).is_file():
        experiment = Experiment.from_toml(path / EXPERIMENT)
        if ds.attrs.get("digest") != experiment.digest:
            found.append(f"{path}: the archive's digest is not that of {EXPERIMENT}")
        if not experiment.sweep and (path / ARCHIVE).is_file():
            epochs = [int(e) for e in ds["epoch"]]
            if epochs != list(experiment.schedule):
                found.append(f"{path}: epochs in the archive are not the {len(experiment.schedule)} of the schedule")
    for name, array in ds.data_vars.items():
        try:
            array.sum().compute(scheduler="synchronous")
        except (OSError, RuntimeError) as error:
            found.append(f"{path}: {name} cannot be read: {error}")
    return [f"{path}: {problem}" if not problem.startswith(str(path)) else problem for problem in found]


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
