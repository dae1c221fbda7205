"""What a run will take, before anything is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tsdyn import archive, memory, schema
from tsdyn.experiment import Experiment
from tsdyn.members import Members

#: Records of this many bytes are committed at the latest.
COMMIT_BYTES = 1 << 27


@dataclass(frozen=True)
class Cost:
    """What a run will take, estimated from shapes and a timed handful of steps.

    Attributes:
        members: Students trained side by side.
        parameters: Numbers a student has.
        memory: Bytes held at once.
        disk: Bytes of the finished archive.
        seconds: Wall time on this machine.
    """

    members: int
    parameters: int
    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.members} members of {self.parameters} parameters; about {self.memory / 1e6:.0f} MB of memory, "
            f"{self.disk / 1e6:.1f} MB of disk, {duration(self.seconds)}"
        )


def duration(seconds: float) -> str:
    """A time as one says it: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(experiment: Experiment, *, device: str = "cpu") -> Cost:
    """What `experiment` (one run, no sweep) will take; times a few steps and one measurement of one member."""
    layout, members = experiment.layout, len(experiment.seed_labels)
    flow = experiment.training.method == "flow"  # whose time an epoch is no sum of its steps'
    seeds = list(experiment.seed_labels[: 1 if flow else 8])
    few = experiment.replace({"seeds": seeds, "data.eval": min(512, experiment.data.eval)})
    steps = experiment.steps if flow else min(experiment.steps, 60)
    few = few.replace({"training.steps_per_epoch": steps})
    if isinstance(experiment.data.train, int) and not experiment.training.whole:
        few = few.replace({"data.train": min(experiment.data.train, max(512, experiment.training.batch))})
    memory.refuse_beyond("estimate", footprint(few), torch.device(device), "narrower networks, fewer samples")
    trial = Members(few, device)
    variables = schema.expand(experiment.record.observables)
    per_step = _quickest(lambda: trial.train(1)) / steps / trial.ensemble.members
    per_sample = _quickest(lambda: trial.measure(0, variables)) / trial.ensemble.members / few.data.eval
    recorded = len(experiment.schedule)
    seconds = members * (
        per_step * experiment.steps * experiment.training.epochs + per_sample * experiment.data.eval * recorded
    )
    train = None
    if isinstance(experiment.data.train, int) and isinstance(few.data.train, int):
        train = experiment.data.train * len(trial.train_probe(0, 0).inputs) // few.data.train
    parameters = sum(p[0].numel() for _, _, p in trial.ensemble.parameters())
    epoch = archive.bytes_per_epoch(layout, variables, experiment.dtype)
    return Cost(members, parameters, footprint(experiment, train=train), epoch * recorded, seconds)


def footprint(experiment: Experiment, *, train: int | None = None) -> int:
    """Bytes that a run of `experiment` holds at once, from shapes alone; nothing is drawn.

    The members' samples with the teacher's activations on them, parameters, moments and gradients; and the records of
    a segment three times: as measured, stacked, and as the file made of them.

    Args:
        experiment: One run, no sweep.
        train: Samples of a member's training set, where augmentation makes that another number than ``data.train``.
    """
    layout = experiment.layout
    if train is None:
        points = 2 * layout.input_width + 1 if experiment.data.augment == "agnostic" else 1
        train = points * experiment.data.train if isinstance(experiment.data.train, int) else 0
    samples = (train + experiment.data.eval) * (layout.input_width + 2 * sum(layout.teacher_widths))
    parameters = sum(n * (below + 1) for n, below in zip(layout.widths, layout.input_widths, strict=True))
    parameters += sum(
        n * (below + 1) for n, below in zip(layout.teacher_widths, layout.teacher_input_widths, strict=True)
    )
    numbers = len(layout.seeds) * (samples + 4 * parameters)
    if experiment.training.method == "flow":  # the Hessian of one member, its factors and what becomes of it
        numbers += 4 * sum(n * (below + 1) for n, below in zip(layout.widths, layout.input_widths, strict=True)) ** 2
    epoch = archive.bytes_per_epoch(layout, schema.expand(experiment.record.observables), experiment.dtype)
    whole = epoch * len(experiment.schedule)
    return numbers * np.dtype(experiment.dtype).itemsize + 3 * min(max(COMMIT_BYTES, epoch), whole)


def _quickest(work: Callable[[], object], *, times: int = 3) -> float:
    """Seconds of the quickest of a few calls: the first ones warm caches, others may be disturbed."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))
