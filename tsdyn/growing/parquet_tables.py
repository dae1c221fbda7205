"""An archive as long tables: one per set of dimensions, a row per number that is no padding.  Imports no torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from tsdyn import vocabulary

#: So many numbers of each variable are read and written at once.
ROWS = 1 << 20


def tables(ds: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """Name of a table → its variables: all that have one set of dimensions, coordinates among them."""
    found: dict[str, list[str]] = {}
    for name, array in ds.variables.items():
        if name not in ds.dims:
            found.setdefault("-".join(map(str, array.dims)) or "scalars", []).append(str(name))
    return {name: tuple(names) for name, names in found.items()}


def blocks(ds: xr.Dataset, names: Sequence[str]) -> Iterator[dict[str, slice]]:
    """Slices that cover the dimensions of variables that have the same ones: what is written at once."""
    arrays = {name: ds[name] for name in names}
    lengths = {str(dim): ds.sizes[dim] for dim in next(iter(arrays.values())).dims}
    return _blocks(arrays, lengths)


def write(ds: xr.Dataset, names: Sequence[str], block: Mapping[str, slice], file: Path) -> None:
    """Write the rows of a block of the table of variables that have the same dimensions.

    Its columns are the labels of the dimensions, coordinates along single dimensions of it (swept keys along
    ``point``, names of layers), and the variables.  Attributes are in the metadata of each column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: ds[name] for name in names}
    dims = tuple(str(dim) for dim in next(iter(arrays.values())).dims)
    along = [
        str(name) for name, c in ds.coords.items() if c.ndim == 1 and c.dims[0] in dims and name not in (*dims, *names)
    ]
    kept = [name for name in along if name not in vocabulary.COORDINATES or name == "layer_name"]
    labels = {dim: ds[dim].values if dim in ds.coords else np.arange(ds.sizes[dim]) for dim in dims}
    values = {name: array.isel(block).transpose(*dims).values for name, array in arrays.items()}
    mask = _unpadded(ds, dims, block)
    at = {dim: np.arange(ds.sizes[dim])[block[dim]] for dim in dims}
    columns = {dim: _spread(labels[dim][at[dim]], dims.index(dim), mask) for dim in dims}
    for name in kept:
        dim = str(ds[name].dims[0])
        columns[name] = _spread(ds[name].values[at[dim]], dims.index(dim), mask)
    columns |= {name: array[mask] for name, array in values.items()}
    fields = {name: pa.array(_listable(column)) for name, column in columns.items()}
    schema = pa.schema([pa.field(name, column.type, metadata=_metadata(ds, name)) for name, column in fields.items()])
    pq.write_table(pa.table(list(fields.values()), schema=schema), file)


def join(parts: Sequence[Path], file: Path) -> None:
    """Write the rows of all parts into one file, part by part."""
    import pyarrow.parquet as pq

    # a part without rows does not tell the columns' types
    held = [part for part in parts if pq.read_metadata(part).num_rows] or parts[:1]
    with pq.ParquetWriter(file, pq.read_schema(held[0])) as writer:
        for part in held:
            writer.write_table(pq.read_table(part).cast(writer.schema))


def _listable(column: NDArray) -> Any:
    return column.tolist() if column.dtype.kind in "OUS" else column


def _metadata(ds: xr.Dataset, name: str) -> dict[str, str]:
    attrs = ds[name].attrs if name in ds.variables else {}
    return {str(k): v if isinstance(v, str) else json.dumps(np.asarray(v).tolist()) for k, v in attrs.items()}


def _spread(labels: NDArray, axis: int, mask: NDArray) -> NDArray:
    """Labels along one axis of `mask`, one for each place that it keeps."""
    shape = [-1 if i == axis else 1 for i in range(mask.ndim)]
    spread: NDArray = np.broadcast_to(labels.reshape(shape), mask.shape)[mask]
    return spread


def _blocks(arrays: Mapping[str, xr.DataArray], lengths: Mapping[str, int]) -> Iterator[dict[str, slice]]:
    """Slices that cover the dimensions: whole chunks, cut along the first dimensions until they are small enough."""
    chunked = next((array for array in arrays.values() if array.chunks), None)
    steps = {dim: chunked.chunksizes[dim][0] if chunked is not None else size for dim, size in lengths.items()}
    for dim in lengths:
        if math.prod(steps.values()) > ROWS:
            steps[dim] = 1
    ranges = [
        [slice(low, min(low + steps[dim], size)) for low in range(0, size, max(1, steps[dim]))] or [slice(0, 0)]
        for dim, size in lengths.items()
    ]
    for parts in itertools.product(*ranges):
        yield dict(zip(lengths, parts, strict=True))


def _unpadded(ds: xr.Dataset, dims: Sequence[str], block: Mapping[str, slice]) -> NDArray:
    """Whether each place of a block is a node that its layer has; True where widths are not known."""
    sizes = [len(range(*block[dim].indices(ds.sizes[dim]))) for dim in dims]
    mask = np.ones(sizes, bool)
    below = "teacher_input_width" if "teacher_node" in dims and "node" not in dims else "input_width"
    for axis, dim in enumerate(dims):
        width = {**vocabulary.NODE_WIDTHS, "input_node": below}.get(dim)
        if width is None or width not in ds.coords or not set(ds[width].dims) - {"layer"} <= set(dims):
            continue
        ends = ds[width]
        if "layer" in ends.dims and "layer" not in dims:
            ends = ends.isel(layer=0)  # of variables without layers the nodes are the lowest layer's
        ends = ends.isel({d: block[str(d)] for d in ends.dims}).transpose(*[d for d in dims if d in ends.dims])
        shape = [sizes[i] if d in ends.dims else 1 for i, d in enumerate(dims)]
        numbers = np.arange(ds.sizes[dim])[block[dim]].reshape([-1 if i == axis else 1 for i in range(len(dims))])
        mask &= numbers < ends.values.reshape(shape)
    return mask
