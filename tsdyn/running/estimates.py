"""Estimates of the memory, disk and time that a run will take, before anything is drawn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch

from tsdyn import memory, schema
from tsdyn.archive import netcdf
from tsdyn.engine import compiled_sums, native
from tsdyn.experiment import shapes
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.shapes import FLOW_END
from tsdyn.flow.flows import Flow
from tsdyn.flow.online_learning import PIECE_BYTES
from tsdyn.flow.stationary import CHUNK_BYTES as HESSIAN_BYTES
from tsdyn.flow.steps import Limits
from tsdyn.networks.network import PASS_BYTES
from tsdyn.observables import registry
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running.flow_members import FlowMembers
from tsdyn.running.members import Members
from tsdyn.running.online_members import OnlineMembers
from tsdyn.running.words import duration

#: Once the records in memory hold this many bytes, they are committed.
COMMIT_BYTES = 1 << 27
#: The HDF5 library keeps about this many bytes beside a file that it makes in memory.
FILE_CACHE = 75 << 20
#: What describes a variable takes about this many bytes of a file.
HEADER_BYTES = 6 << 10
#: Trials that take fewer seconds are repeated with more steps and samples, over which their fixed costs spread.
QUICK = 0.1
#: Multiply-adds of one timed call at most, some seconds of a core: of large networks fewer steps and members are timed.
TRIAL_WORK = 1e11
#: Steps of the first trial; most members of a trial, of a run by itself and of runs that train together.
TRIAL_STEPS = 60
ALONE, TOGETHER = 8, 40
#: Samples to train on and to measure of the first trial.
FEW_SAMPLES = 512
#: Multiply-adds per second of a slow core.
RATE = 1e10
#: Seconds after which a trial is not repeated a second time, and not at all.
_ENOUGH, _LONG = 5.0, 20.0
#: Integrator steps assumed for a population flow of one node and of more: the studies' slowest seeds take 37 to 94, 61
#: on average, and 80 to 160.
FLOW_STEPS = (60, 120)
#: Seconds for what a population flow is compared with at its end, and for committing it.
FLOW_END_SECONDS = 0.4


#: Variables that `compiled_sums` give, without a trace; and those that need a trace on evaluation samples at most.
_SUMS = frozenset({"mse_train", "mse_eval", "correlation"})
_ON_EVAL = _SUMS | {"fanout_norm", "accuracy", "label_accuracy", "weight", "bias"}
#: Variables for which outputs on training samples are enough, which networks make in pieces.
_BY_OUTPUTS = _ON_EVAL | {"loss_train", "loss_eval", "cross_correlation", "cka", *schema.expand(["batch_norm"])}
#: Variables that are measured on evaluation samples alone.
_EVAL_ALONE = _ON_EVAL - {"mse_train"}


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a run, from shapes and a few timed steps.

    Attributes:
        members: Students trained side by side.
        parameters: Number of parameters of a student.
        memory: Largest number of bytes in memory at once, with what this process takes before it begins.
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


def estimate(experiment: Experiment, *, device: str = "cpu", together: int = 1) -> Cost:
    """The estimated cost of `experiment` (one run, no sweep); times a few steps and one measurement.

    Args:
        experiment: One run.
        device: Where it runs.
        together: How many runs of this shape train as one ensemble, in which a member's step takes less time.
    """
    registry.load(experiment)
    kind = experiment.kind
    if kind == "training":
        return _estimate_training(experiment, device, together)
    if kind == "population-flow":
        return _estimate_flow(experiment)
    if kind == "online":
        return _estimate_online(experiment)
    assert_never(kind)


def trial_seconds(experiment: Experiment) -> float:
    """Return roughly how many seconds `estimate` takes: what is set up, and the multiply-adds of what is timed."""
    steps = TRIAL_STEPS * min(ALONE, len(experiment.seed_labels))
    work = 3 * multiply_adds(experiment) * experiment.training.batch * steps
    return 0.1 + 3 * min(work, TRIAL_WORK) / RATE


def _estimate_flow(experiment: Experiment) -> Cost:
    """The cost of a population flow of `FLOW_STEPS` steps; one step and one Hessian of all members are timed."""
    steps = FLOW_STEPS[experiment.student_widths[1] > 1]
    trial = FlowMembers(experiment)
    memory.refuse_beyond("estimate", footprint(experiment).bytes, torch.device("cpu"), "fewer seeds, smaller networks")
    begin = trial.flow.joined("y")
    limits = Limits(end=FLOW_END, steps=1)
    with torch.no_grad():
        per_step = quickest(lambda: Flow(trial.loss, begin, times=np.zeros(0), limits=limits).until(math.inf))
    return _cost(experiment, trial.loss.parameters, FLOW_END_SECONDS + steps * per_step, trial.state())


def _estimate_online(experiment: Experiment) -> Cost:
    """The cost of an online run: a few steps of all members are timed, and there are α · N of them."""
    inputs = experiment.student_widths[0]
    steps = round(experiment.marks[-1] * inputs)
    few = min(steps, 2_000)  # of fewer, drawing the start would be the larger part
    memory.refuse_beyond("estimate", footprint(experiment).bytes, torch.device("cpu"), "fewer seeds, smaller networks")

    def once() -> None:
        OnlineMembers(experiment).simulation.until(few)

    parameters = experiment.student_widths[1] * (inputs + 1)
    with torch.no_grad():
        seconds = quickest(once) / few * steps
        return _cost(experiment, parameters, seconds, OnlineMembers(experiment).state())


def _cost(experiment: Experiment, parameters: int, seconds: float, state: Mapping[str, np.ndarray]) -> Cost:
    found = footprint(experiment)
    disk = _disk(experiment, {}, sum(array.nbytes for array in state.values()))
    return Cost(found.members, parameters, memory.resident() + found.bytes, disk, seconds)


def _disk(experiment: Experiment, depths: Mapping[str, int], state: int) -> int:
    """Bytes of the archive: records in their chunks, the `state` from which it can go on, and what describes them.

    Args:
        experiment: One run.
        depths: Number of layers that are written, of variables with layers.
        state: Bytes of the state.
    """
    names = experiment.recorded()
    stored = netcdf.stored_bytes(experiment.layout, names, experiment.dtype, len(experiment.labels), depths=depths)
    return stored + state + HEADER_BYTES * len(names)


def _estimate_training(experiment: Experiment, device: str, together: int) -> Cost:
    members, before = len(experiment.seed_labels), memory.resident()
    trial, per_step, per_sample = _timed(experiment, device, steps=TRIAL_STEPS, train=FEW_SAMPLES, samples=FEW_SAMPLES)
    if together > 1 or per_step * trial.experiment.steps * trial.ensemble.members < QUICK:
        _, per_step, _ = _timed(experiment, device, steps=600, train=16_384, samples=16, together=together)
    if per_sample * _measured_on(trial) * trial.ensemble.members < QUICK:
        _, _, per_sample = _timed(experiment, device, steps=1, train=512, samples=4096)
    per_epoch = per_step * experiment.steps
    recorded = len(experiment.schedule)
    train, tried, measured = None, trial.experiment.data.train, experiment.data.eval
    if isinstance(experiment.data.train, int) and isinstance(tried, int):
        train = experiment.data.train * len(trial.train_probe(0, 0).inputs) // tried
    if _measured_on(trial) > trial.experiment.data.eval:
        measured += experiment.data.eval if train is None else train  # of new samples as many as of evaluation
    seconds = per_epoch * experiment.training.epochs + per_sample * measured * recorded
    seconds = members * (seconds + _teaching(experiment))
    parameters = sum(p[0].numel() for p in trial.ensemble.values.values())
    written = trial.measure(0, schema.expand(experiment.record.observables)) | trial.constants()
    depths = {name: len(values) for name, values in written.items() if isinstance(values, list)}
    state = sum(array.nbytes for array in trial.state().values()) * members // trial.ensemble.members
    most = before + footprint(experiment, train=train, traced=_traced(trial, experiment)).bytes
    return Cost(members, parameters, most, _disk(experiment, depths, state), seconds)


def multiply_adds(experiment: Experiment) -> int:
    """Return the multiply-adds of one sample's pass through a student; 0 for one's own module, which is not known."""
    if experiment.student.module is not None or experiment.kind != "training":
        return 0
    widths, total = experiment.student_widths, 0
    for layer, shape in enumerate(experiment.weight_shapes(widths), start=1):
        flat = shape[0] if len(shape) == 2 else experiment.weight_shapes((*widths[: layer + 1], 1))[-1][1]
        total += math.prod(shape[1:]) * flat
    return total


def _measured_on(trial: Members) -> int:
    """Samples on which a member is measured: those of evaluation, and of training unless no variable needs them."""
    names = set(schema.expand(trial.experiment.record.observables))
    return trial.experiment.data.eval + (0 if names <= _EVAL_ALONE else len(trial.train_probe(0, 0).inputs))


def _traced(trial: Members, experiment: Experiment) -> int | None:
    """Samples on which a student's trace is needed to measure it, where `compiled_sums` serve; None: all there are."""
    names = set(schema.expand(experiment.record.observables))
    if trial.student is not None or not names <= _ON_EVAL:
        return None
    if not compiled_sums.serves(trial.ensemble.network(0), trial.eval_probes[0].inputs):
        return None
    return 0 if names <= _SUMS else experiment.data.eval


