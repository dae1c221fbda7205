"""How wide the networks of an experiment are, and when they are recorded.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

import numpy as np

from tsdyn import schema, vocabulary
from tsdyn.experiment.parts import IMAGES, Student, Teacher

if TYPE_CHECKING:
    from tsdyn.experiment.experiment import Experiment

#: What is recorded of single samples is of the first samples of the evaluation set, at most this many.
SAMPLES = 64
_PAIRED = (
    "over the evaluation set, positions of convolutions and tokens count as samples; hidden layer l with the teacher's "
    "hidden layer l, both counted from the lowest; NaN at the output layer and where one of them has no such layer"
)
#: A population flow stops at this time at the latest, also where a student has not reached a stationary point.
FLOW_END = 1e9
#: Times at which a population flow is also committed, between the recorded ones.
DECADES = tuple(10.0**power for power in range(-2, 10))
#: α of the first recorded point of online learning after the start.
FIRST_ALPHA = 0.1


def with_inputs(experiment: Experiment, widths: Sequence[int]) -> tuple[int, ...]:
    """`widths`, the first replaced by the input width of the experiment's kind (`flow.inputs`, `online.inputs`)."""
    inputs = {"training": None, "population-flow": experiment.flow.inputs, "online": experiment.online.inputs}
    given = inputs[experiment.kind]
    return (widths[0] if given is None else given, *widths[1:])


def teacher_widths(experiment: Experiment) -> tuple[int, ...]:
    """Widths of the teacher after pruning: input, hidden ..., output."""
    return with_inputs(experiment, experiment.teacher.active_widths)


def student_widths(experiment: Experiment) -> tuple[int, ...]:
    """Widths of the student: input, hidden ..., output; only input and output for a module of the user's own."""
    if experiment.student.module is not None:
        return experiment.teacher.widths[0], experiment.teacher.widths[-1]
    if experiment.student.widths is not None:
        return with_inputs(experiment, experiment.student.widths)
    first, *hidden, last = teacher_widths(experiment)
    ratio = experiment.student.overrealization or 1.0
    return (first, *(max(1, round(m * ratio)) for m in hidden), last)


def image(experiment: Experiment) -> tuple[int, int, int] | None:
    """(channel, row, column) of an input of a convolution; None without convolutions."""
    return (experiment.data.image or IMAGES[experiment.data.law]) if experiment.teacher.convolution else None


def weight_shapes(experiment: Experiment, widths: Sequence[int]) -> list[tuple[int, ...]]:
    """Weight shapes of a network of these widths: (node, input_node), or those of 3 x 3 convolutions."""
    teacher = experiment.teacher
    return schema.weight_shapes(widths, image(experiment), stride=teacher.stride, padding=teacher.padding)


def points_per_sample(experiment: Experiment) -> int:
    """How many training samples one drawn sample becomes, where that is known before the data are."""
    match experiment.data.augment:
        case "agnostic":
            return 2 * experiment.teacher.widths[0] + 1
        case "aware":  # a sample near no boundary stays one
            return 1
        case "none" | "crop-flip":
            return 1
        case other:
            assert_never(other)


def along(experiment: Experiment) -> vocabulary.Path:
    """The dimension along which a run is recorded: ``epoch``, ``time`` or ``alpha``."""
    kind = experiment.kind
    if kind == "training":
        return "epoch"
    if kind == "population-flow":
        return "time"
    if kind == "online":
        return "alpha"
    assert_never(kind)


def layout(experiment: Experiment) -> schema.Layout:
    """Seeds, recorded labels and widths of the run: what decides the shapes of its variables."""
    if experiment.of_own_modules:
        return _layout_of_modules(experiment)
    widths, taught = student_widths(experiment), teacher_widths(experiment)
    shapes = weight_shapes(experiment, widths)
    parameters = sum(shape[0] * (math.prod(shape[1:]) + 1) for shape in shapes)
    return schema.Layout(
        experiment.seed_labels,
        widths[0],
        widths[1:],
        taught[1:],
        experiment.record.quantiles,
        min(experiment.record.eigenvalues, parameters),
        tuple(math.prod(shape[1:]) for shape in shapes),
        tuple(math.prod(shape[1:]) for shape in weight_shapes(experiment, taught)),
        path=along(experiment),
        extra=_sampled(experiment),
    )


