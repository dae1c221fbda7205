"""From array formulas to labelled, lazy ones: the one module of the analysis that knows dask."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import dask.array
import numpy as np
import xarray as xr
from dask.base import is_dask_collection, tokenize
from dask.delayed import delayed
from numpy.typing import NDArray


def recorded(archive: xr.Dataset, name: str, caller: str) -> xr.DataArray:
    """The variable of an archive.

    Raises:
        TypeError: if `archive` is no Dataset.
        ValueError: if it lacks the variable, saying how it is recorded.
    """
    if not isinstance(archive, xr.Dataset):
        raise TypeError(
            f"{caller}: got {type(archive).__name__}; give the Dataset of an archive, as tsdyn.open gives it"
        )
    if name not in archive:
        raise ValueError(
            f"{caller}: the archive has no {name}, only {', '.join(map(str, archive.data_vars))}; "
            f'record it: [record] observables = ["{name}", ...]'
        )
    return archive[name]


def lift(
    formula: Callable[..., NDArray],
    *arrays: xr.DataArray,
    reads: Sequence[str] | Sequence[Sequence[str]],
    gives: Sequence[str] = (),
    labels: Mapping[str, Sequence[Any]] | None = None,
    name: str | None = None,
    attrs: Mapping[str, Any] | None = None,
    **knobs: Any,
) -> xr.DataArray:
    """Apply an array formula over labelled arrays; the result is lazy if an array is.

    Args:
        formula: Takes arrays whose last axes are `reads`, in that order, after any others; gives an array whose
            last axes are `gives`.
        arrays: What it takes; other dimensions broadcast.
        reads: Dimensions that the formula consumes: the same for every array, or a sequence of them for each array.
        gives: Dimensions of the result: those also read keep their length, new ones need `labels`.
        labels: Coordinate of each new dimension.
        name: Name of the result.
        attrs: Attributes of the result.
        knobs: Keyword arguments of the formula.

    Raises:
        ValueError: if an array lacks a dimension that the formula reads.
    """
    each: list[list[str]] = [[r for r in reads if isinstance(r, str)]] * len(arrays)
    if not all(isinstance(r, str) for r in reads):
        each = [list(r) for r in reads]
    for array, wanted in zip(arrays, each, strict=True):
        missing = [dim for dim in wanted if dim not in array.dims]
        if missing:
            raise ValueError(
                f"{name or formula.__name__}: {array.name!r} has no dimension {', '.join(missing)}, only "
                f"{tuple(array.dims)}; select with a list or slice to keep a dimension"
            )
    whole = [
        array.chunk(dict.fromkeys(wanted, -1)) if array.chunks is not None else array
        for array, wanted in zip(arrays, each, strict=True)
    ]
    new = dict(labels or {})
    sizes = {dim: len(values) for dim, values in new.items()}
    result: xr.DataArray = xr.apply_ufunc(
        lambda *parts: _blockwise(formula, parts, each, gives, sizes, knobs),
        *whole,
        input_core_dims=each,
        output_core_dims=[list(gives)],
        dask="allowed",
        keep_attrs=False,
    )
    return result.rename(name).assign_coords(new).assign_attrs(attrs or {})


def _blockwise(
    formula: Callable[..., NDArray],
    arrays: Sequence[Any],
    reads: Sequence[Sequence[str]],
    gives: Sequence[str],
    sizes: Mapping[str, int],
    knobs: Mapping[str, Any],
) -> Any:
    """Apply the formula to arrays whose last axes are those it reads, block by block if one is a dask array.

    Like `dask.array.apply_gufunc`, but without its extra copy of each block, which it makes to join the single block
    along those axes.
    """
    if not any(isinstance(array, dask.array.Array) for array in arrays):
        # for arrays without dimensions xarray passes a number; differentiable arrays stay what they are
        return formula(*(a if hasattr(a, "__array_namespace__") else np.asarray(a) for a in arrays), **knobs)
    count = max(array.ndim - len(own) for array, own in zip(arrays, reads, strict=True))
    outer = tuple(f"{i} outer" for i in range(count))  # names that no dimension of the schema has
    pairs: list[Any] = []
    for array, own in zip(arrays, reads, strict=True):
        pairs += [array, (*outer[count - (array.ndim - len(own)) :], *own)]

    return dask.array.blockwise(
        partial(_on_blocks, formula, dict(knobs)),
        (*outer, *gives),
        *pairs,
        new_axes=sizes,
        dtype=np.float64,
        meta=np.empty((0,) * (count + len(gives))),
        name=f"{formula.__name__}-{tokenize(formula, *arrays, reads, gives, knobs)}",
    )


def _on_blocks(formula: Callable[..., NDArray], knobs: Mapping[str, Any], *blocks: Any) -> NDArray:
    """Apply the formula to blocks; dask passes each nested in one list per axis that is read and not given."""
    arrays = []
    for block in blocks:
        while isinstance(block, list):
            (block,) = block
        arrays.append(np.asarray(block))
    return formula(*arrays, **knobs)


#: Blocks of members are cut into single seeds where there are fewer of them than this.
FEW_BLOCKS = 32


def blockwise(
    job: Callable[..., NDArray], index: NDArray, arrays: Sequence[xr.DataArray], lead: Sequence[str], count: int
) -> Any:
    """What `job` gives for blocks of members, (*lead, count); lazy if an array is.

    For measures that need whole members and are not array formulas.

    Args:
        job: Function of a block of `index` and of the blocks of each array; gives (*lead of the block, count).
        index: (*lead), of integers.
        arrays: Arrays with dimensions among `lead`, then others.
        lead: Dimensions, with ``seed`` among them.
        count: How many values there are for each entry of `index`.
    """
    if all(array.chunks is None for array in arrays):
        return job(index, *(array.values for array in arrays)) if arrays else np.full((*index.shape, count), np.nan)
    whole = [a.chunk({dim: -1 for dim in a.dims if dim not in lead}) for a in arrays]
    tiles = max(math.prod(len(a.chunksizes[dim]) for dim in lead if dim in a.dims) for a in whole)
    whole = [a.chunk({"seed": 1}) for a in whole] if tiles < FEW_BLOCKS else whole
    first = whole[0]
    numbered = dask.array.from_array(index, chunks=tuple(first.chunksizes[dim] for dim in lead))
    pairs: list[Any] = [numbered, tuple(lead)]
    for position, array in enumerate(whole):
        own = tuple(str(dim) for dim in array.dims if dim in lead)
        pairs += [array.data, (*own, *(f"{position} {dim}" for dim in array.dims if dim not in lead))]
    return dask.array.blockwise(
        partial(_on_blocks, job, {}),
        (*lead, "value"),
        *pairs,
        new_axes={"value": count},
        dtype=np.float64,
        meta=np.empty((0,) * (len(lead) + 1)),
        name=f"members-{tokenize(job, index, *arrays)}",
    )


def cellwise(measure: Callable[[xr.Dataset], Sequence[float]], cells: NDArray, count: int) -> Any:
    """Apply `measure` to every Dataset of an object array: (count, *cells.shape), NaN where there is none.

    For measures that need a whole member at once and are not array formulas.  Lazy, with one task per cell, if the
    Datasets are.
    """
    flat = list(cells.ravel())
    nothing = np.full(count, np.nan)

    def values(cell: xr.Dataset) -> NDArray:
        return np.asarray(measure(cell), float)

    # not by Dataset.chunks, which refuses variables that are cut apart at different places
    if any(cell is not None and is_dask_collection(cell) for cell in flat):
        task = delayed(values)
        columns = [
            dask.array.from_array(nothing) if c is None else dask.array.from_delayed(task(c), (count,), float)
            for c in flat
        ]
        return dask.array.stack(columns, axis=-1).reshape(count, *cells.shape)
    return np.stack([nothing if c is None else values(c) for c in flat], axis=-1).reshape(count, *cells.shape)
