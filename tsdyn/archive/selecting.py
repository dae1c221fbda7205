"""Select parts of an archive by name: a layer without padding, points of a sweep by swept values.

Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from tsdyn import vocabulary
from tsdyn.arguments import LABELLED, LAYER, takes
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import POINT

T = TypeVar("T", xr.Dataset, xr.DataArray)


def experiment_of(ds: xr.Dataset) -> Experiment:
    """The experiment that made an archive, given the archive or any slice of it.

    Raises:
        ExperimentError: if the Dataset names none, or comes from several archives opened together, each with its own.
    """
    text = ds.attrs.get("experiment")
    if "recording" in ds.attrs:
        raise ExperimentError(
            "experiment_of: this is a recording of a loop of the user's own (tsdyn.Recorder), which has no experiment "
            "file from which networks, teacher and data could be made again"
        )
    if text is None:
        if "opened" in ds.attrs:
            raise ExperimentError(
                "experiment_of: several archives opened together have several experiments; ask each by itself, "
                "tsdyn.open(one of them)"
            )
        raise ExperimentError(
            "experiment_of: the Dataset has no attribute 'experiment'; it is not an archive of tsdyn's, or lost its "
            "attributes on the way (xarray's arithmetic drops them; ds.assign_attrs(archive.attrs) puts them back)"
        )
    return _written(str(text))


@lru_cache(maxsize=8)
def _written(text: str) -> Experiment:
    """The experiment of an archive's text; it is asked for again and again, and depends on the text alone."""
    return Experiment.from_toml_text(text, archived=True)


def swept_dimensions(ds: xr.Dataset | xr.DataArray) -> tuple[str, ...]:
    """Dimensions of `ds` that come from swept keys."""
    return tuple(str(dim) for dim in ds.dims if str(dim) not in vocabulary.DIMENSIONS)


def select(ds: T, **labels: Any) -> T:
    """The points of a sweep that have the given values of swept keys, be these dimensions or coordinates of ``point``.

    ``select(ds, polarity=1.0, learning_rate=[0.01, 0.1])``; a list keeps the dimension.  A single point along
    ``point`` loses that dimension.

    Raises:
        KeyError: if a name is not a swept key, or no point has such a value; names those there are.

    Examples:
        >>> import tsdyn
        >>> ds = tsdyn.select(tsdyn.open("runs/quickstart"), overrealization=4)
        >>> "overrealization" in ds.dims
        False
    """
    for name, wanted in labels.items():
        coordinate = ds.coords.get(name)
        if coordinate is None or coordinate.ndim != 1 or coordinate.dims[0] in vocabulary.DIMENSIONS:
            there = [str(n) for n, c in ds.coords.items() if c.ndim == 1 and c.dims[0] not in vocabulary.DIMENSIONS]
            raise KeyError(f"select: no swept key {name!r}; there are {', '.join(there) or 'none'}")
        values = wanted if isinstance(wanted, (list, tuple, np.ndarray)) else [wanted]
        missing = [value for value in values if value not in coordinate.values]
        if missing:
            held = list(dict.fromkeys(coordinate.values.tolist()))
            raise KeyError(f"select: {name} has no {missing}; it has {held}")
        ds = ds.isel({coordinate.dims[0]: np.flatnonzero(np.isin(coordinate.values, values))})
        if values is not wanted and name in ds.dims:
            ds = ds.squeeze(name)
    return ds.squeeze(POINT) if ds.sizes.get(POINT) == 1 else ds


def lowest_layer(ds: xr.Dataset | xr.DataArray) -> int:
    """Label of the lowest layer: 1 for an archive and any slice of it, else the first label (layers of your own)."""
    return min(1, int(ds.indexes["layer"].min()))


def _named_layer(ds: xr.Dataset | xr.DataArray, name: str) -> int:
    """The label of the layer that a module of the user's own calls so."""
    names = ds.coords["layer_name"] if "layer_name" in ds.coords and "layer" in ds.dims else None
    held = [] if names is None or names.ndim != 1 else names.values.tolist()
    if held.count(name) != 1:
        raise ValueError(f"layer: {name!r} is no name of a layer; there are {held or 'no names (layer_name)'}")
    return int(ds.indexes["layer"][held.index(name)])


@takes(ds=LABELLED, number=LAYER)
def layer(ds: T, number: int | str) -> T:
    """One layer without padding.

    Node dimensions end where the layer does (for several widths in `ds`, where the widest of them does), so that
    selecting a node that is not there is a KeyError.  In a Dataset that holds student and teacher weights,
    ``input_node`` ends where the wider of the two layers below does.  Variables of the lowest layer alone
    (``alignment``) stay with the lowest layer.  A Dataset without widths (your own) is cut nowhere.

    Args:
        ds: Dataset or variable of a run or a sweep, with a ``layer`` dimension.
        number: A label of ``layer``, 1..L in an archive; layers of your own may be counted from 0.  Of modules of your
            own also a layer's name, one of ``layer_name``.

    Raises:
        ValueError: if `ds` has no such layer.

    Examples:
        >>> import tsdyn
        >>> hidden = tsdyn.layer(tsdyn.open("runs/quickstart"), 1)
        >>> hidden.sizes["teacher_node"]
        5
    """
    if isinstance(number, str):
        number = _named_layer(ds, number)
    if "layer" not in ds.dims or number not in ds.indexes["layer"]:
        held = list(ds.indexes["layer"]) if "layer" in ds.dims else "no layer dimension (sel(layer=[1]) keeps it)"
        raise ValueError(f"layer: {number} is not in the dataset, which has {held}")
    if number > lowest_layer(ds) and isinstance(ds, xr.Dataset):  # variables of layer 1 alone have no ``layer``
        lowest = [
            n for n, v in ds.data_vars.items() if "layer" not in v.dims and set(vocabulary.NODE_WIDTHS) & set(v.dims)
        ]
        ds = ds.drop_vars(lowest)
    # all dimensions are cut in one call: dask then reads no more than is asked for
    place = int(ds.get_index("layer").get_loc(number))
    at = {name: c.isel(layer=place) for name, c in ds.coords.items() if "layer" in c.dims}
    ends = {dim: coordinate for dim, coordinate in vocabulary.NODE_WIDTHS.items() if dim in ds.dims}
    widths = {dim: int(at[coordinate].max()) for dim, coordinate in ends.items() if coordinate in at}
    if "teacher_layer" in ds.dims:  # all of the teacher's layers stand side by side
        widths.pop("teacher_node", None)
    if "input_node" in ds.dims:
        names = {ds.name} if isinstance(ds, xr.DataArray) else set(ds.data_vars)
        below = [c for c, v in (("input_width", "weight"), ("teacher_input_width", "teacher_weight")) if v in names]
        below = below or ["input_width", "teacher_input_width"]
        if held := [int(at[c].max()) for c in below if c in at]:
            widths["input_node"] = max(held)
    return ds.isel({"layer": place, **{dim: _below(ds, dim, width) for dim, width in widths.items()}})


def _below(ds: xr.Dataset | xr.DataArray, dim: str, width: int) -> slice | list[int]:
    """Where the nodes of a layer of that width stand: first, unless the user has put them in another order."""
    labels = ds[dim].values
    ordered = np.array_equal(labels, np.arange(len(labels)))
    return slice(0, width) if ordered else np.flatnonzero(labels < width).tolist()
