"""Why a changed run ends elsewhere: gate flips, not chaos.

A run is forked before its first step: every weight is moved along one direction, by sizes over many decades, and
trained on with the same batches.  The tangent along that direction says where the branch ends to first order; the
radius, computed without any fork, is the size at which the first gate flips.  Below it distance and tangent agree, for
relu as for a smooth activation; above it only the smooth student goes on as the tangent says.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from tsdyn.analysis import captions, layout, panels
from tsdyn.analysis import style as look
from tsdyn.analysis.identity import points
from tsdyn.studies.two_layer import PAPER, SMOKE

import tsdyn
from tsdyn.archive.selecting import experiment_of
from tsdyn.experiment.experiment import Experiment
from tsdyn.through_training.blocks import Block, Job
from tsdyn.through_training.certificate import Direction, forward_tangent, gated
from tsdyn.through_training.replay import recorded_weights

__all__ = ["EXPERIMENTS", "PANELS", "SOURCE", "TITLE", "draw", "measure"]

TITLE = "distance of perturbed forks, the tangent's prediction, and the size at which the first gate flips"
SOURCE = "tsdyn: forks of the two-layer run of Tian 2020 (PMLR 119:9470)"

#: Standard deviations of the change, relative to the start's of the same layer.
SIZES = tuple(float(f"{size:.4g}") for size in np.logspace(-6.5, -0.5, 7))
_MEASURED = "definition; forks by tsdyn.fork"
_TANGENT = "tsdyn.through_training.certificate: tangent in forward mode"

_DESK = PAPER.replace(
    {"name": "fork-divergence-desk", "seeds": 5, "training.epochs": 10, "training.steps_per_epoch": 100}
    | {"data.train": 1000, "data.eval": 1000, "record.observables": ["mse", "weight"]}
    | {"sweep": {"student.activation": ["relu", "softplus"]}}
)

EXPERIMENTS: Mapping[str, Experiment] = {
    "smoke": _DESK.replace(
        {"name": "fork-divergence-smoke", "seeds": 3, "teacher.widths": SMOKE.teacher.widths, "data.train": 500}
        | {"data.eval": 500, "training.epochs": 6, "training.steps_per_epoch": 20}
    ),
    "desk": _DESK,
    "paper": _DESK.replace(
        {"name": "fork-divergence-paper", "seeds": 32, "data.train": 10_000, "data.eval": 10_000}
        | {"training.steps_per_epoch": 300}
    ),
}


def _again(experiment: Experiment, seconds: float) -> float:
    """Seconds of `measure`: the run and its forks of every size are trained; forks and tangents take more beside."""
    forks = len(SIZES) * (seconds + _seconds_of_a_fork(experiment))
    return seconds + forks + sum(_seconds_of_tangents(one) for _, one in experiment.points())


def _seconds_of_a_fork(experiment: Experiment) -> float:
    """Seconds by which a fork takes longer than the run: it is changed, and compared; of runs of one step, twice."""
    few = experiment.replace({"training.epochs": 1, "training.steps_per_epoch": 1})
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            parent, began = Path(folder) / f"run-{number}", time.perf_counter()
            tsdyn.run(few, parent)
            between = time.perf_counter()
            _forked(parent, SIZES[0], Path(folder) / f"forks-{number}")
            taken.append(time.perf_counter() - between - (between - began))
    return max(0.0, min(taken))


def _seconds_of_tangents(experiment: Experiment, steps: int = 10) -> float:
    """Seconds of the tangents of one point, of which a few steps are taken, twice."""
    steps = min(steps, experiment.steps)
    few = experiment.replace({"training.epochs": 1, "training.steps_per_epoch": steps})
    course = Block(Job(few, 1, "loss_eval", ("start",), {})).course(recorded=False)
    start, taken = course.state(), []
    for _ in range(2):
        began = time.perf_counter()
        forward_tangent(course, start, Direction(start=start))
        taken.append(time.perf_counter() - began)
    return min(taken) / steps * experiment.steps * experiment.training.epochs


AGAIN = _again


@captions.telling
def measure(archive: xr.Dataset) -> xr.Dataset:
    """Distances of forks from the run, beside the tangent's; the run is trained again, and forked at every size.

    ``size`` ‖θ'_0 − θ_0‖ (activation, seed, gaussian), ``distance`` ‖θ' − θ‖ (activation, seed, gaussian, epoch),
    ``tangent_growth`` ‖τ_t‖ of a unit change along the same direction (activation, seed, epoch), and ``radius``
    (activation, seed): the size at which the first gate flips; NaN where there is none.
    """
    experiment = experiment_of(archive)
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder) / "run"
        own = tsdyn.run(experiment, parent).load()
        distances = []
        for number, size in enumerate(SIZES):
            forks, distance = _forked(parent, size, Path(folder) / f"forks-{number}")
            distances.append(distance)
        last = forks[["weight", "bias"]].sel(epoch=[0]).load()
    along = xr.DataArray(list(SIZES), dims="gaussian", name="gaussian")
    distance = xr.concat(distances, along, coords="minimal", compat="override", join="exact", combine_attrs="drop")
    distance = distance.transpose("activation", "seed", "gaussian", "epoch")
    tangents = [
        _tangent(chosen, one, own, last)
        for chosen, one in points(own).values()  # ξ is the same at every size; the largest fork tells it best
    ]
    growth, radius = (np.stack(parts) for parts in zip(*tangents, strict=True))
    ds = xr.Dataset(
        {
            "distance": distance,
            "size": distance.isel(epoch=0, drop=True),
            "tangent_growth": (("activation", "seed", "epoch"), growth),
            "radius": (("activation", "seed"), radius),
        }
    )
    texts = {
        "distance": ("distance from the run ‖θ' − θ‖", _MEASURED),
        "size": ("size of the change at the fork", _MEASURED),
        "tangent_growth": ("size of the tangent of a unit change", _TANGENT),
        "radius": ("size of the change at which the first gate flips", _TANGENT),
    }
    return ds.assign(
        {n: ds[n].assign_attrs(units="1", long_name=text, source=source) for n, (text, source) in texts.items()}
    )


def _forked(parent: Path, size: float, out: Path) -> tuple[xr.Dataset, xr.DataArray]:
    """The forks of a run whose weights are moved by `size`, and their distances from it, loaded."""
    forks = tsdyn.fork(parent, perturb={"gaussian": size}, out=out).isel(fork_epoch=0, branch=0)
    return forks, forks["distance"].load().reset_coords(drop=True)


def _tangent(
    chosen: Mapping[str, object], experiment: Experiment, own: xr.Dataset, forks: xr.Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """Growth (seed, epoch) and radius (seed,) along the unit direction in which the forks of one point were moved."""
    epochs, seeds = own["epoch"].values, list(experiment.seed_labels)
    block = Block(Job(experiment, int(epochs[-1]), "loss_eval", ("start",), {}))
    course = block.course(recorded=False)
    start = course.state()
    here, there = (recorded_weights(ds.sel(chosen), course.ensemble, seeds, 0)[0] for ds in (own, forks))
    moved = {name: there[name].double() - here[name].double() for name in start.values}
    length = torch.stack([t.flatten(1).norm(dim=1) for t in moved.values()]).norm(dim=0)
    unit = {name: t / length.view(-1, *[1] * (t.ndim - 1)) for name, t in moved.items()}
    direction = Direction(start=start.map(torch.zeros_like)._replace(values=unit))
    found = forward_tangent(course, start, direction)
    reach = found.reach.plus.numpy() if gated(course) else np.full(len(seeds), np.nan)
    return found.growth.numpy()[:, epochs], np.where(np.isfinite(reach), reach, np.nan)


def _at_the_end(activation: str) -> layout.Panel:
    def panel(measured: xr.Dataset, ax: Axes) -> None:
        """Distance at the last epoch over the size of the change; a mark per fork, a line per seed's tangent."""
        own = measured.sel(activation=activation)
        for i in range(own.sizes["seed"]):
            one = own.isel(seed=i)
            size = one["size"].values
            words = ["tangent", "first gate flips (one line per seed)", "fork"] if i == 0 else [None, None, None]
            end = size * float(one["tangent_growth"][-1])
            ax.plot(size, end, color=look.PALETTE[2], linewidth=look.points(0.6), label=words[0])
            if np.isfinite(one["radius"]):
                ax.axvline(
                    float(one["radius"]), color=panels.colour(1), linestyle="--", linewidth=look.points(0.6),
                    label=words[1],
                )  # fmt: skip
            ax.plot(
                size, one["distance"].isel(epoch=-1), "o", color=panels.colour(0), markersize=look.points(2.2),
                markeredgewidth=0, label=words[2],
            )  # fmt: skip
        layout.decades(ax)
        layout.decades(ax, "x")
        ax.set(xlabel="size of the change at the fork", ylabel="distance at the end")

    return panel


