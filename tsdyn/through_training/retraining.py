"""Training again from a changed beginning, beside what the derivative predicts: the proof of how far it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from tsdyn.analysis.identity import points
from tsdyn.archive import reading
from tsdyn.archive.selecting import swept_dimensions
from tsdyn.experiment.errors import ExperimentError
from tsdyn.running.own_modules import Maker
from tsdyn.through_training.blocks import Block, Job
from tsdyn.through_training.certificate import Direction, direction_of
from tsdyn.through_training.labelled import SIDES
from tsdyn.through_training.linearised import moved_on
from tsdyn.through_training.observed import Of
from tsdyn.through_training.replay import Course
from tsdyn.through_training.request import checked_epoch, chosen_seeds, living, refuse_unfit, wanted
from tsdyn.through_training.steps import Inputs, State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Changes in units of the radius, where none are given.
MULTIPLES = (0.01, 0.03, 0.1, 0.3, 0.9, 1.1, 3.0, 10.0, 30.0, 100.0)
SOURCE = "tsdyn.through_training.retraining: the run trained again in float64 from the changed beginning"


def retrained(
    path_or_dataset: str | Path | xr.Dataset,
    of: Of = "loss_eval",
    *,
    epoch: int | None = None,
    wrt: str = "start",
    seeds: int | Sequence[int] | None = None,
    multiples: Sequence[int | float] = MULTIPLES,
    sizes: Sequence[int | float] | None = None,
    student: Maker | None = None,
    teacher: Maker | None = None,
) -> xr.Dataset:
    """The observable's change, predicted by the derivative and found by training again, over sizes of the change.

    The change is along the normalised derivative (negative sizes: against it), by a multiple of the radius on that
    side, or by `sizes` themselves, which a smooth model, having no radius, needs.

    Args:
        path_or_dataset: A run, or a sweep of which one point is selected.
        of, epoch, seeds, student, teacher: As in `tsdyn.sensitivity`.
        wrt: One of its names.
        multiples: Sizes in units of the radius.
        sizes: Sizes in the units of what is changed, instead.

    Returns:
        Dataset of ``size``, ``predicted`` and ``retrained`` (seed, change), and ``radius`` (seed, side).

    Raises:
        ExperimentError: as `tsdyn.sensitivity`; for a smooth model without `sizes`.
    """
    ds = path_or_dataset if isinstance(path_or_dataset, xr.Dataset) else reading.open(path_or_dataset)
    if left := swept_dimensions(ds):
        raise ExperimentError(f"retrained: {', '.join(left)} left; select one point, tsdyn.select(ds, ...)")
    ((_, experiment),) = points(ds).values()
    (name,) = wanted([wrt])
    refuse_unfit(experiment, [name])
    last = checked_epoch(ds, epoch)
    labels = living(ds, experiment, chosen_seeds(ds, seeds), last, named=seeds is not None)
    job = Job(experiment.replace({"seeds": labels}), last, of, (name,), {}, student=student, teacher=teacher)
    block = Block(job)
    course = block.course(recorded=False)
    start = course.state()
    sums, slope, taught, _ = block.derivative(course, None)
    radius, _, _ = block.certificate(course, start, sums, taught, None)
    direction, moved, length = block.direction(name, course, start, sums, taught)
    if sizes is None and not np.isfinite(radius).any():
        raise ExperimentError(
            "retrained: nothing flips along this derivative, so that there is no radius to take multiples of; give "
            "sizes="
        )
    wide = np.array(
        [list(sizes)] * len(labels) if sizes is not None
        else [[m * radius[i, 0, 0 if m >= 0 else 1] for m in multiples] for i in range(len(labels))]
    )  # fmt: skip
    found = [
        _value(block, course, start, direction, moved, torch.from_numpy(column)) - slope.value for column in wide.T
    ]
    return _labelled(job, labels, wide, length.numpy()[:, None] * wide, torch.stack(found, 1).numpy(), radius[:, 0])


def _value(
    block: Block, course: Course, start: State, direction: Direction, teacher: dict[str, Tensor] | None, size: Tensor
) -> Tensor:
    """The observable of every member, trained again with everything changed by `size`, (member,), along a direction."""

    def by(tensor: Tensor, along: Tensor) -> Tensor:
        return tensor + size.view(-1, *[1] * (tensor.ndim - 1)) * along

    state = start
    if direction.start is not None:
        values = {n: by(t, direction.start.values[n]) for n, t in start.values.items()}
        state = start._replace(values=values)
    for count in range(1, course.steps + 1):
        pairs = zip(course.given(count), direction_of(course, direction, count), strict=True)
        state = moved_on(course.kind_at(count), state, Inputs(*(by(t, a) for t, a in pairs)), course.rule(count), count)
    moved = None
    if teacher is not None:
        assert block.teachers.values is not None
        moved = {n: by(t, teacher[n]) for n, t in block.teachers.values.items()}
    return block.values(course, state, moved)


def _labelled(
    job: Job, seeds: list[int], sizes: np.ndarray, predicted: np.ndarray, found: np.ndarray, radius: np.ndarray
) -> xr.Dataset:
    of = job.of if isinstance(job.of, str) else job.of[0] if isinstance(job.of, tuple) else job.of.__name__
    along = ("seed", "change")

    def attrs(long_name: str) -> dict[str, Any]:
        return {"units": "1", "long_name": long_name, "source": SOURCE}

    return xr.Dataset(
        {
            "size": (along, sizes, attrs(f"change of {job.wrt[0]} along the normalised derivative")),
            "predicted": (along, predicted, attrs(f"change of {of} at epoch {job.epoch} by the derivative")),
            "retrained": (along, found, attrs(f"change of {of} at epoch {job.epoch} by training again")),
            "radius": (("seed", "side"), radius, attrs("largest change that flips no gate")),
        },
        {"seed": seeds, "change": np.arange(sizes.shape[1]), "side": list(SIDES)},
    )


def figure(ds: xr.Dataset) -> Figure:
    """The figure of a result of `retrained`: predicted and retrained change over the size, with the radius marked."""
    import matplotlib.pyplot as plt

    seeds = ds["seed"].values.tolist()
    drawn, axes = plt.subplots(
        1, len(seeds), figsize=(max(4.8, 3.2 * len(seeds)), 3.2), squeeze=False, layout="constrained"
    )
    for axis, seed in zip(axes[0], seeds, strict=True):
        at = ds.sel(seed=seed)
        order = np.argsort(np.abs(at["size"].values))
        size = np.abs(at["size"].values[order])
        axis.plot(size, np.abs(at["predicted"].values[order]), color="0.5", label="predicted")
        found, wanted = at["retrained"].values[order], at["predicted"].values[order]
        for same, face in ((True, "C0"), (False, "white")):
            chosen = (np.sign(found) == np.sign(wanted)) == same
            if chosen.any():
                label = "trained again" if same else "trained again, the other way"
                axis.plot(size[chosen], np.abs(found[chosen]), "o", color="C0", markerfacecolor=face, label=label)
        for side, style in zip(SIDES, ("-", "--"), strict=True):
            radius = float(at["radius"].sel(side=side))
            if np.isfinite(radius) and radius > 0 and ((at["size"] > 0) == (side == "+")).any():
                axis.axvline(radius, color="C3", linestyle=style, linewidth=1, label=f"radius {side}")
        axis.set(xscale="log", yscale="log", xlabel=ds["size"].attrs["long_name"], title=f"seed {seed}")
        axis.xaxis.label.set_fontsize(8)
    axes[0, 0].set_ylabel("|change of the observable|")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return drawn
