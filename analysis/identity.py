"""Finds the experiment behind every point and seed of a Dataset, or says why it cannot be known.

A Dataset carries its attribute ``experiment``, its labels and its widths.  They are checked against each other, since
joining archives (`xarray.concat`) keeps only the attributes of the first, and attributes can be copied to any Dataset.
Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import xarray as xr

from tsdyn import vocabulary
from tsdyn.archive.selecting import experiment_of
from tsdyn.archive.sweep_directory import label
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.sweep_axes import DIMENSIONS, POINT, axes, named, places, sweep_dimensions, swept_keys

#: Labels of a point → where it stands in the Dataset, and its experiment.
Points = dict[tuple[Any, ...], tuple[Mapping[str, Any], Experiment]]


def points(ds: xr.Dataset) -> Points:
    """The points of the sweep that `ds` holds, as a mapping: labels of a point → (selection, experiment).

    Raises:
        ValueError: if the labels of `ds` are not those of its experiment.
    """
    experiment = experiment_of(ds)
    _refuse_foreign(ds, experiment)
    found = _swept(ds, experiment) if experiment.sweep else {(): ({}, experiment)}
    seeds = set().union(*(single.seed_labels for _, single in found.values()))
    if "seed" in ds.coords and (foreign := sorted(set(np.atleast_1d(ds["seed"].values).tolist()) - seeds)):
        raise ValueError(
            f"points: seeds {foreign[:5]} are none of {experiment.name}'s, whose experiment the Dataset carries; of "
            "archives joined, and of a Dataset of your own, it cannot be known whose the networks are: ask each "
            "by itself"
        )
    for chosen, single in found.values():
        _refuse_other_widths(ds, chosen, single)
    return found


def per_point(ds: xr.Dataset, told: Callable[[Experiment], Any]) -> xr.DataArray:
    """A value computed from each point's experiment, over what is left of the swept dimensions.

    Raises:
        ValueError: as `points`.
    """
    found = list(points(ds).values())
    dims = tuple(dict.fromkeys(dim for chosen, _ in found for dim in chosen))
    values = np.full(tuple(ds.sizes[dim] for dim in dims), None, dtype=object)
    for chosen, experiment in found:
        values[tuple(ds.get_index(dim).get_loc(chosen[dim]) for dim in dims)] = told(experiment)
    if any(value is None for value in values.flat):
        raise ValueError(f"points: {', '.join(dims)} of the Dataset have labels that its experiment does not sweep")
    return xr.DataArray(np.array(values.tolist()), {dim: ds[dim].variable for dim in dims}, dims)


def refuse_odd(ds: xr.Dataset, caller: str) -> None:
    """Raise ValueError for readable Datasets whose labels or values cannot be those of an archive.

    Raises:
        ValueError: if a label stands along a dimension more than once, or a variable of the schema holds no floating
            point numbers; names it.
    """
    for dim, index in ds.indexes.items():
        if not index.is_unique:
            twice = index[index.duplicated()].unique().tolist()
            raise ValueError(
                f"{caller}: {dim} has the labels {twice[:5]} more than once; it cannot be told which is meant"
            )
    whole = ("seed", "epoch", "layer", "node", "node_2", "teacher_node", "teacher_node_2", "input_node")
    for name, array in ds.variables.items():
        number = name in vocabulary.VARIABLES or name == "coverage"
        count = (name in vocabulary.COORDINATES and name not in ("coverage", "layer_name")) or name in whole
        if number and array.dtype.kind != "f":
            raise ValueError(
                f"{caller}: {name} holds {array.dtype}, not floating point numbers; it cannot come from an archive"
            )
        if count and array.dtype.kind not in "iu":
            raise ValueError(f"{caller}: {name} holds {array.dtype}, not integers; it cannot come from an archive")


def refuse_part(ds: xr.Dataset | xr.DataArray, needed: Mapping[str, int], caller: str) -> None:
    """Raise ValueError where `ds` holds a part of the nodes that networks are made of, or holds them in another order.

    Args:
        ds: Its labels along each dimension of `needed` that it has must be 0, 1, ... in their order.
        needed: Dimension → how many there are at least; padding beyond them may be there or not.
        caller: Named by the error.
    """
    for dim, count in needed.items():
        if dim not in ds.dims:
            continue
        labels = ds[dim].values
        if len(labels) < count or not np.array_equal(labels, np.arange(len(labels))):
            few = ", ".join(map(str, labels[:6].tolist())) + (", ..." if len(labels) > 6 else "")
            raise ValueError(
                f"{caller}: {dim} holds {few}, and all {count} in their order are needed; compute first, and select "
                f"{dim} afterwards"
            )


def nodes_of(experiment: Experiment) -> dict[str, int]:
    """How many nodes `refuse_part` needs along each dimension, for networks of all layers of `experiment`."""
    layout = experiment.layout
    return {
        "node": max(layout.widths),
        "teacher_node": max(layout.teacher_widths),
        "input_node": max(*layout.input_widths, *layout.teacher_input_widths),
    }


def begun(ds: xr.Dataset) -> xr.DataArray:
    """Whether each point has a committed epoch; True for a single run."""
    return ds["coverage"] > 0 if "coverage" in ds.coords else xr.DataArray(True)


def _names(ds: xr.Dataset, experiment: Experiment) -> dict[str, str]:
    """Swept key → dimension, as the Dataset says; by the rule where it does not."""
    keys, found = swept_keys(experiment.sweep), None
    with suppress(ValueError, RecursionError):
        found = named(json.loads(str(ds.attrs.get(DIMENSIONS))), keys)
    return found or sweep_dimensions(keys)


def _swept(ds: xr.Dataset, experiment: Experiment) -> Points:
    names = _names(ds, experiment)
    lost = [name for name in names.values() if name not in ds.coords]
    if lost:
        raise ValueError(
            f"points: the Dataset lacks {', '.join(lost)}, which {experiment.name} sweeps, so that it cannot be known "
            "which point it is; select without drop=True"
        )
    found: Points = {}
    for place, (values, single) in zip(places(experiment.sweep), experiment.points(), strict=True):
        labels = {names[key]: label(value) for key, value in values.items()}
        # numpy turns numbers beside words into words, as in bias = [-0.1, false]
        labels = {name: str(v) if ds[name].dtype.kind == "U" else v for name, v in labels.items()}
        if not all(value in np.atleast_1d(ds[name].values) for name, value in labels.items()):
            continue
        along = {
            axis.dimension: (labels | {POINT: position})[axis.dimension]
            for axis, position in zip(axes(experiment.sweep, names), place, strict=True)
        }
        if POINT in ds.coords and POINT in along and along[POINT] not in np.atleast_1d(ds[POINT].values):
            continue
        found[tuple(labels.values())] = {dim: value for dim, value in along.items() if dim in ds.dims}, single
    if not found:
        raise ValueError(f"points: no point of {experiment.name}'s sweep has the labels of the Dataset")
    return found


def _refuse_foreign(ds: xr.Dataset, experiment: Experiment) -> None:
    """Raise ValueError for dimensions that the experiment does not sweep, and for repeated labels."""
    swept = {axis.dimension for axis in axes(experiment.sweep, _names(ds, experiment))}
    held = {str(dim) for name, array in ds.variables.items() if name in vocabulary.VARIABLES for dim in array.dims}
    foreign = sorted(held - swept - set(vocabulary.DIMENSIONS))
    if foreign:
        raise ValueError(
            f"points: {', '.join(foreign)} is no dimension of {experiment.name}, whose experiment the Dataset carries; "
            "archives joined keep the first one's: open them together by tsdyn.open([...]), and ask each by itself"
        )
    for dim in ("seed", "epoch", *swept):
        if dim in ds.indexes and not ds.indexes[dim].is_unique:
            twice = ds.indexes[dim][ds.indexes[dim].duplicated()].unique().tolist()
            raise ValueError(
                f"points: {dim} has {twice[:5]} more than once; of archives joined it cannot be known whose the "
                "networks are: ask each archive by itself"
            )


def _refuse_other_widths(ds: xr.Dataset, chosen: Mapping[str, Any], experiment: Experiment) -> None:
    if "width" not in ds.coords or "layer" not in ds["width"].dims or "layer" not in ds.coords:
        return
    layout = experiment.layout
    at = {dim: value for dim, value in chosen.items() if dim in ds["width"].dims}
    for name, wanted in (("width", layout.widths), ("teacher_width", layout.teacher_widths)):
        if name not in ds.coords:
            continue
        held = ds[name].sel(at)
        there = {int(number): int(n) for number, n in zip(ds["layer"].values, held.values, strict=True) if n > 0}
        if any(wanted[number - 1 : number] != (n,) for number, n in there.items()):
            raise ValueError(
                f"points: {name} is {there} by layer, but {list(wanted)} in {experiment.name}, whose experiment the "
                "Dataset carries; it belongs to other networks"
            )
