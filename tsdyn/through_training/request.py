"""What is asked of `tsdyn.sensitivity`: checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from tsdyn.engine.loss import loss
from tsdyn.experiment.errors import ExperimentError, nearest
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import new_at_every_step

#: What a run starts from, in which a derivative can be taken.
WRT = ("start", "sample", "target", "input", "learning_rate", "teacher", "scale")
_OF_SAMPLES = ("sample", "target", "input")
#: Starts that depend on the teacher.
_TAUGHT = ("near-teacher", "same-direction", "same-sign")


def wanted(wrt: str | Sequence[str]) -> tuple[str, ...]:
    """The names in `wrt`, in the order of `WRT`.

    Raises:
        ExperimentError: for a name that is none, or no name at all.
    """
    given = [wrt] if isinstance(wrt, str) else list(wrt)
    for name in given:
        if name not in WRT:
            raise ExperimentError(
                f"sensitivity: wrt = {name!r}: is nothing that a run starts from{nearest(str(name), WRT)}; there are "
                f"{', '.join(WRT)}"
            )
    if not given:
        raise ExperimentError(f"sensitivity: wrt is empty; give some of {', '.join(WRT)}")
    return tuple(name for name in WRT if name in given)


def refuse_unfit(experiment: Experiment, wrt: Sequence[str]) -> None:
    """Refuse what cannot be differentiated, by name, with the way out.

    Raises:
        ExperimentError: for runs that take no steps, and inputs of a run that it does not have or not smoothly.
    """
    if experiment.fork.parent is not None:
        raise ExperimentError(
            f"sensitivity: {experiment.name} branches off another run, whose end is its start; ask for the parent, "
            f"{experiment.fork.parent}"
        )
    if experiment.data.leave_out.subset is not None:
        raise ExperimentError(
            f"sensitivity: {experiment.name} leaves samples out; ask for a run on all samples, whose d_sample says "
            "what leaving one out changes (tsdyn.attribution.lds compares the two)"
        )
    training = experiment.training
    if experiment.kind != "training":
        raise ExperimentError(
            f"sensitivity: kind = {experiment.kind!r} takes no steps of an optimizer; kind = 'training' with fresh "
            "data does"
        )
    if training.method == "flow":
        raise ExperimentError(
            "sensitivity: training.method = 'flow' is integrated by adaptive steps, which are not differentiated; "
            "train with 'gd' at a small rate"
        )
    for name in wrt:
        if name in _OF_SAMPLES and new_at_every_step(experiment):
            why = "data.train = 'fresh'" if experiment.data.train == "fresh" else "data.augment = 'crop-flip'"
            raise ExperimentError(
                f"sensitivity: wrt = {name!r}: {why}: no sample is seen twice, so that none has a derivative worth a "
                "name; train on a finite set (data.train = 10000), or ask for start, learning_rate or teacher"
            )
    if "teacher" in wrt:
        _refuse_teacher(experiment)
    if "scale" in wrt:
        _refuse_scale(experiment)


def _refuse_teacher(experiment: Experiment) -> None:
    student = experiment.student
    if experiment.teacher.module is not None:
        raise ExperimentError("sensitivity: wrt = 'teacher': is a module of your own; ask for target")
    if loss(experiment.training.loss).targets == "classes":
        raise ExperimentError(
            f"sensitivity: wrt = 'teacher': training.loss = {experiment.training.loss!r} is of classes, which jump "
            "with the teacher's largest output; ask for target, the weights of the classes"
        )
    enters = {
        f"student.init = {student.init!r}": student.init in _TAUGHT,
        f"student.toward_weakest = {student.toward_weakest!r}": student.toward_weakest != "free",
        f"data.augment = {experiment.data.augment!r}": experiment.data.augment == "aware",
    }
    for key, there in enters.items():
        if there:
            raise ExperimentError(
                f"sensitivity: wrt = 'teacher': with {key} the run starts from the teacher in more than its targets; "
                "ask for target and start"
            )


def _refuse_scale(experiment: Experiment) -> None:
    student = experiment.student
    scaled = student.module is None and (
        student.init == "gaussian" or (student.init == "near-teacher" and not experiment.training.normalize)
    )
    if not scaled:
        shown = f"student.init = {student.init!r}" if student.module is None else "a student of your own"
        raise ExperimentError(
            f"sensitivity: wrt = 'scale': with {shown} the start does not depend smoothly on student.scale; ask for "
            "start, or take init = 'gaussian'"
        )


def checked_epoch(ds: xr.Dataset, epoch: int | None) -> int:
    """The epoch of the observable, by default the last recorded one.

    Raises:
        ExperimentError: if the archive does not reach it, or holds no weights to compare the replay with.
    """
    needed = "parameter" if "parameters" in ds.attrs else "weight"
    if needed not in ds:
        raise ExperimentError(
            f"sensitivity: the archive holds no {needed}, with which the run that is trained again could be compared; "
            f'record it: [record] observables = ["{needed}", ...] (record.epochs = [0, ...] keeps few of them)'
        )
    for dim in ("epoch", "seed", *(() if needed == "parameter" else ("layer", "node", "input_node"))):
        if dim not in ds[needed].dims:
            raise ExperimentError(
                f"sensitivity: the Dataset lacks {dim}; give the whole archive, and seeds= and epoch="
            )
    last = int(ds["epoch"].max())
    if epoch is None:
        return last
    if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or not 0 <= epoch <= last:
        raise ExperimentError(f"sensitivity: epoch = {epoch!r}; the archive has the epochs 0..{last}")
    return int(epoch)


def chosen_seeds(ds: xr.Dataset, seeds: Sequence[int] | int | None) -> list[int]:
    """The labels of the members that are asked for.

    Raises:
        ExperimentError: for a label that the archive does not have.
    """
    held = [int(seed) for seed in np.atleast_1d(ds["seed"].values)]
    if seeds is None:
        return held
    asked = [int(seeds)] if isinstance(seeds, (int, np.integer)) else [int(seed) for seed in seeds]
    foreign = [seed for seed in asked if seed not in held]
    if foreign or not asked or len(set(asked)) < len(asked):
        raise ExperimentError(f"sensitivity: seeds = {asked}; each once, of those that the archive has: {held}")
    return asked


def living(ds: xr.Dataset, experiment: Experiment, seeds: Sequence[int], epoch: int, *, named: bool) -> list[int]:
    """The seeds that were still trained at `epoch`.

    Raises:
        ExperimentError: if a seed that was asked for by name died, or any stopped, before the epoch.
    """
    stop = experiment.training.stop
    if stop is not None:
        if "stop_epoch" not in ds:
            raise ExperimentError(
                "sensitivity: training.stop: when members stopped is known once the run is finished; finish it first"
            )
        for seed in seeds:
            at = float(ds["stop_epoch"].sel(seed=seed))
            if at < epoch:  # NaN: did not stop
                raise ExperimentError(
                    f"sensitivity: seed {seed} stopped at epoch {at:.0f} (training.stop); ask for an epoch up to that, "
                    "or leave it out of seeds"
                )
    found = []
    for seed in seeds:
        death = int(ds["death_epoch"].sel(seed=seed)) if "death_epoch" in ds.coords else -1
        if death < 0 or death > epoch:
            found.append(seed)
        elif named:
            raise ExperimentError(
                f"sensitivity: seed {seed} died at epoch {death} (its parameters became NaN or infinite); ask for an "
                "epoch before that, or leave it out of seeds"
            )
    return found


def bytes_of(memory: int | float | str | None) -> int | None:
    """A number of bytes, also from a text such as ``"500MB"``; None for none.

    Raises:
        ExperimentError: if it is neither.
    """
    if memory is None:
        return None
    units: dict[str, float] = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "b": 1.0}
    given: Any = memory
    if isinstance(memory, str):
        text = memory.strip().lower()
        unit = next((u for u in units if text.endswith(u)), "")
        try:
            given = float(text.removesuffix(unit)) * units.get(unit, 1.0)
        except ValueError:
            given = None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not given > 0:
        raise ExperimentError(f"sensitivity: memory = {memory!r}; a number of bytes, or a text such as '500MB'")
    return int(given)
