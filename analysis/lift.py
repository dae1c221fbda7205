"""From array formulas to labelled, lazy ones: the one module that knows dask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def lift(
    formula: Callable[..., NDArray],
    *arrays: xr.DataArray,
    reads: Sequence[str],
    gives: Sequence[str] = (),
    name: str | None = None,
    attrs: Mapping[str, str] | None = None,
) -> xr.DataArray:
    """Apply an array formula over labelled arrays; the result is lazy if an array is.

    Args:
        formula: Takes arrays whose last axes are `reads`, in that order, after any others; gives an array whose
            last axes are `gives`, each as long as it was read.
        arrays: What it takes; other dimensions broadcast.
        reads: Dimensions that the formula consumes.
        gives: Those of `reads` that remain.
        name: Of the result.
        attrs: Of the result.

    Raises:
        ValueError: if an array lacks a dimension that the formula reads.
    """
    for array in arrays:
        missing = [dim for dim in reads if dim not in array.dims]
        if missing:
            raise ValueError(
                f"{formula.__name__}: {array.name!r} has no dimension {', '.join(missing)}, only {tuple(array.dims)}; "
                "select with a list or slice to keep a dimension"
            )
    whole = [array.chunk(dict.fromkeys(reads, -1)) if array.chunks is not None else array for array in arrays]
    result: xr.DataArray = xr.apply_ufunc(
        formula,
        *whole,
        input_core_dims=[list(reads)] * len(arrays),
        output_core_dims=[list(gives)],
        dask="parallelized",
        output_dtypes=[np.float64],
        keep_attrs=False,
    )
    return result.rename(name).assign_attrs(attrs or {})
