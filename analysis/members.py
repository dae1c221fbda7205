"""Rebuilds the members of an archive: every student as a network, with its teacher and its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tsdyn.analysis.identity import begun, points
from tsdyn.analysis.lift import cellwise

from tsdyn.archive.selecting import experiment_of
from tsdyn.engine.loss import Loss, loss
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.parts import Student, Teacher
from tsdyn.experiment.subsets import left_out
from tsdyn.experiment.sweep_axes import axes
from tsdyn.networks.network import Network
from tsdyn.problem import augmentation, targets
from tsdyn.problem.inputs import evaluation_inputs, labels, training_inputs
from tsdyn.problem.teachers import draw_teacher

#: Variables of the archive from which a student and its teacher are rebuilt.
PARAMETERS = ("weight", "bias", "teacher_weight", "teacher_bias")
#: Values of ``teacher.init`` whose teachers can be redrawn from (experiment, seed) alone.
DRAWN = ("separated", "orthonormal", "gaussian")


@dataclass(frozen=True)
class Member:
    """One student at one epoch.

    Attributes:
        experiment: The experiment of its point of the sweep.
        seed: Its label.
        student, teacher: The recorded networks.
    """

    experiment: Experiment
    seed: int
    student: Network
    teacher: Network

    @cached_property
    def evaluation_inputs(self) -> Tensor:
        """Inputs of the evaluation set, redrawn: a draw depends only on the experiment and the seed."""
        return torch.from_numpy(evaluation_inputs(self.experiment, self.seed))

    @cached_property
    def training_inputs(self) -> Tensor:
        """Inputs of the training set as it was trained on; for fresh data those last measured on.

        With the points that the experiment's augmentation adds, and without the samples that it leaves out.
        """
        return self._drawn_inputs[self._kept]

    @cached_property
    def _drawn_inputs(self) -> Tensor:
        if self.experiment.data.train == "fresh":
            return torch.from_numpy(training_inputs(self.experiment, self.seed, self.experiment.training.epochs))
        return augmentation.training_set(self.experiment, self.seed, self.teacher)

    @cached_property
    def _kept(self) -> Tensor:
        kept = torch.ones(len(self._drawn_inputs), dtype=torch.bool)
        subset = self.experiment.data.leave_out.subset
        if subset is not None:
            kept[torch.from_numpy(left_out(self.experiment.data, subset))] = False
        return kept

    @property
    def loss(self) -> Loss:
        """The loss with which the student was trained."""
        return loss(self.experiment.training.loss)

    @cached_property
    def training_targets(self) -> Tensor:
        """Targets of the loss on `training_inputs`, (sample, output)."""
        match self.experiment.training.labels:
            case "teacher":
                classes = None
            case "data":
                classes = torch.from_numpy(labels(self.experiment, self.seed, "train"))
            case other:
                assert_never(other)
        clean = self.loss.target(self.teacher(self._drawn_inputs), classes)
        found = targets.of_training_set(self.experiment, self.seed, clean, self.experiment.training.epochs)
        return found[self._kept]


def member(ds: xr.Dataset, experiment: Experiment) -> Member:
    """The single member that `ds` holds, at one seed, epoch and point.

    Raises:
        ValueError: naming the dimension that is left, or the variable that was not recorded; for convolutions and
            BatchNorm, and where the labels or the recorded teacher are not those of the experiment.
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
    seed = int(ds["seed"])
    if seed not in experiment.seed_labels:
        raise ValueError(f"member: seed {seed} is none of {experiment.name}'s; the experiment is another archive's")
    absent = [i for i in range(1, experiment.layout.depth + 1) if i not in np.atleast_1d(ds["layer"].values)]
    if absent or "layer" not in ds["weight"].dims:
        raise ValueError(f"member: networks are made of all layers, and {absent or 'the dimension layer'} is left out")
    widths, teacher_widths = experiment.layout.widths, experiment.layout.teacher_widths
    inputs = experiment.layout.input_width
    law, taught = experiment.student, experiment.teacher

    def network(
        weight: xr.DataArray, bias: xr.DataArray, sizes: tuple[int, ...], who: Student | Teacher, name: str, leak: float
    ) -> Network:
        pairs = list(enumerate(itertools.pairwise((inputs, *sizes)), start=1))
        weights = [np.ascontiguousarray(weight.sel(layer=i).values[:n, :below]) for i, (below, n) in pairs]
        # archives hold 0 for a missing bias, which is no parameter and has no gradient
        biases = [
            None if who.bias is False else np.ascontiguousarray(bias.sel(layer=i).values[:n]) for i, (_, n) in pairs
        ]
        return Network(weights, biases, name, leak=leak)

    ds = ds[list(PARAMETERS)].transpose(..., "layer", "node", "teacher_node", "input_node").load()
    student = network(ds["weight"], ds["bias"], widths, law, law.activation, law.leak)
    teacher = network(
        ds["teacher_weight"], ds["teacher_bias"], teacher_widths, taught, taught.activation or law.activation,
        law.leak if taught.leak is None else taught.leak,
    )  # fmt: skip
    _refuse_another(teacher, experiment, seed)
    return Member(experiment, seed, student, teacher)


