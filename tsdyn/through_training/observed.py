"""Observables that are differentiated through training: numbers of one member at the end of its course.

Each is a smooth function of the state, or a mean of maxima over nodes of smooth ones, whose change of winner counts as
a gate.  Counts, ranks and thresholds have no derivative and are refused, with the smooth observable to ask for instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from tsdyn.engine.ensemble import Named, network_of
from tsdyn.engine.loss import Loss
from tsdyn.experiment.errors import ExperimentError, nearest
from tsdyn.experiment.experiment import Experiment
from tsdyn.labelled.arrays import DifferentiableArray, wrap
from tsdyn.networks.any_module import Own, called_with
from tsdyn.networks.network import Network
from tsdyn.observables.formulas import correlation as correlation_of
from tsdyn.through_training.steps import Kind, OwnModule, forward

#: A function of the student, or of a Dataset of it (`_dataset`), that gives one number with a gradient.
Function: TypeAlias = Callable[[Any], Tensor]
#: What is asked for: a name, a name with labels, or a function.
Of: TypeAlias = str | tuple[str, Mapping[str, int]] | Function


@dataclass(frozen=True)
class Student:
    """One member at the end of its course, with the data that it is measured on; all in float64.

    Attributes:
        kind: A network or a module of the user's own.
        values, buffers: Of this member alone.
        teacher: The teacher, whose parameters may require a gradient.
        inputs, classes: Of the evaluation set; the data's own labels, if the loss is of those.
        train: Inputs and targets of the training set, if it is finite.
        loss: The loss that is trained.
    """

    kind: Kind
    values: Named
    buffers: Named
    teacher: Network | Own
    inputs: Tensor
    classes: Tensor | None
    train: tuple[Tensor, Tensor] | None
    loss: Loss

    def traced(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Output, (sample, output), and activations of hidden layers, (sample, node), in evaluation mode."""
        if isinstance(self.kind, OwnModule):
            module = self.kind.module
            was = module.training
            module.eval()
            try:
                return called_with(module, {**self.values, **self.kind.fixed}, (x,)), []
            finally:
                module.train(was)
        values, buffers = ({n: t.unsqueeze(0) for n, t in held.items()} for held in (self.values, self.buffers))
        output, _, _, active = forward(self.kind, values, buffers, x.unsqueeze(0), training=False)
        return output[0], [f[0] if f.ndim == 3 else f[0].permute(0, 2, 3, 1).flatten(0, 2) for f in active]

    @property
    def network(self) -> Any:
        """The student as a value whose tensors carry the gradient; BatchNorm is folded into the layers beside it."""
        if isinstance(self.kind, OwnModule):
            raise ExperimentError(
                "sensitivity: of = a function: is called with a tsdyn.Network, and this student is a module of your "
                "own; ask for loss_eval"
            )
        made = network_of(self.kind, self.values, self.buffers)
        return made if not self.buffers else made.folded()


@dataclass(frozen=True)
class Observed:
    """An observable as it was asked for.

    Attributes:
        text: How it is named in the result.
        scores: Student → the numbers of which `value` is made: itself alone, (1, 1), or one (row, candidate) for each
            maximum.
        maximum: Whether the value is the mean over rows of the largest candidate.
        teaches: Whether it depends on the teacher, beside the student.
        samples: The data that it is measured on; None for none, or if that is not known.
        depth: How many hidden layers' activations enter; None for all.
    """

    text: str
    scores: Callable[[Student], Tensor]
    maximum: bool = False
    teaches: bool = True
    samples: Literal["evaluation", "train"] | None = None
    depth: int | None = None

    def value(self, student: Student) -> Tensor:
        """The observable of one member, a number."""
        scores = self.scores(student)
        if not self.maximum:
            return scores.reshape(())
        there = ~scores.detach().isnan()
        rows = there.any(1)
        best = torch.where(there, scores, -torch.inf)[rows].amax(1)
        return best.mean()