def _departure(measured: xr.Dataset, ax: Axes) -> None:
    """How far the distance departs from the tangent's, over the size in units of the relu student's radius."""
    unit = measured["radius"].sel(activation="relu")
    for position, activation in enumerate(("relu", "softplus")):
        own = measured.sel(activation=activation)
        wanted = own["size"] * own["tangent_growth"].isel(epoch=-1)
        off: xr.DataArray = abs(own["distance"].isel(epoch=-1) / wanted - 1)
        ax.plot(
            (own["size"] / unit).transpose("gaussian", "seed").values, off.transpose("gaussian", "seed").values,
            panels.mark(position), color=panels.colour((0, 3)[position]), label=activation,
            markersize=look.points(2.2), markeredgewidth=0,
        )  # fmt: skip
    ax.axvline(1.0, color=panels.colour(1), linestyle="--", linewidth=look.points(0.8))
    layout.decades(ax)
    layout.decades(ax, "x")
    ax.set(xlabel="size / radius of the relu student", ylabel="|distance / tangent − 1|")


def _over_training(measured: xr.Dataset, ax: Axes) -> None:
    """Distance over epochs of the first relu student, at sizes about its radius, beside the tangent (thin)."""
    own = measured.sel(activation="relu").isel(seed=0)
    ratio = (own["size"] / own["radius"]).values
    sizes = [int(np.nanargmin(np.abs(np.log(ratio) - np.log(times)))) for times in (0.1, 10, 1000)]
    for position, i in enumerate(dict.fromkeys(sizes)):
        one = own.isel(gaussian=i)
        ax.plot(
            own["epoch"], float(one["size"]) * own["tangent_growth"], color=look.PALETTE[2],
            linewidth=look.points(0.6), zorder=3,
        )  # fmt: skip
        ax.plot(
            own["epoch"], one["distance"], color=panels.colour(position), linestyle=panels.STYLES[position],
            label=f"{captions.number(float(f'{ratio[i]:.2g}'))} radii",
        )  # fmt: skip
    layout.decades(ax)
    panels.whole_numbers(ax)
    ax.set(xlabel="epoch", ylabel="distance from the run")


#: Panels by name.
PANELS: dict[str, layout.Panel] = {
    "relu": _at_the_end("relu"),
    "softplus": _at_the_end("softplus"),
    "departure": _departure,
    "over training": _over_training,
}


@look.styled
def draw(measured: xr.Dataset) -> look.Page:
    """Figure: distance of forks over their size with tangent and radius, for relu and softplus; departure; training."""
    titles = ("relu student", "softplus student", "departure from the tangent", "over training, one relu student")
    cells = [layout.Cell(panel, {}, title) for panel, title in zip(PANELS, titles, strict=True)]
    says = (
        "A, B: distance between a run and its fork at the last epoch over the size of the change before the first "
        "step, what the tangent says, and the size at which the first gate flips. C: by how much distance and tangent "
        "differ, beside softplus students changed in the same way. D: distance over epochs, thin: the tangent's"
    )
    return layout.arrange(
        measured, PANELS, [cells[:2], cells[2:]], says=says, spread="points", paper=EXPERIMENTS, height=2.1
    )