def _teaching(experiment: Experiment) -> float:
    """Seconds that a teacher of ``init = "trained"`` takes to be trained; 0 for others.  One or a few epochs are timed.

    The nodes that ``prune`` removes are counted in the epochs after it, too.
    """
    teacher, train = experiment.teacher, experiment.data.train
    if teacher.init != "trained" or not isinstance(train, int):
        return 0.0
    batch = experiment.training.batch
    few = experiment.replace({"seeds": 1, "data.train": min(train, 16 * batch), "teacher.prune": []})
    seed = few.seed_labels[0]
    short, long = (few.replace({"teacher.train_epochs": epochs}) for epochs in (1, 4))
    one = quickest(lambda: draw_teacher(short, seed), times=2)
    four = quickest(lambda: draw_teacher(long, seed), times=2)
    epochs = teacher.train_epochs + (teacher.finetune_epochs if teacher.prune else 0)
    return max(0.0, four - one) / 3 * epochs * (train // batch) / (min(train, 16 * batch) // batch)


def _timed(
    experiment: Experiment, device: str, *, steps: int, train: int, samples: int, together: int = 1
) -> tuple[Members, float, float]:
    """A few members with fewer samples to `train` on and to measure; their seconds per step and per measured sample."""
    flow = experiment.training.method == "flow"  # an epoch of it is integrated as a whole, not step by step
    each = multiply_adds(experiment)
    fit = max(1, int(TRIAL_WORK / max(1, 3 * each * experiment.training.batch)))  # steps of a member
    members = min(1 if flow else ALONE if together == 1 else TOGETHER, fit, together * len(experiment.seed_labels))
    steps = experiment.steps if flow else min(experiment.steps, steps, max(1, fit // members))
    samples = min(samples, max(experiment.training.batch, int(TRIAL_WORK / max(1, each * members))))
    own = experiment.seed_labels
    seeds = own[:members] if members <= len(own) else range(members)
    changed = {"seeds": list(seeds), "training.steps_per_epoch": steps}
    few = experiment.replace(changed | {"data.eval": min(samples, experiment.data.eval)})
    if few.teacher.init == "trained":  # how long teachers are trained does not change what a step of a student takes
        few = few.replace({"teacher.train_epochs": 1, "teacher.finetune_epochs": 0})
    if isinstance(experiment.data.train, int) and not experiment.training.whole:
        few = few.replace({"data.train": min(experiment.data.train, max(train, experiment.training.batch))})
    memory.refuse_beyond("estimate", footprint(few).bytes, torch.device(device), "narrower networks, fewer samples")
    trial = Members(few, device)
    variables = schema.expand(experiment.record.observables)
    per_step = quickest(lambda: trial.advance(1)) / steps / trial.ensemble.members
    per_sample = quickest(lambda: trial.measure(0, variables)) / trial.ensemble.members / _measured_on(trial)
    return trial, per_step, per_sample


@dataclass(frozen=True)
class Footprint:
    """Bytes that a run holds in memory; the sum of two footprints is that of both runs side by side.

    Attributes:
        members: Number of students.
        each: Bytes per member, of the largest one, to which all data are padded.
        extra: Further bytes for the one member that is worked on at a time.
        epoch: Bytes of the records of all members per epoch.
        records: Bytes of the records of all members in all epochs.
        padded: Bytes of a segment's file per byte of its records.
    """

    members: int = 0
    each: int = 0
    extra: int = 0
    epoch: int = 0
    records: int = 0
    padded: float = 1.0

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(
            self.members + other.members,
            max(self.each, other.each),
            max(self.extra, other.extra),
            self.epoch + other.epoch,
            self.records + other.records,
            max(self.padded, other.padded),
        )

    @property
    def bytes(self) -> int:
        """Total bytes.

        Those of a segment count as stacked, and as they were measured or in the file made of them, which grows by a
        quarter at a time, with the library's caches.
        """
        segment = min(max(COMMIT_BYTES, self.epoch), self.records)
        written = round(1.25 * self.padded * segment) + min(segment, FILE_CACHE)
        return self.members * self.each + self.extra + segment + max(segment, written)


def footprint(experiment: Experiment, *, train: int | None = None, traced: int | None = None) -> Footprint:
    """The memory that a run of `experiment` holds, from shapes alone; nothing is drawn.

    For each member these are the samples with the teacher's trace on them, parameters, moments and gradients; for one
    member at a time also the student's trace.  Traces on training samples that are larger than `PASS_BYTES` are made in
    pieces of that size, of which only outputs remain, where these are enough (`_BY_OUTPUTS`).

    Args:
        experiment: One run, no sweep.
        train: Samples of a member's training set, if augmentation changes their number from ``data.train``.
        traced: Samples on which a student's trace is needed to measure it; None: all there are.
    """
    registry.load(experiment)  # a package's observables are declared when they are loaded
    kind = experiment.kind
    if kind == "training":
        return _footprint_training(experiment, train, traced)
    if kind == "population-flow":
        return _footprint_flow(experiment)
    if kind == "online":
        return _footprint_online(experiment)
    assert_never(kind)


def _footprint_flow(experiment: Experiment) -> Footprint:
    """Trajectories of all members; Hessian, factors and gradient stages of those whose Hessians are made at once."""
    inputs, nodes, outputs = experiment.student_widths
    parameters, labels = nodes * (inputs + outputs), len(experiment.labels)
    epoch, once = _records(experiment)
    padded = _padded(experiment)
    at_once = max(HESSIAN_BYTES, 8 * parameters**2)
    return Footprint(
        len(experiment.seed_labels), 8 * parameters * (labels + 12), 6 * at_once, epoch, epoch * labels + once, padded
    )


def _footprint_online(experiment: Experiment) -> Footprint:
    """Weights of student and teacher; and the samples drawn at once, three times: drawn, stacked and in use."""
    inputs, nodes, _ = experiment.student_widths
    epoch, once = _records(experiment)
    each = 8 * inputs * (3 * nodes + 2 * experiment.teacher_widths[1]) + 3 * PIECE_BYTES
    return Footprint(
        len(experiment.seed_labels),
        each,
        0,
        epoch,
        epoch * len(experiment.labels) + once,
        _padded(experiment),
    )


def _records(experiment: Experiment) -> tuple[int, int]:
    """Bytes that all members record at each step, and bytes that they record once."""
    names = experiment.recorded()
    layout, dtype = experiment.layout, np.dtype(experiment.dtype)
    numbers = sum(
        math.prod(layout.block(variable, layer))
        for variable in (schema.variable(name) for name in names if schema.variable(name).when != "along")
        for layer in (range(1, layout.depth + 1) if variable.layered else (None,))
    )
    return netcdf.bytes_per_epoch(layout, names, experiment.dtype), numbers * len(layout.seeds) * dtype.itemsize


def _footprint_training(experiment: Experiment, train: int | None, traced: int | None) -> Footprint:
    layout = experiment.layout
    if train is None:
        drawn = experiment.data.train
        train = shapes.points_per_sample(experiment) * drawn if isinstance(drawn, int) else 0
    taught, own = (
        _trace_numbers(experiment, widths) for widths in (experiment.teacher.active_widths, experiment.student_widths)
    )
    standard = _hidden(experiment, experiment.teacher.active_widths)  # activations, on evaluation samples only
    parameters = layout.entries or _parameters(layout.widths, layout.input_widths)
    own += _hidden(experiment, experiment.student_widths)
    held, teaching = _on_training(experiment, train, taught)
    _, measuring = _on_training(experiment, train, own)
    each = (train + experiment.data.eval) * _inputs(experiment) + held + experiment.data.eval * (taught + standard)
    each += train * (_inputs(experiment) + experiment.student_widths[-1])  # all members' samples in one array
    each += 4 * (
        parameters + (layout.teacher_entries or _parameters(layout.teacher_widths, layout.teacher_input_widths))
    )
    # while a trace is computed, half of it exists twice
    extra = (max(measuring, experiment.data.eval * own) if traced is None else traced * own) * 3 // 2
    extra += 0 if held == teaching else teaching * 3 // 2
    if experiment.training.method == "flow":  # the Hessian of one member, its factors and temporaries
        extra += 4 * parameters**2
    size = np.dtype(experiment.dtype).itemsize
    epoch = netcdf.bytes_per_epoch(layout, schema.expand(experiment.record.observables), experiment.dtype)
    records = epoch * len(experiment.schedule)
    extra = extra * size + _turned(experiment, train)
    return Footprint(len(layout.seeds), each * size, extra, epoch, records, _padded(experiment))


def _turned(experiment: Experiment, train: int) -> int:
    """Bytes of all members' data that are held turned where their sums are made often (`compiled_sums.Pass.turn`)."""
    uncompiled = experiment.student.module is not None or experiment.image is not None
    summed = _SUMS | {"loss_train", "loss_eval"}
    if uncompiled or len(experiment.schedule) < compiled_sums.OFTEN or summed.isdisjoint(experiment.recorded()):
        return 0
    dtype = getattr(torch, experiment.dtype)
    rows = [native.padded(n, dtype) for n in (_inputs(experiment) + 1, experiment.student_widths[-1])]
    compared = [native.padded(n, dtype) for n in experiment.teacher.active_widths[1:-1]]
    numbers = (train * sum(rows), experiment.data.eval * sum(rows + compared))
    each = len(experiment.layout.seeds) * dtype.itemsize
    return sum(min(each * n, compiled_sums.TURNED) for n in numbers)


def _on_training(experiment: Experiment, train: int, numbers: int) -> tuple[int, int]:
    """Numbers that remain of a trace on the training samples, `numbers` of each, and those held while it is made."""
    outputs_are_enough = set(schema.expand(experiment.record.observables)) <= _BY_OUTPUTS
    networks = experiment.student.module is None and experiment.teacher.module is None
    most = PASS_BYTES // np.dtype(experiment.dtype).itemsize
    if train * numbers <= most or not (outputs_are_enough and networks):
        return train * numbers, train * numbers
    return train * experiment.student_widths[-1], most


def _padded(experiment: Experiment) -> float:
    """Bytes of the file of a segment per byte of its records."""
    layout, names = experiment.layout, experiment.recorded("along")
    epoch = netcdf.bytes_per_epoch(layout, names, experiment.dtype)
    if not epoch:
        return 1.0
    epochs = min(max(1, -(-COMMIT_BYTES // epoch)), max(1, len(experiment.schedule)))
    return netcdf.stored_bytes(layout, names, experiment.dtype, epochs) / (epochs * epoch)


def _parameters(widths: Sequence[int], input_widths: Sequence[int]) -> int:
    return sum(n * (below + 1) for n, below in zip(widths, input_widths, strict=True))


def _inputs(experiment: Experiment) -> int:
    return math.prod(experiment.image) if experiment.image else experiment.layout.input_width


def _trace_numbers(experiment: Experiment, widths: Sequence[int]) -> int:
    """Numbers in the trace of one sample: pre-activations, gates and activations; of a plain output layer two."""
    return 3 * _hidden(experiment, widths) + (3 if experiment.deep else 2) * widths[-1]


def _hidden(experiment: Experiment, widths: Sequence[int]) -> int:
    """Hidden nodes of a network; a channel counts once per pixel: so many inputs a linear layer on top would have."""
    return sum(experiment.weight_shapes((*widths[: i + 1], 1))[-1][1] for i in range(1, len(widths) - 1))


def quickest(work: Callable[[], object], *, times: int = 3) -> float:
    """Seconds of the quickest of a few calls: the first ones warm caches, and others may be disturbed."""
    taken: list[float] = []
    while len(taken) < times and sum(taken) < (_ENOUGH if len(taken) > 1 else _LONG):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)