#: What has no derivative, and what to ask for in its place.
STEPPED: Mapping[str, str] = {
    "accuracy": "loss_eval",
    "label_accuracy": "loss_eval",
    "observation": "('correlation', {...})",
    "observation_count": "('correlation', {...})",
    **dict.fromkeys(
        [
            "success_rate", "success_interval", "recovered", "recovery_epoch", "recovery_class", "mean_rank",
            "median_rank", "coverage", "match_counts",
        ],
        "mean_specialization",
    ),
    **dict.fromkeys(["matched_correlation", "partner", "node_order"], "('best_correlation', {...})"),
    **dict.fromkeys(
        ["winner", "winner_rank", "settled_epoch", "rewind_mask", "best_node", "aligned"], "('correlation', {...})"
    ),
    **dict.fromkeys(["dead", "silent"], "('fanout_norm', {...})"),
    **dict.fromkeys(["stop_epoch", "death_epoch"], "loss_eval"),
}  # fmt: skip


def observed(of: Of, experiment: Experiment) -> Observed:
    """The observable that `of` names.

    Raises:
        ExperimentError: for a name that is none, labels that the run does not have, or a count or rank, which has no
            derivative; names what to ask for instead.
    """
    if callable(of):
        return Observed(
            getattr(of, "__name__", type(of).__name__), lambda student: _called(of, student), teaches=False,
            samples="evaluation" if _takes_dataset(of) else None,
        )  # fmt: skip
    name, labels = (of, {}) if isinstance(of, str) else (of[0], dict(of[1]))
    if name in STEPPED:
        raise ExperimentError(
            f"sensitivity: of = {name!r}: is a count, rank or share, whose derivative is 0 almost everywhere and says "
            f"nothing; ask for {STEPPED[name]}, which is smooth"
        )
    if name not in NAMED:
        raise ExperimentError(
            f"sensitivity: of = {name!r}: no such observable{nearest(name, list(NAMED))}; there are "
            f"{', '.join(NAMED)}, or a function of the network"
        )
    keys, make = NAMED[name]
    if set(labels) - set(keys):
        raise ExperimentError(
            f"sensitivity: of = {name!r} has the labels {', '.join(keys) or 'none'}, not {', '.join(labels)}"
        )
    if experiment.student.module is not None and keys:
        raise ExperimentError(
            f"sensitivity: of = {name!r}: needs layers, which a module of your own has not; ask for loss_eval"
        )
    if keys:
        labels.setdefault("layer", 1) if "layer" in keys and (
            name in _MAXIMA or len(experiment.layout.widths) == 2
        ) else None
        missing = [key for key in keys if key not in labels]
        if missing:
            raise ExperimentError(
                f"sensitivity: of = {name!r}: {', '.join(missing)} is not given; write ({name!r}, "
                f"{{{', '.join(f'{key!r}: ...' for key in keys)}}})"
            )
        _refuse_beyond(name, labels, experiment)
    told = ",".join(f"{key}={labels[key]}" for key in keys)
    made = make(labels, experiment)
    samples: Literal["evaluation", "train"] | None = None if name in _BARE else "evaluation"
    if name == "loss_train":
        samples = "train"
    depth = labels["layer"] if name in (*_MAXIMA, "correlation") else None
    return Observed(f"{name}[{told}]" if told else name, made, name in _MAXIMA, name not in _BARE, samples, depth)


def _refuse_beyond(name: str, labels: Mapping[str, Any], experiment: Experiment) -> None:
    layout = experiment.layout
    depth = len(layout.widths)
    hidden_only = name in (*_MAXIMA, "correlation", "fanout_norm")
    layer = labels["layer"]
    if not isinstance(layer, int) or not 1 <= layer <= depth - hidden_only:
        what = "hidden layers" if hidden_only else "layers"
        raise ExperimentError(f"sensitivity: of = {name!r}: layer = {layer!r}; the {what} are 1..{depth - hidden_only}")
    below = layout.input_width if layer == 1 else layout.widths[layer - 2]
    shape = layout.input_widths[layer - 1] if layout.input_widths else below
    sizes = {
        "node": layout.widths[layer - 1], "teacher_node": layout.teacher_widths[layer - 1], "input_node": shape,
    }  # fmt: skip
    for key, size in sizes.items():
        if key in labels and not (isinstance(labels[key], int) and 0 <= labels[key] < size):
            raise ExperimentError(
                f"sensitivity: of = {name!r}: {key} = {labels[key]!r}; layer {layer} has 0..{size - 1}"
            )


