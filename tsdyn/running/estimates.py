"""What a run will take, before anything is drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch

from tsdyn import memory, schema
from tsdyn.archive import netcdf
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.shapes import FLOW_END
from tsdyn.flow.flows import Flow, Limits
from tsdyn.flow.online_learning import PIECE_BYTES
from tsdyn.flow.stationary import CHUNK_BYTES as HESSIAN_BYTES
from tsdyn.observables import registry
from tsdyn.running.flow_members import FlowMembers
from tsdyn.running.members import Members
from tsdyn.running.online_members import OnlineMembers

#: Records of this many bytes are committed at the latest.
COMMIT_BYTES = 1 << 27
#: Steps of the integrator that a population flow takes, as the studies' flows do: a few hundred.
FLOW_STEPS = 300


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
    """What `experiment` (one run, no sweep) will take; times a few steps and one measurement."""
    registry.load(experiment)
    kind = experiment.kind
    if kind == "training":
        return _estimate_training(experiment, device)
    if kind == "population-flow":
        return _estimate_flow(experiment)
    if kind == "online":
        return _estimate_online(experiment)
    assert_never(kind)


def _estimate_flow(experiment: Experiment) -> Cost:
    """One step of the integrator and one Hessian of all members are timed; `FLOW_STEPS` are usual."""
    trial = FlowMembers(experiment)
    memory.refuse_beyond("estimate", footprint(experiment).bytes, torch.device("cpu"), "fewer seeds, smaller networks")
    begin = trial.flow.joined("y")
    limits = Limits(end=FLOW_END, steps=1)
    with torch.no_grad():
        per_step = _quickest(lambda: Flow(trial.loss, begin, times=np.zeros(0), limits=limits).until(math.inf))
    return _cost(experiment, trial.loss.parameters, FLOW_STEPS * per_step)


def _estimate_online(experiment: Experiment) -> Cost:
    """A few samples of all members are timed; every recorded α takes as many steps as there are from the last."""
    inputs = experiment.student_widths[0]
    steps = round(experiment.marks[-1] * inputs)
    few = min(steps, 200)
    memory.refuse_beyond("estimate", footprint(experiment).bytes, torch.device("cpu"), "fewer seeds, smaller networks")

    def once() -> None:
        OnlineMembers(experiment).simulation.until(few)

    with torch.no_grad():
        return _cost(experiment, experiment.student_widths[1] * (inputs + 1), _quickest(once) / few * steps)


def _cost(experiment: Experiment, parameters: int, seconds: float) -> Cost:
    found = footprint(experiment)
    return Cost(found.members, parameters, found.bytes, found.records, seconds)


def _estimate_training(experiment: Experiment, device: str) -> Cost:
    layout, members = experiment.layout, len(experiment.seed_labels)
    flow = experiment.training.method == "flow"  # whose time an epoch is no sum of its steps'
    seeds = list(experiment.seed_labels[: 1 if flow else 8])
    few = experiment.replace({"seeds": seeds, "data.eval": min(512, experiment.data.eval)})
    steps = experiment.steps if flow else min(experiment.steps, 60)
    few = few.replace({"training.steps_per_epoch": steps})
    if isinstance(experiment.data.train, int) and not experiment.training.whole:
        few = few.replace({"data.train": min(experiment.data.train, max(512, experiment.training.batch))})
    memory.refuse_beyond("estimate", footprint(few).bytes, torch.device(device), "narrower networks, fewer samples")
    trial = Members(few, device)
    variables = schema.expand(experiment.record.observables)
    per_step = _quickest(lambda: trial.advance(1)) / steps / trial.ensemble.members
    per_sample = _quickest(lambda: trial.measure(0, variables)) / trial.ensemble.members / few.data.eval
    recorded = len(experiment.schedule)
    seconds = members * (
        per_step * experiment.steps * experiment.training.epochs + per_sample * experiment.data.eval * recorded
    )
    train = None
    if isinstance(experiment.data.train, int) and isinstance(few.data.train, int):
        train = experiment.data.train * len(trial.train_probe(0, 0).inputs) // few.data.train
    parameters = sum(p[0].numel() for p in trial.ensemble.values.values())
    epoch = netcdf.bytes_per_epoch(layout, variables, experiment.dtype)
    return Cost(members, parameters, footprint(experiment, train=train).bytes, epoch * recorded, seconds)


@dataclass(frozen=True)
class Footprint:
    """What runs hold in memory, side by side if there are several: their sum.

    Attributes:
        members: Students of all of them.
        each: Bytes of the largest member, which all data are padded to.
        extra: Bytes of the one member that is worked on by itself.
        epoch: Bytes that all of them record an epoch.
        records: Bytes that all of them record.
    """

    members: int = 0
    each: int = 0
    extra: int = 0
    epoch: int = 0
    records: int = 0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.members + other.members,
            max(self.each, other.each),
            max(self.extra, other.extra),
            self.epoch + other.epoch,
            self.records + other.records,
        )

    @property
    def bytes(self) -> int:
        """All at once; the records of a segment three times: as measured, stacked, and as the file made of them."""
        return self.members * self.each + self.extra + 3 * min(max(COMMIT_BYTES, self.epoch), self.records)


def footprint(experiment: Experiment, *, train: int | None = None) -> Footprint:
    """What a run of `experiment` holds at once, from shapes alone; nothing is drawn.

    Of each member the samples with the teacher's trace on them, parameters, moments and gradients; of one the
    student's trace.

    Args:
        experiment: One run, no sweep.
        train: Samples of a member's training set, where augmentation makes that another number than ``data.train``.
    """
    kind = experiment.kind
    if kind == "training":
        return _footprint_training(experiment, train)
    if kind == "population-flow":
        return _footprint_flow(experiment)
    if kind == "online":
        return _footprint_online(experiment)
    assert_never(kind)


def _footprint_flow(experiment: Experiment) -> Footprint:
    """The paths of all, and of the members of one chunk Hessian, factor, gradient stages and what they are made of."""
    inputs, nodes, outputs = experiment.student_widths
    parameters, labels = nodes * (inputs + outputs), len(experiment.labels)
    epoch, once = _records(experiment)
    at_once = max(HESSIAN_BYTES, 8 * parameters**2)
    return Footprint(
        len(experiment.seed_labels), 8 * parameters * (labels + 12), 6 * at_once, epoch, epoch * labels + once
    )


def _footprint_online(experiment: Experiment) -> Footprint:
    """Weights of student and teacher, and the samples of one piece three times: drawn, stacked and seen."""
    inputs, nodes, _ = experiment.student_widths
    epoch, once = _records(experiment)
    each = 8 * inputs * (3 * nodes + 2 * experiment.teacher_widths[1])
    return Footprint(len(experiment.seed_labels), each, 3 * PIECE_BYTES, epoch, epoch * len(experiment.labels) + once)


def _records(experiment: Experiment) -> tuple[int, int]:
    """Bytes that all members record of one step, and once."""
    names = experiment.recorded()
    layout, dtype = experiment.layout, np.dtype(experiment.dtype)
    numbers = sum(
        math.prod(layout.block(variable, layer))
        for variable in (schema.variable(name) for name in names if schema.variable(name).when != "along")
        for layer in (range(1, layout.depth + 1) if variable.layered else (None,))
    )
    return netcdf.bytes_per_epoch(layout, names, experiment.dtype), numbers * len(layout.seeds) * dtype.itemsize


def _footprint_training(experiment: Experiment, train: int | None) -> Footprint:
    layout = experiment.layout
    if train is None:
        points = 2 * layout.input_width + 1 if experiment.data.augment == "agnostic" else 1
        train = points * experiment.data.train if isinstance(experiment.data.train, int) else 0
    taught, own = (
        _trace_numbers(experiment, widths) for widths in (experiment.teacher.active_widths, experiment.student_widths)
    )
    parameters = layout.entries or _parameters(layout.widths, layout.input_widths)
    each = (train + experiment.data.eval) * (_inputs(experiment) + taught)
    each += 4 * (
        parameters + (layout.teacher_entries or _parameters(layout.teacher_widths, layout.teacher_input_widths))
    )
    extra = max(train, experiment.data.eval) * own * 3 // 2  # while a trace is made, some of it is there twice
    if experiment.training.method == "flow":  # the Hessian of one member, its factors and what becomes of it
        extra += 4 * parameters**2
    size = np.dtype(experiment.dtype).itemsize
    epoch = netcdf.bytes_per_epoch(layout, schema.expand(experiment.record.observables), experiment.dtype)
    return Footprint(len(layout.seeds), each * size, extra * size, epoch, epoch * len(experiment.schedule))


def _parameters(widths: Sequence[int], input_widths: Sequence[int]) -> int:
    return sum(n * (below + 1) for n, below in zip(widths, input_widths, strict=True))


def _inputs(experiment: Experiment) -> int:
    return math.prod(experiment.image) if experiment.image else experiment.layout.input_width


def _trace_numbers(experiment: Experiment, widths: Sequence[int]) -> int:
    """Of one sample: pre-activations, gates, activations, and these standardised; of a channel one a pixel."""
    # what a linear layer put on top of them would see
    seen = [experiment.weight_shapes((*widths[: i + 1], 1))[-1][1] for i in range(1, len(widths) - 1)]
    return 4 * (sum(seen) + widths[-1])


def _quickest(work: Callable[[], object], *, times: int = 3) -> float:
    """Seconds of the quickest of a few calls: the first ones warm caches, others may be disturbed."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))
