"""The segments of a run copied into one file, in bounded memory whatever their number.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import netCDF4
import numpy as np

from tsdyn import vocabulary
from tsdyn.archive import hdf5, netcdf
from tsdyn.archive.whole_files import ArchiveError
from tsdyn.archive.wrong_numbers import WRONG_THROUGH, wrong_variables
from tsdyn.schema import Layout
from tsdyn.schema import variable as variable_of
from tsdyn.vocabulary import Label

#: A block that is copied at once holds about this much.  Above 32 MB the allocator maps every block anew, and its
#: pages cost as much as what is read into them.
BLOCK_BYTES = 1 << 24
#: Opening a segment takes 5 ms, so it is opened once for several blocks; these blocks hold this much together.
GATHERED_BYTES = 1 << 26
#: HDF5's cache for each variable of an open file; more is of no use, since every chunk is read and written once.
_CACHE_BYTES = 1 << 20


class Part(NamedTuple):
    """A segment, the positions in the archive of the epochs that it holds, its attributes, and the names of its states
    along the way.
    """

    path: Path
    first: int
    end: int
    attrs: dict[str, Any]
    along: tuple[str, ...] = ()


class Block(NamedTuple):
    """A part of one variable that is whole chunks on disk; of one layer only if the variable has layers."""

    name: str
    window: slice
    layer: int | None
    members: slice


def recorded(
    paths: Sequence[Path], schedule: Sequence[Label], dimension: vocabulary.Path = "epoch"
) -> tuple[list[Part], list[Label]]:
    """The part of the archive that each segment holds, and all recorded labels.

    The labels are those of `schedule`, and the last epochs of shorter runs that this one extends.

    Raises:
        ArchiveError: if epochs of the schedule are missing, or they are out of order.
    """
    parts: list[Part] = []
    epochs: list[Label] = []
    for path in paths:
        with netcdf.dataset(path, only=dimension) as nc:
            own = nc[dimension][:].tolist()
            along = tuple(group for group in netcdf.state_groups(nc) if group != netcdf.STATE)
            parts.append(Part(path, len(epochs), len(epochs) + len(own), netcdf.attributes(nc), along))
        epochs += own
    missing = sorted(set(schedule) - set(epochs))
    if missing or epochs != sorted(set(epochs)):
        raise ArchiveError(
            f"{paths[0].parent.parent if paths else 'no segments'}: segments hold {len(set(epochs))} of the "
            f"{len(schedule)} {dimension}s to record, missing or out of order from {dimension} "
            f"{missing[0] if missing else epochs}"
            "; segments are kept"
        )
    return parts, epochs


@contextmanager
def little_cached() -> Iterator[None]:
    """Hold the netCDF lock (`hdf5.guarded`) with small chunk caches for files opened inside."""
    with hdf5.guarded():
        before = netCDF4.get_chunk_cache()
        netCDF4.set_chunk_cache(_CACHE_BYTES)
        try:
            yield
        finally:
            netCDF4.set_chunk_cache(*before)


def copy(parts: Sequence[Part], layout: Layout, variables: Sequence[str], nc: netCDF4.Dataset) -> None:
    """Write every number of the segments into `nc`, and the training state after the last segment."""
    for index, name, block in gathered(parts, layout, variables, nc):
        if not np.isnan(block).all():  # what is never written reads as NaN and takes no space
            nc[name][index] = block
    with netcdf.dataset(parts[-1].path) as last:
        nc["death_epoch"][:] = last["death_epoch"][:]
        netcdf.write_state(nc, netcdf.read_state(last))
    for group, state in _along(parts).items():
        netcdf.write_state(nc, state, group)


def differing(parts: Sequence[Part], layout: Layout, variables: Sequence[str], nc: netCDF4.Dataset) -> str | None:
    """The first variable whose numbers in `nc` differ from those of the segments; None if all agree."""
    for index, name, block in gathered(parts, layout, variables, nc):
        if not same_numbers(np.asarray(nc[name][index]), block):
            return name
    with netcdf.dataset(parts[-1].path) as last:
        if not np.array_equal(nc["death_epoch"][:], last["death_epoch"][:]):
            return "death_epoch"
        states = {netcdf.STATE: netcdf.read_state(last)}
    return _differing_states(nc, states | _along(parts))


def _along(parts: Sequence[Part]) -> dict[str, netcdf.State]:
    """The states along the way that segments keep, by the name of their group, in order."""
    found: dict[str, netcdf.State] = {}
    for part in parts:
        if part.along:
            with netcdf.dataset(part.path) as nc:
                found |= {group: netcdf.read_state(nc, group) for group in part.along}
    return found


def differing_records(
    file: Path,
    layout: Layout,
    epochs: Sequence[Label],
    dtype: str,
    records: netcdf.Records,
    states: Mapping[str, netcdf.State],
) -> str | None:
    """The first variable or array of the state that differs in a segment's file from what was to be written, or None.

    Of a large variable some members are read at a time, so that this takes little memory.
    """
    with hdf5.guarded(), hdf5.visited(file) as handle:
        if handle is None:
            raise ArchiveError(f"{file}: cannot be read back")

        def differs(name: str, spans: Sequence[slice], written: np.ndarray) -> bool:
            found = hdf5.numbers_of(handle, name, spans, written.dtype)
            return found is None or not same_numbers(found.reshape(written.shape), written)

        labels = np.asarray(epochs, "f8" if layout.path in vocabulary.REAL_LABELS else "i8")
        if differs(layout.path, [slice(0, len(labels))], labels):
            return layout.path
        death = np.asarray(states[netcdf.STATE]["death_epoch"], np.int64)
        if differs("death_epoch", [slice(0, len(death))], death):
            return "death_epoch"
        for name, value in records.items():
            # a chunk holds one member of what has layers, many of others, which would be read again for each few
            most = netcdf.CHUNK_BYTES if variable_of(name).layered else BLOCK_BYTES
            for layer, block in enumerate(value, start=1) if isinstance(value, list) else ((None, value),):
                step = max(1, most * len(block) // max(1, block.nbytes))
                for low in range(0, len(block), step):
                    members = slice(low, min(low + step, len(block)))
                    index = netcdf.index(variable_of(name), layout, slice(0, len(epochs)), layer, members)
                    spans = [part if isinstance(part, slice) else slice(part, part + 1) for part in index]
                    if differs(name, spans, np.asarray(block[members], dtype)):
                        return name
        for group, state in states.items():
            if hdf5.held_in(handle, group) != sum(1 + np.ndim(array) for array in state.values()):
                return group
            for name, array in state.items():
                if differs(f"{group}/{name}", [slice(0, size) for size in np.shape(array)], np.asarray(array)):
                    return f"{group}/{name}"
        return None


def _differing_states(nc: netCDF4.Dataset, states: Mapping[str, netcdf.State]) -> str | None:
    """The first array of the training states that differs in a file, with its group."""
    if set(netcdf.state_groups(nc)) != set(states):
        return netcdf.STATE
    for group, state in states.items():
        stored = netcdf.read_state(nc, group)
        if set(stored) != set(state):
            return group
        for name, array in state.items():
            if not same_numbers(stored[name], np.asarray(array)):
                return f"{group}/{name}"
    return None


def same_numbers(found: np.ndarray, block: np.ndarray) -> bool:
    """Whether all numbers are equal, NaN to NaN; bits are compared first, which is six times as quick."""
    bits = f"u{block.dtype.itemsize}"
    plain = found.dtype == block.dtype and found.flags.c_contiguous and block.flags.c_contiguous and found.ndim > 0
    alike = plain and found.shape == block.shape and np.array_equal(found.view(bits), block.view(bits))
    return alike or np.array_equal(found, block, equal_nan=block.dtype.kind == "f")


def gathered(
    parts: Sequence[Part], layout: Layout, variables: Sequence[str], nc: netCDF4.Dataset
) -> Iterator[tuple[tuple[slice | int, ...], str, np.ndarray]]:
    """(index into `nc`, variable, numbers from the segments), block by block, until all of `nc` is covered."""
    blocks = [block for name in variables for block in _blocks(name, parts[-1].end, layout, nc)]
    # blocks of the same epochs are filled together, so that few segments are opened for them
    blocks.sort(key=lambda block: (block.window.stop - block.window.start, block.window.start))
    sizes = {name: nc[name].dtype for name in variables}
    held: list[tuple[Block, np.ndarray]] = []
    for block in blocks:
        index = netcdf.index(variable_of(block.name), layout, block.window, block.layer, block.members)
        shape = [i.stop - i.start for i in index if isinstance(i, slice)]
        held.append((block, np.empty(shape, sizes[block.name])))
        if sum(array.nbytes for _, array in held) >= GATHERED_BYTES or block is blocks[-1]:
            _fill(parts, layout, held)
            for one, array in held:
                yield netcdf.index(variable_of(one.name), layout, one.window, one.layer, one.members), one.name, array
            held = []


def _fill(parts: Sequence[Part], layout: Layout, held: Sequence[tuple[Block, np.ndarray]]) -> None:
    """Read each block from the segments that hold parts of it; every segment is opened once."""
    for part in parts:
        inside = []
        for block, array in held:
            variable = variable_of(block.name)
            if "epoch" not in variable.dims:
                low, high, window = 0, 1, slice(None)
                if part is not parts[-1 if variable.when == "end" else 0]:
                    continue
            else:
                low, high = max(block.window.start, part.first), min(block.window.stop, part.end)
                window = slice(low - part.first, high - part.first)
            if low < high:
                index = netcdf.index(variable, layout, window, block.layer, block.members)
                rows = slice(low - block.window.start, high - block.window.start)
                inside.append((block.name, index, array[:, rows] if "epoch" in variable.dims else array))
        if inside:
            with netcdf.dataset(part.path) as nc:
                for name, index, target in inside:  # NaN where a variable was not recorded yet
                    target[...] = nc[name][index] if name in nc.variables else np.nan


def _blocks(name: str, epochs: int, layout: Layout, nc: netCDF4.Dataset) -> Iterator[Block]:
    """The blocks of one variable, of about `BLOCK_BYTES`."""
    variable, seeds = variable_of(name), len(layout.seeds)
    chunk = {"epoch": epochs} | dict(zip(variable.dims, nc[name].chunking(), strict=True))
    layers = range(1, layout.depth + 1) if variable.layered else (None,)
    for start in range(0, epochs, max(1, chunk["epoch"])):
        window = slice(start, min(start + chunk["epoch"], epochs))
        for layer in layers:
            rows = window.stop - window.start if "epoch" in variable.dims else 1
            chunk_bytes = chunk["seed"] * rows * math.prod(layout.block(variable, layer)) * nc[name].dtype.itemsize
            members = chunk["seed"] * max(1, BLOCK_BYTES // max(1, chunk_bytes))
            for low in range(0, seeds, members):
                yield Block(name, window, layer, slice(low, min(low + members, seeds)))


def wrong_through(parts: Sequence[Part], epochs: Sequence[Label], variables: Sequence[str]) -> int | None:
    """The last epoch at which an earlier version recorded variables it computed wrongly; None if there is none."""
    last = None
    for part in parts:
        version, through = part.attrs.get("schema_version"), part.attrs.get(WRONG_THROUGH)
        version = int(version) if isinstance(version, (int, np.integer)) else version
        if set(wrong_variables(version, through, str(part.attrs.get("experiment")))) & set(variables):
            last = int(epochs[part.end - 1]) if through is None else int(through)
    return last
