"""Read zarr stores that hold archives: those of ``tsdyn export`` and of ``Dataset.to_zarr``.  Imports no torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from tsdyn.archive.whole_files import DirectoryError

#: Files by which a directory is known to be a zarr store.
_MARKS = ("zarr.json", ".zgroup", ".zmetadata")
_METADATA = ("zarr.json", ".zmetadata", ".zarray", ".zgroup")


def is_one(path: Path) -> bool:
    """Whether a directory is a zarr store."""
    return any((path / name).is_file() for name in _MARKS)


def read(path: Path) -> xr.Dataset:
    """The store as a lazy Dataset.

    Raises:
        DirectoryError: if zarr is not installed, the store cannot be read, would execute a pickle, or holds symbolic
            links, through which files elsewhere would be read.
    """
    if importlib.util.find_spec("zarr") is None:
        raise DirectoryError(f"{path}: is a zarr store; reading it needs zarr: pip install 'tsdyn[zarr]'")
    try:
        _refuse_hostile(path)
        consolidated = (path / ".zmetadata").is_file()
        ds = xr.open_zarr(path, chunks={}, consolidated=consolidated, decode_times=False, decode_timedelta=False)
        if not ds.variables:
            raise DirectoryError(f"{path}: is a zarr store that holds no variable")
        return with_text(ds)
    except DirectoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError) as e:
        raise DirectoryError(f"{path}: the zarr store cannot be read: {e}") from e


def _refuse_hostile(path: Path) -> None:
    for entry in path.rglob("*"):
        if entry.is_symlink():
            raise DirectoryError(f"{entry}: is a symbolic link inside a zarr store; files elsewhere are not read")
        if entry.name in _METADATA:
            found = json.loads(entry.read_text(encoding="utf-8"))
            if any("pickle" in codec for codec in _codecs(found)):
                raise DirectoryError(f"{entry}: its numbers are pickled, and reading a pickle can run anything")


def _codecs(value: Any) -> Iterator[str]:
    """Names of codecs anywhere in a store's metadata: ``id`` in format 2, ``name`` in format 3."""
    if isinstance(value, dict):
        yield from (str(value[key]) for key in ("id", "name") if key in value)
        for held in value.values():
            yield from _codecs(held)
    elif isinstance(value, list):
        for held in value:
            yield from _codecs(held)


#: Attribute of numbers that stand for texts in a store of format 3, which has no texts of its own: the texts, as JSON.
TEXTS = "texts"


def without_text(ds: xr.Dataset) -> xr.Dataset:
    """The Dataset with texts replaced by numbers whose attribute `TEXTS` lists what they stand for."""
    found = {}
    for name, array in ds.variables.items():
        if array.dtype.kind in "OUS":
            words, codes = np.unique(array.values.astype(str), return_inverse=True)
            attrs = {**array.attrs, TEXTS: json.dumps(words.tolist())}
            found[name] = xr.Variable(array.dims, codes.reshape(array.shape).astype(np.int64), attrs)
    return ds.assign_coords({n: v for n, v in found.items() if n in ds.coords}).assign(
        {n: v for n, v in found.items() if n not in ds.coords}
    )


def with_text(ds: xr.Dataset) -> xr.Dataset:
    """The Dataset with the texts that `without_text` replaced."""
    found = {}
    for name, array in ds.variables.items():
        if TEXTS in array.attrs and array.dtype.kind in "iu":
            attrs = {key: value for key, value in array.attrs.items() if key != TEXTS}
            words = np.array(json.loads(array.attrs[TEXTS]), dtype=str)
            found[name] = xr.Variable(array.dims, words[array.values], attrs)
    return ds.assign_coords({n: v for n, v in found.items() if n in ds.coords}).assign(
        {n: v for n, v in found.items() if n not in ds.coords}
    )