def _refuse_another(teacher: Network, experiment: Experiment, seed: int) -> None:
    """Raise ValueError if the recorded teacher is not the one that the experiment draws for this seed.

    The teacher distinguishes the experiment's archive from others of the same shape.
    """
    if experiment.teacher.init not in DRAWN:
        return
    drawn = draw_teacher(experiment, seed)
    # a thousand roundings of float32, since QR and norms round differently on other machines
    if any(
        float((mine - theirs).abs().max()) > 1e-4 * float(theirs.abs().max())
        for mine, theirs in zip(teacher.weights, drawn.weights, strict=True)
    ):
        raise ValueError(
            f"member: the teacher recorded for seed {seed} is not the one that {experiment.name} draws, so that the "
            "experiment is another archive's (archives joined keep the first one's) or the teacher was replaced: ask "
            "each archive by itself, or name the teacher's file, teacher.init = 'file'"
        )


def each(
    ds: xr.Dataset,
    measure: Callable[[Member], Sequence[float]],
    names: Sequence[str],
    *,
    of: Callable[[Experiment], bool] = lambda experiment: True,
) -> xr.Dataset:
    """Dataset of `measure` for every living member at one epoch, over the (swept..., seed) of `ds`; NaN for dead ones.

    Lazy, with one task per member, if `ds` is.

    Args:
        ds: Archive or slice of one, at one epoch.
        measure: Function of a member that gives one number per name.
        names: Names of the variables.
        of: Whether to measure the points of an experiment; the others are NaN.

    Raises:
        ValueError: as `member`.
    """
    if "death_epoch" not in ds.coords:
        raise ValueError("members: the Dataset has no death_epoch, so that the dead cannot be left out; is it tsdyn's?")
    dead, committed = ds["death_epoch"], begun(ds)
    needed = ds[list(PARAMETERS)] if set(PARAMETERS) <= set(ds) else ds
    cells = np.full(dead.shape, None, dtype=object)
    seeds = np.atleast_1d(ds["seed"].values)
    for chosen, experiment in points(ds).values():
        if not of(experiment):
            continue
        there = bool(committed.sel({dim: value for dim, value in chosen.items() if dim in committed.dims}))
        for seed in seeds if there else ():
            at = {**chosen, **({"seed": seed} if "seed" in ds.dims else {})}
            if int(dead.sel(at)) < 0:
                index = tuple(dead.get_index(dim).get_loc(at[str(dim)]) for dim in dead.dims)
                cell = needed.sel(at)
                cells[index] = cell.assign_attrs(experiment=experiment.to_toml())

    def measured(cell: xr.Dataset) -> Sequence[float]:
        return measure(member(cell, experiment_of(cell)))

    found = cellwise(measured, cells, len(names))
    return xr.Dataset({name: dead.copy(data=found[i]).drop_attrs() for i, name in enumerate(names)})
