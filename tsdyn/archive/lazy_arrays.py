"""One variable over the files of many runs: an array that reads when it is indexed.  Imports no torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tsdyn import vocabulary
from tsdyn.archive import additions, netcdf, small_files
from tsdyn.archive.headers import Header, Source
from tsdyn.archive.run_directory import ARCHIVE, RUN, SEGMENTS, segments
from tsdyn.archive.whole_files import ArchiveError, Identity, identity

#: Positions along one dimension.
Rows = slice | NDArray
#: Position in the sweep's grid → the files that hold that point.
Cells = Mapping[tuple[int, ...], Sequence[Source]]

#: A dask chunk holds the whole disk chunks of as many seeds as fit in this (opening a file costs as much as 5 MB) ...
LAZY_BYTES = 1 << 27
#: ... and, where a run holds less, those of up to this many runs ...
RUNS_PER_CHUNK = 25
#: ... but no more bytes than this in all, so that reading one run of many stays quick.
GATHERED_BYTES = 1 << 20
#: Attempts to read from a directory that another process is changing.
_ATTEMPTS = 5


@dataclass(eq=False)
class Stored:
    """A variable over all points of a sweep, as an array that reads files when indexed; NaN where nothing is stored.

    Attributes:
        name: The variable.
        outer, inner: Its dimensions: those of the sweep, then those of the files.
        shape, dtype: As numpy's.
        cells: Position in the sweep's grid → files.
        labels: Dimension of the files → labels of the whole array.
        skip: Whether what cannot be read becomes NaN with a warning, instead of raising an error.
    """

    name: str
    outer: tuple[str, ...]
    inner: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    cells: Cells
    labels: Mapping[str, list[Any]]
    skip: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @cached_property
    def _position(self) -> dict[str, dict[Any, int]]:
        return {dim: {value: i for i, value in enumerate(self.labels[dim])} for dim in self.inner}

    def __getitem__(self, key: Any) -> NDArray:
        """The numbers at a numpy-like index of integers, slices and lists; only what is asked for is read."""
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
        # files can overlap, as one that a variable was added to and what was measured before: their sizes do not add up
        whole = [at for at, _, _, target in parts if [_length(rows) for rows in target] == shape[outer:]]
        complete = len(set(whole)) == math.prod(shape[:outer])
        if len(parts) == 1 and complete:  # as it comes, without a copy
            _, source, rows, _ = parts[0]
            found = self._rows(source, rows).reshape(shape).astype(self.dtype, copy=False)
        else:
            found = np.empty(shape, self.dtype) if complete else np.full(shape, np.nan, self.dtype)
            for at, source, rows, target in parts:
                found[at][_orthogonal(target, found.shape[outer:])] = self._rows(source, rows)
        return np.asarray(found[tuple(0 if isinstance(k, (int, np.integer)) else slice(None) for k in key)])

    def _part(self, source: Source, wanted: Sequence[NDArray]) -> tuple[list[Rows], list[Rows]] | None:
        """For each dimension, the rows of one file that are among the `wanted` positions, and where among them."""
        if self.name not in source.header.variables:
            return None
        rows, target = [], []
        for dim, positions in zip(self.inner, wanted, strict=True):
            there, hidden = source.header.labels[dim], source.hidden.get(dim, ())
            if there is self.labels[dim] and not hidden:
                asked = positions
            else:
                row = np.full(len(self.labels[dim]), -1)
                shown = [i for i, value in enumerate(there) if value not in hidden]
                row[[self._position[dim][there[i]] for i in shown]] = shown
                asked = row[positions]
            (inside,) = np.nonzero(asked >= 0)
            if not len(inside):
                return None
            rows.append(_as_slice(asked[inside]))
            target.append(_as_slice(inside))
        return rows, target

    def _rows(self, source: Source, rows: Sequence[Rows]) -> NDArray:
        """The numbers of one file at `rows`, which are chosen along each dimension independently."""
        try:
            return self._read(source, rows)
        except (OSError, RuntimeError, IndexError, KeyError, ValueError) as error:
            message = f"{source.path}: {self.name} cannot be read: {error}"
            if not self.skip:
                way_out = "" if isinstance(error, _Replaced) else "; `tsdyn validate` tells what is whole"
                raise ArchiveError(message + way_out) from error
            warnings.warn(f"{message}; left NaN", stacklevel=2)
            return np.full([_length(r) for r in rows], np.nan, self.dtype)

    def _read(self, source: Source, rows: Sequence[Rows]) -> NDArray:
        """Read from the file that was opened or, if the run went on, from the file that holds its epochs now."""
        for left in reversed(range(_ATTEMPTS)):  # its writer may be joining or extending it: then it is looked at again
            try:
                now, at = (source, rows) if source.unchanged else _found_again(source, self.name, rows)
                found = _stored(now, self.name, at)
                if now.unchanged:  # else another file took its name just before it was opened
                    return found
            except FileNotFoundError:
                continue
            except ArchiveError:
                if not left:
                    raise
        raise _Replaced("its directory changes while it is read; open it again")


class _Replaced(ArchiveError):
    """The file that was opened is no longer there."""


def _stored(source: Source, name: str, rows: Sequence[Rows]) -> NDArray:
    # given lists, netCDF reads row by row; the whole range and a choice from it cost one reading
    spans = [r if isinstance(r, slice) else slice(int(r.min()), int(r.max()) + 1) for r in rows]
    chosen = [slice(None) if isinstance(r, slice) else r - span.start for r, span in zip(rows, spans, strict=True)]
    declared = source.header.variables[name]
    stored = None
    if source.identity.seal is None:  # an index may have listed it without looking at it
        netcdf.refuse_unproven(source.path)
    if spans and not declared.encoding:
        stored = small_files.read(source.path, source.identity, source.header.numbers, name, spans)
    if stored is None:
        with netcdf.dataset(source.path, only=name, upto=None) as nc:
            stored = np.asarray(nc[name][tuple(spans)])
    if declared.encoding:
        stored = netcdf.decoded(name, xr.Variable(declared.dims, stored, declared.encoding)).values
    kept: NDArray = stored[_orthogonal(chosen, stored.shape)]
    return kept


def _found_again(source: Source, name: str, rows: Sequence[Rows]) -> tuple[Source, list[Rows]]:
    """The file that now holds what `source` held of a variable, and the rows there.

    That is a file with the same checksum, or one of the same run: joining its segments and training on keep what a run
    has committed.
    """
    for path in _files_now(source.path):
        now = _source(path, identity(path))
        same = source.identity.seal is not None and now.identity.seal == source.identity.seal
        if same:
            netcdf.refuse_unproven(path)
        if same or (source.own.get(RUN) is not None and now.own.get(RUN) == source.own[RUN]):
            with suppress(KeyError):
                dims = now.header.variables[name].dims
                return now, [
                    _by_label(source.header.labels[d], now.header.labels[d], r) for d, r in zip(dims, rows, strict=True)
                ]
    raise _Replaced(
        "it was opened before the file was replaced or removed, and what is there now is not known to hold the same "
        "epochs; open it again"
    )


@lru_cache(maxsize=64)
def _source(path: Path, _: Identity) -> Source:
    """The file at `path` with its header, cached until the file's identity changes."""
    return Source.of(path)


