"""Numbers into and out of variables of an open netCDF file, by the netCDF library's own calls.  Imports no torch.

Indexing a ``netCDF4.Variable`` takes a tenth of a millisecond of Python each time, which is most of the time that a
small file takes.  To be called inside `hdf5.guarded`, on files opened by this process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import netCDF4
import numpy as np
from numpy.typing import NDArray

from tsdyn.archive.hdf5 import linked


@cache
def _library() -> Any:
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, *[ctypes.c_void_p] * 3)
    return linked({"nc_put_vara": numbers, "nc_get_vara": numbers, "nc_strerror": (ctypes.c_char_p, ctypes.c_int)})


def put(variable: netCDF4.Variable, index: Sequence[slice | int], numbers: Any) -> None:
    """Write `numbers` at `index`, as ``variable[index] = numbers`` does, in the variable's own type.

    Args:
        variable: Of numbers, made by this process.
        index: Along each dimension a position, or a slice with a start and a stop.
        numbers: Of the shape of `index`.

    Raises:
        RuntimeError: if the library refuses them.
        ValueError: if they have another shape.
    """
    starts, counts = _window(index)
    stored = np.ascontiguousarray(numbers, dtype=variable.dtype.newbyteorder("="))
    shape = tuple(part.stop - part.start for part in index if isinstance(part, slice))
    if np.shape(numbers) != shape:
        raise ValueError(f"{variable.name}: numbers of shape {np.shape(numbers)} do not fit the place {shape}")
    if stored.size:
        _call("nc_put_vara", variable, starts, counts, stored)


def put_all(variable: netCDF4.Variable, numbers: Any) -> None:
    """Write all numbers of a variable."""
    put(variable, [slice(0, size) for size in variable.shape], numbers)


def taken(variable: netCDF4.Variable, index: Sequence[slice | int]) -> NDArray:
    """The numbers at `index` as they are stored, as ``variable[index]`` gives them; `index` as in `put`.

    Raises:
        RuntimeError: if the library cannot read them.
    """
    if not isinstance(variable.dtype, np.dtype) or variable.dtype.kind not in "fiu":  # text, in a stranger's file
        return np.asarray(variable[tuple(index)])
    starts, counts = _window(index)
    shape = tuple(part.stop - part.start for part in index if isinstance(part, slice))
    found = np.empty(shape, variable.dtype.newbyteorder("="))  # the library gives numbers of this machine
    if found.size:
        _call("nc_get_vara", variable, starts, counts, found)
    return found


def all_of(variable: netCDF4.Variable) -> NDArray:
    """All numbers of a variable as they are stored."""
    return taken(variable, [slice(0, size) for size in variable.shape])


def _window(index: Sequence[slice | int]) -> tuple[NDArray, NDArray]:
    """Start and count along each dimension."""
    pairs = [(part.start, part.stop - part.start) if isinstance(part, slice) else (part, 1) for part in index]
    starts, counts = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(starts, np.uintp), np.array(counts, np.uintp)


def _call(name: str, variable: netCDF4.Variable, starts: NDArray, counts: NDArray, numbers: NDArray) -> None:
    library = _library()
    if len(starts) != variable.ndim:
        raise ValueError(f"{variable.name}: an index of {len(starts)} dimensions for {variable.ndim}")
    code = getattr(library, name)(
        variable._grpid, variable._varid, starts.ctypes.data, counts.ctypes.data, numbers.ctypes.data
    )
    if code:
        raise RuntimeError(f"{variable.name}: {library.nc_strerror(code).decode()}")
