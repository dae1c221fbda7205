"""The members of an archive as networks again: every student, its teacher and its data, from what was recorded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tsdyn.analysis.lift import cellwise

from tsdyn import alignment, data
from tsdyn.archive import experiment_of, label
from tsdyn.experiment import Experiment
from tsdyn.networks import Network
from tsdyn.sweep_axes import POINT, axes, places, sweep_dimensions, swept_keys

#: Variables of the archive that a student and its teacher are made of.
PARAMETERS = ("weight", "bias", "teacher_weight", "teacher_bias")


@dataclass(frozen=True)
class Member:
    """One student at one epoch.

    Attributes:
        experiment: That of its point of the sweep.
        seed: Its label.
        student, teacher: As recorded.
    """

    experiment: Experiment
    seed: int
    student: Network
    teacher: Network

    @cached_property
    def evaluation_inputs(self) -> Tensor:
        """Drawn again: a draw depends on the experiment and the seed only."""
        return torch.from_numpy(data.evaluation_inputs(self.experiment, self.seed))

    @cached_property
    def training_inputs(self) -> Tensor:
        """Finite data, augmented as the experiment says; with fresh data those of the last epoch's measurement."""
        if self.experiment.data.train == "fresh":
            return torch.from_numpy(data.training_inputs(self.experiment, self.seed, self.experiment.training.epochs))
        return alignment.training_set(self.experiment, self.seed, self.teacher)


def points(ds: xr.Dataset) -> dict[tuple[Any, ...], tuple[Mapping[str, Any], Experiment]]:
    """For each point of the archive's sweep that is in `ds`: its labels → (selection, experiment)."""
    experiment = experiment_of(ds)
    if not experiment.sweep:
        return {(): ({}, experiment)}
    names = sweep_dimensions(swept_keys(experiment.sweep))
    found: dict[tuple[Any, ...], tuple[Mapping[str, Any], Experiment]] = {}
    for place, (values, single) in zip(places(experiment.sweep), experiment.points(), strict=True):
        labels = {names[key]: label(value) for key, value in values.items()}
        if not all(value in np.atleast_1d(ds[name].values) for name, value in labels.items()):
            continue
        along = {
            axis.dimension: (labels | {POINT: position})[axis.dimension]
            for axis, position in zip(axes(experiment.sweep), place, strict=True)
        }
        if POINT in ds.coords and POINT in along and along[POINT] not in np.atleast_1d(ds[POINT].values):
            continue
        found[tuple(labels.values())] = {dim: value for dim, value in along.items() if dim in ds.dims}, single
    return found


def member(ds: xr.Dataset, experiment: Experiment) -> Member:
    """The member that `ds` holds: one seed, epoch and point.

    Raises:
        ValueError: naming the dimension that is left, or the variable that was not recorded; for convolutions and
            BatchNorm.
    """
    if experiment.deep:
        raise ValueError(
            f"member: {experiment.name} has convolutions or BatchNorm, which are not rebuilt here; build a "
            "Network from the recorded weight, bias and norm_* variables, and take its folded()"
        )
    missing = [name for name in PARAMETERS if name not in ds]
    if missing:
        raise ValueError(f"member: the archive has no {', '.join(missing)}; record them (record.observables)")
    left = [dim for dim in ("seed", "epoch", *(axis.dimension for axis in axes(experiment.sweep))) if dim in ds.dims]
    if left:
        raise ValueError(f"member: {', '.join(left)} left; select one")
    widths, teacher_widths = experiment.layout.widths, experiment.layout.teacher_widths
    inputs = experiment.layout.input_width
    law, taught = experiment.student, experiment.teacher

    def network(weight: xr.DataArray, bias: xr.DataArray, sizes: tuple[int, ...], name: str, leak: float) -> Network:
        pairs = list(enumerate(itertools.pairwise((inputs, *sizes)), start=1))
        weights = [np.ascontiguousarray(weight.sel(layer=i).values[:n, :below]) for i, (below, n) in pairs]
        biases = [np.ascontiguousarray(bias.sel(layer=i).values[:n]) for i, (_, n) in pairs]
        return Network(weights, biases, name, leak=leak)

    ds = ds[list(PARAMETERS)].transpose(..., "layer", "node", "teacher_node", "input_node").load()
    student = network(ds["weight"], ds["bias"], widths, law.activation, law.leak)
    teacher = network(
        ds["teacher_weight"], ds["teacher_bias"], teacher_widths, taught.activation or law.activation,
        law.leak if taught.leak is None else taught.leak,
    )  # fmt: skip
    return Member(experiment, int(ds["seed"]), student, teacher)


def each(
    ds: xr.Dataset,
    measure: Callable[[Member], Sequence[float]],
    names: Sequence[str],
    *,
    of: Callable[[Experiment], bool] = lambda experiment: True,
) -> xr.Dataset:
    """`measure` of every living member at one epoch: names over what is left of (swept..., seed); NaN for the dead.

    Lazy, a task a member, if `ds` is.

    Args:
        ds: Archive or slice of one, at one epoch.
        measure: Gives a number a name.
        names: Of what it gives.
        of: Which points of a sweep to look at; the others are NaN.

    Raises:
        ValueError: as `member`.
    """
    dead = ds["death_epoch"]
    needed = ds[list(PARAMETERS)] if set(PARAMETERS) <= set(ds) else ds
    cells = np.full(dead.shape, None, dtype=object)
    seeds = np.atleast_1d(ds["seed"].values)
    for chosen, experiment in points(ds).values():
        if not of(experiment):
            continue
        for seed in seeds:
            at = {**chosen, **({"seed": seed} if "seed" in ds.dims else {})}
            begun = "coverage" not in ds.coords or float(ds["coverage"].sel(chosen)) > 0
            if begun and int(dead.sel(at)) < 0:
                index = tuple(dead.get_index(dim).get_loc(at[str(dim)]) for dim in dead.dims)
                cell = needed.sel(at)
                cells[index] = cell.assign_attrs(experiment=experiment.to_toml())

    def measured(cell: xr.Dataset) -> Sequence[float]:
        return measure(member(cell, experiment_of(cell)))

    found = cellwise(measured, cells, len(names))
    return xr.Dataset({name: dead.copy(data=found[i]).drop_attrs() for i, name in enumerate(names)})
