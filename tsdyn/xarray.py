"""tsdyn inside xarray: the engine ``tsdyn`` of ``xarray.open_dataset``, and the accessor ``ds.tsdyn``.

xarray imports this module whenever it lists its engines, so that everything heavy is imported in the functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from tsdyn.archive.accessor import Accessor as Accessor
from tsdyn.arguments import PATHS, takes


@takes(path=PATHS)
def open(
    path: str | Path | Sequence[str | Path],
    *,
    skip_damaged: bool = False,
    verify: bool | None = None,
    along: Literal["keys", "point"] = "keys",
) -> xr.Dataset:
    """`tsdyn.archive.reading.open`, with its arguments checked.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.open("runs/quickstart")  # nothing is loaded
        >>> ds.loss_eval.sel(overrealization=4, seed=3, epoch=slice(2, 8)).sizes["epoch"]
        7
    """
    from tsdyn.archive import reading

    return reading.open(path, skip_damaged=skip_damaged, verify=verify, along=along)


class _OnDemand(BackendArray):
    """A dask array that is computed where it is indexed, as xarray expects of an engine without ``chunks``."""

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        support = indexing.IndexingSupport.OUTER_1VECTOR
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._computed)

    def _computed(self, key: tuple[Any, ...]) -> Any:
        return np.asarray(self.array[key].compute(scheduler="synchronous"))


def _on_demand(ds: xr.Dataset, drop: str | Iterable[str] | None) -> xr.Dataset:
    """The Dataset with arrays that are read when they are indexed, and their chunks as preferences."""
    dropped = [drop] if isinstance(drop, str) else list(drop or [])
    ds = ds.drop_vars([name for name in dropped if name in ds.variables])
    lazy = {}
    for name, array in ds.variables.items():
        if array.chunks is not None:
            chunks = dict(zip(array.dims, array.chunks, strict=True))
            held = indexing.LazilyIndexedArray(_OnDemand(array.data))
            lazy[name] = xr.Variable(array.dims, held, array.attrs, {"preferred_chunks": chunks})
    return ds.assign(lazy)


class Engine(BackendEntrypoint):
    """``xarray.open_dataset(path, engine="tsdyn")``: a run, a sweep, or several, as `tsdyn.open` reads them.

    Without ``chunks`` numbers are read when they are indexed; ``chunks={}`` gives dask arrays of whole chunks on disk.
    """

    description = "Runs and sweeps of tsdyn, directories of netCDF files"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "skip_damaged", "verify", "along")
    supports_groups = True

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        skip_damaged: bool = False,
        verify: bool | None = None,
        along: Literal["keys", "point"] = "keys",
    ) -> xr.Dataset:
        """The archive as one Dataset; arguments as in `tsdyn.open`."""
        return _on_demand(open(filename_or_obj, skip_damaged=skip_damaged, verify=verify, along=along), drop_variables)

    def open_groups_as_dict(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None, **options: Any
    ) -> dict[str, xr.Dataset]:
        """``/`` with what has neither layers nor nodes, and ``/layer_1``, ... with each layer at its own widths."""
        groups = layers(open(filename_or_obj, **options))
        return {name: _on_demand(ds, drop_variables) for name, ds in groups.items()}

    def open_datatree(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None, **options: Any
    ) -> xr.DataTree:
        """The archive as a tree, see `open_groups_as_dict`."""
        return xr.DataTree.from_dict(
            self.open_groups_as_dict(filename_or_obj, drop_variables=drop_variables, **options)
        )

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether it is the directory of a run, a sweep or a recording."""
        if not isinstance(filename_or_obj, (str, Path)):
            return False
        marks = ("experiment.toml", "recording.toml", "sweep.json")
        return any((Path(filename_or_obj) / name).is_file() for name in marks)


def layers(ds: xr.Dataset) -> dict[str, xr.Dataset]:
    """An archive as Datasets by path: ``/`` with what has neither layers nor nodes, and one without padding per layer.

    Variables of the lowest layer alone (``alignment``) are with the lowest layer.
    """
    from tsdyn import vocabulary
    from tsdyn.archive.selecting import layer

    sized = {"layer", *vocabulary.NODE_WIDTHS, "input_node"} & set(ds.dims)
    plain = [name for name, array in ds.variables.items() if not sized & set(array.dims)]
    root = ds.drop_vars([name for name in ds.variables if name not in plain])
    if "layer" not in ds.dims:
        return {"/": ds}
    rest = ds.drop_vars([name for name in plain if name in ds.data_vars])
    return {"/": root} | {f"/layer_{number}": layer(rest, number) for number in ds["layer"].values.tolist()}