def _files_now(path: Path) -> list[Path]:
    """The files that may hold what the file at `path` held: those of its run's directory."""
    if additions.is_addition(path):
        return additions.files(path.parent.parent)
    if path.name != ARCHIVE and path.parent.name != SEGMENTS:
        return [path] if path.exists() else []
    folder = path.parent if path.name == ARCHIVE else path.parent.parent
    return [folder / ARCHIVE] if (folder / ARCHIVE).exists() else [segment.path for segment in segments(folder)]


def _by_label(before: Sequence[Any], now: Sequence[Any], rows: Rows) -> Rows:
    """Positions in `now` of the labels that `before` has at `rows`; KeyError if one is missing."""
    if before == now:
        return rows
    position = {label: i for i, label in enumerate(now)}
    wanted = before[rows] if isinstance(rows, slice) else [before[i] for i in rows]
    return _as_slice(np.array([position[label] for label in wanted]))


def _as_slice(rows: NDArray) -> Rows:
    """Positions as a slice where they follow one another."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if np.array_equal(rows, np.arange(first, last + 1)) else rows


def _length(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


def _orthogonal(rows: Sequence[Rows], shape: Sequence[int]) -> tuple[Any, ...]:
    """A numpy index that chooses along each dimension independently; plain slices, which copy nothing, if all are."""
    if all(isinstance(r, slice) for r in rows):
        return tuple(rows)
    return np.ix_(*(np.arange(n)[r] for r, n in zip(rows, shape, strict=True)))


def chunks(headers: Sequence[Header], array: Stored) -> tuple[int, ...]:
    """Dask chunks made of whole disk chunks: of as many seeds as fit, and of several runs only if these are small."""
    lengths = dict(zip(array.inner, array.shape[len(array.outer) :], strict=True))
    stored = [header.variables[array.name].chunk for header in headers]
    chunk = {dim: min(n, lengths[dim]) for dim, n in zip(array.inner, np.max(stored, axis=0).tolist(), strict=True)}
    chunk |= {dim: lengths[dim] for dim in (*vocabulary.NODE_WIDTHS, "input_node") if dim in chunk}
    whole = math.prod(chunk.values()) * array.dtype.itemsize
    size = max(1, round(whole * max(_filled(header, array) for header in headers)))
    if "seed" in chunk:
        seeds = min(lengths["seed"], chunk["seed"] * max(1, LAZY_BYTES // size))
        size, chunk["seed"] = size * seeds // chunk["seed"], seeds
    runs = [1] * len(array.outer)
    if runs:
        runs[-1] = min(array.shape[len(runs) - 1], RUNS_PER_CHUNK, max(1, GATHERED_BYTES // max(1, size)))
    return (*runs, *(max(1, n) for n in chunk.values()))


def _filled(header: Header, array: Stored) -> float:
    """Share of the padded node dimensions that a run's largest layer fills; the rest is never read."""
    own = "teacher_input_width" if array.name.startswith("teacher_") else "input_width"
    names = {**vocabulary.NODE_WIDTHS, "input_node": own}
    sizes = {
        dim: (np.asarray(header.columns[names[dim]][1]), array.shape[len(array.outer) + i])
        for i, dim in enumerate(array.inner)
        if names.get(dim) in header.columns
    }
    return float(np.max(np.prod([widths / padded for widths, padded in sizes.values()], axis=0))) if sizes else 1.0