def _called(function: Function, student: Student) -> Tensor:
    name = getattr(function, "__name__", "the function")
    given = _dataset(student) if _takes_dataset(function) else student.network
    try:
        value: Any = function(given)
    except AttributeError as error:  # most likely names of a Dataset asked of a network, or the other way
        what = "a Dataset" if isinstance(given, xr.Dataset) else f"the student, a {given!r}"
        raise ExperimentError(
            f"sensitivity: of = {name}: {error}; it was called with {what}: a function whose first parameter is called "
            "ds takes a differentiable Dataset, any other the student as a tsdyn.Network"
        ) from error
    if isinstance(value, xr.DataArray):
        value = value.data.tensor if isinstance(value.data, DifferentiableArray) else value.values
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ExperimentError(f"sensitivity: of = {name}: gave {shown}; it must give one number as a torch tensor")
    if not value.is_floating_point() or not value.requires_grad:
        raise ExperimentError(
            f"sensitivity: of = {name}: its value has no gradient: it counts, ranks, leaves torch (numpy, .item()) or "
            "detaches; compute it from the network's tensors by smooth functions of torch"
        )
    return value.reshape(())


def _takes_dataset(function: Function) -> bool:
    """Whether a function's first parameter is called ``ds`` or is annotated as a Dataset."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and (first.name == "ds" or first.annotation in (xr.Dataset, "xr.Dataset", "Dataset"))


def _dataset(student: Student) -> xr.Dataset:
    """What the archive would record of the student at its last epoch, as a differentiable Dataset.

    It has ``weight``, ``bias`` and ``correlation``, padded with NaN, and ``loss_eval`` and ``mse_eval``.
    """
    network, teacher = student.network, student.teacher
    if isinstance(teacher, Own):
        raise ExperimentError("sensitivity: of = a function of ds: the teacher is a module of your own, without layers")
    depth = network.depth
    weights = [w.flatten(1) for w in network.weights]
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, network.biases, strict=True)]
    taught = [w.flatten(1) for w in teacher.weights]
    tables: list[Tensor] = [_correlations(student, layer) for layer in range(1, depth)]
    tables.append(weights[-1].new_full((len(taught[-1]), len(weights[-1])), torch.nan))
    node = ("layer", "node")
    variables = {
        "weight": ((*node, "input_node"), _beside(weights)),
        "bias": (node, _beside(biases)),
        "correlation": (("layer", "teacher_node", "node"), _beside(tables)),
        "loss_eval": ((), _loss_eval({}, None)(student)),
        "mse_eval": ((), _mse_eval({}, None)(student)),
    }
    sizes = {dim: n for dims, tensor in variables.values() for dim, n in zip(dims, tensor.shape, strict=True)}
    coords: dict[str, Any] = {dim: np.arange(dim == "layer", n + (dim == "layer")) for dim, n in sizes.items()}
    for name, of in (("", weights), ("teacher_", taught)):
        coords[f"{name}width"] = "layer", [w.shape[0] for w in of]
        coords[f"{name}input_width"] = "layer", [w.shape[1] for w in of]
    return xr.Dataset({name: (dims, wrap(tensor)) for name, (dims, tensor) in variables.items()}, coords)


def _beside(layers: list[Tensor]) -> Tensor:
    """One tensor per layer, padded with NaN to the widest."""
    widest = [max(t.shape[d] for t in layers) for d in range(layers[0].ndim)]
    padded = []
    for t in layers:
        room = [(0, w - n) for w, n in zip(widest, t.shape, strict=True)]
        padded.append(F.pad(t, [n for pair in reversed(room) for n in pair], value=torch.nan))
    return torch.stack(padded)


def _loss_eval(labels: Mapping[str, int], experiment: Experiment | None) -> Callable[[Student], Tensor]:
    def of(student: Student) -> Tensor:
        output, _ = student.traced(student.inputs)
        return student.loss.value(output, student.loss.target(student.teacher(student.inputs), student.classes))

    return of


def _loss_train(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    def of(student: Student) -> Tensor:
        if student.train is None:
            raise ExperimentError(
                "sensitivity: of = 'loss_train': where every step has new samples there is no training set to measure "
                "it on; ask for loss_eval"
            )
        x, y = student.train
        there = ~x.isnan().any(1)
        return student.loss.value(student.traced(x[there])[0], y[there])

    return of


def _mse_eval(labels: Mapping[str, int], experiment: Experiment | None) -> Callable[[Student], Tensor]:
    return lambda s: (s.teacher(s.inputs) - s.traced(s.inputs)[0]).square().mean()


def _correlations(student: Student, layer: int) -> Tensor:
    """Correlations of a layer, (teacher_node, node); NaN where an activation is constant."""
    teacher = student.teacher.trace(student.inputs).activations[layer - 1]
    active = student.traced(student.inputs)[1][layer - 1]
    return torch.where(_is_constant(active), torch.nan, correlation_of(teacher, _varied(active)))


def _varied(activation: Tensor) -> Tensor:
    """The activations, with constant ones cut from the graph: their NaN must not reach the gradient of the others."""
    ramp = torch.arange(len(activation), dtype=activation.dtype, device=activation.device).unsqueeze(1)
    # any varying stand-in; its correlation is replaced by the callers' NaN
    return torch.where(_is_constant(activation), ramp, activation)


def _is_constant(activation: Tensor) -> Tensor:
    activation = activation.detach()
    return activation.amax(0) == activation.amin(0)


def _correlation(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    return lambda s: _correlations(s, labels["layer"])[labels["teacher_node"], labels["node"]]


def _best_correlation(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    return lambda s: _correlations(s, labels["layer"])[labels["teacher_node"]].unsqueeze(0)


def _mean_specialization(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    return lambda s: _correlations(s, labels["layer"])


def _weight(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    return lambda s: s.values[f"weight_{labels['layer']}"].flatten(1)[labels["node"], labels["input_node"]]


def _bias(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    name = f"bias_{labels['layer']}"
    if not experiment.student.bias:
        raise ExperimentError("sensitivity: of = 'bias': this student has none (student.bias = false)")
    return lambda s: s.values[name][labels["node"]]


def _fanout_norm(labels: Mapping[str, int], experiment: Experiment) -> Callable[[Student], Tensor]:
    if len(experiment.layout.widths) != 2 or experiment.deep:
        raise ExperimentError(
            "sensitivity: of = 'fanout_norm': is ‖v_k‖ of two layers here; of a deeper network give a function of it"
        )
    return lambda s: s.values["weight_2"][:, labels["node"]].norm()


_NODE = ("layer", "teacher_node", "node")
NAMED: Mapping[str, tuple[tuple[str, ...], Callable[..., Callable[[Student], Tensor]]]] = {
    "loss_eval": ((), _loss_eval),
    "loss_train": ((), _loss_train),
    "mse_eval": ((), _mse_eval),
    "correlation": (_NODE, _correlation),
    "best_correlation": (("layer", "teacher_node"), _best_correlation),
    "mean_specialization": (("layer",), _mean_specialization),
    "fanout_norm": (("layer", "node"), _fanout_norm),
    "weight": (("layer", "node", "input_node"), _weight),
    "bias": (("layer", "node"), _bias),
}
_MAXIMA = ("best_correlation", "mean_specialization")
#: Observables of the student alone.
_BARE = ("fanout_norm", "weight", "bias", "loss_train")