def _layout_of_modules(experiment: Experiment) -> schema.Layout:
    """The layout where a network is a module: its output is the top layer, and the layers below have width 0."""
    inputs, outputs = experiment.teacher.widths[0], experiment.teacher.widths[-1]
    own = experiment.student.module is not None
    mine, theirs = student_widths(experiment), teacher_widths(experiment)
    depths = {
        who: len(part.shapes or (outputs,)) if part.module is not None else len(widths) - 1
        for who, part, widths in (("own", experiment.student, mine), ("taught", experiment.teacher, theirs))
    }
    depth = max(depths.values())

    def padded(sizes: Sequence[int]) -> tuple[int, ...]:
        return (*sizes, *(0 for _ in range(depth - len(sizes))))

    def at_layers(part: Student | Teacher, widths: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and lengths of weight rows; of a module without labelled layers the output alone, at the top."""
        if part.module is None:
            return padded(widths[1:]), padded(widths[:-1])
        if part.shapes is None:
            return (*(0 for _ in range(depth - 1)), outputs), (0,) * depth
        return padded([n for n, _ in part.shapes]), padded([below for _, below in part.shapes])

    nodes, fan_ins = at_layers(experiment.student, mine)
    teacher_nodes, teacher_fan_ins = at_layers(experiment.teacher, theirs)
    parameters = sum(shape[0] * (math.prod(shape[1:]) + 1) for shape in weight_shapes(experiment, mine))
    numbers = experiment.student.numbers or 0
    return schema.Layout(
        experiment.seed_labels,
        inputs,
        nodes,
        teacher_nodes,
        experiment.record.quantiles,
        min(experiment.record.eigenvalues, numbers if own else parameters),
        fan_ins,
        teacher_fan_ins,
        numbers,
        experiment.teacher.numbers or 0,
        extra=_sampled(experiment),
        layer_names=experiment.student.layers or (),
        comments=tuple((name, _PAIRED) for name in ("correlation", "A", "L_star", "D_star", "H_star")),
    )


def _sampled(experiment: Experiment) -> tuple[tuple[str, int], ...]:
    """Sizes of ``sample``, ``sample_2`` and ``output`` where something is recorded of single samples."""
    if not {"neural_tangent_kernel", "jacobian"} & set(experiment.record.observables):
        return ()
    samples = min(SAMPLES, experiment.data.eval)
    return ("sample", samples), ("sample_2", samples), ("output", experiment.teacher.widths[-1])


def marks(experiment: Experiment) -> tuple[vocabulary.Label, ...]:
    """Epochs, times or α at which a run can be committed and resumed: one for each of its steps 0, 1, ..."""
    kind = experiment.kind
    if kind == "training":
        return tuple(range(experiment.training.epochs + 1))
    if kind == "population-flow":
        times = experiment.flow.times
        recorded = () if times is None else np.geomspace(times.first, times.last, times.number).tolist()
        after = recorded[-1] if recorded else 0.0
        return (0.0, *recorded, *(time for time in DECADES if time > after)) if after < FLOW_END else (0.0, *recorded)
    if kind == "online":
        online, inputs = experiment.online, student_widths(experiment)[0]
        steps = np.round(np.geomspace(FIRST_ALPHA, online.last, online.points) * inputs)
        return (0.0, *(np.unique(steps.clip(1)) / inputs).tolist())
    assert_never(kind)


def schedule(experiment: Experiment) -> tuple[int, ...]:
    """The steps after which a run is recorded."""
    kind = experiment.kind
    if kind == "training":
        schedule = experiment.record.schedule(experiment.training.epochs)
        if experiment.fork.parent is None:
            return schedule
        start = experiment.fork.fork_epoch
        return tuple(sorted({start, *(epoch for epoch in schedule if epoch > start)}))
    if kind == "population-flow":
        times = experiment.flow.times
        return tuple(range(1 if times is None else 1 + times.number))
    if kind == "online":
        return tuple(range(len(marks(experiment))))
    assert_never(kind)
