"""What is measured: pure functions of a student and its teacher, registered under the schema variable they fill.

A layered observable gives one array a layer, or None where it has no meaning; the archive pads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, assert_never

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tsdyn import alignment, compiled_sums, derivatives, registers, schema, theory, vocabulary
from tsdyn.axes import Activations, Outputs, TeacherActivations, TeacherByStudent
from tsdyn.experiment import Experiment, ExperimentError
from tsdyn.losses import CROSS_ENTROPY, MSE, Loss
from tsdyn.networks import Network, Trace, require_plain
from tsdyn.own_modules import Own
from tsdyn.theory import backpropagated_gradients

# --- formulas, for one network -------------------------------------------------------------------------------


def loss(teacher_output: Outputs, output: Outputs) -> Float[Tensor, ""]:
    """J = ½ E‖f* − f‖², the sum over outputs and mean over samples.  Source: Tian (2020), Eq. 1."""
    return MSE.value(output, teacher_output)


def mse(teacher_output: Outputs, output: Outputs) -> Float[Tensor, ""]:
    """Mean over samples and outputs of (f* − f)², 2/C times `loss`.  Source: released code."""
    return (teacher_output - output).square().mean()


def cross_entropy(classes: Int[Tensor, " sample"], output: Outputs) -> Float[Tensor, ""]:
    """E[−log softmax(f)_class].  Source: Tian (2020), section 6."""
    return CROSS_ENTROPY.over(output, output, classes)


def accuracy(classes: Int[Tensor, " sample"], output: Outputs, *, most: int) -> Float[Tensor, " top_k"]:
    """Share of samples whose class is among the k largest outputs, for k = 1..most.  Source: Tian (2020), section 6."""
    largest = output.topk(most, dim=1).indices
    return (largest == classes[:, None]).to(output.dtype).mean(0).cumsum(0)


def standardized(activation: Activations) -> Activations:
    """Centred over samples and scaled to unit sum of squares; NaN where an activation is constant.

    A constant activation is told by its range, not its variance: rounding leaves the latter above zero.
    """
    centred = activation - activation.mean(0)
    constant = activation.amax(0) == activation.amin(0)
    return torch.where(constant, torch.nan, centred / centred.norm(dim=0))


def correlation(teacher_activation: TeacherActivations, activation: Activations) -> TeacherByStudent:
    """Pearson correlation over samples of each teacher node with each student node, (teacher_node, node).

    Signed; NaN for a node whose activation is constant.  Source: Tian (2020), Eq. 9, centred as in Tian et al. (2019).
    """
    return standardized(teacher_activation).T @ standardized(activation)


def observation(teacher_z: TeacherActivations, student_z: Activations, *, band: float) -> TeacherByStudent:
    """Share of a teacher node's boundary samples that lie in a student node's active region.

    Boundary samples of node j: those whose pre-activation is within `band` of its standard deviations of 0.
    NaN without any.  Active: z_k(x) > 0.
    Source: Tian (2020), Definition 4, on a finite sample (κ of Theorem 3).
    """
    near = (teacher_z.abs() <= band * teacher_z.std(0, correction=0)).to(teacher_z.dtype)
    return near.T @ (student_z > 0).to(near.dtype) / near.sum(0)[:, None]


def observation_count(teacher_z: TeacherActivations, student_z: Activations) -> TeacherByStudent:
    """min over the two sides of teacher node j's boundary of the number of samples active in student node k.

    Source: Tian (2020), released code.
    """
    active = (student_z > 0).to(student_z.dtype)
    positive = (teacher_z > 0).to(student_z.dtype)
    return torch.minimum(positive.T @ active, (1 - positive).T @ active)


# --- what a member shows at one epoch ------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A data set as one teacher sees it; computed once for as long as the data stay the same.

    Attributes:
        inputs: (sample, input).
        teacher: A network, or a module of the user's own.
        labels: The data's own, (sample,), where an experiment uses them.
    """

    inputs: Tensor
    teacher: Network | Own
    labels: Tensor | None = None

    @cached_property
    def classes(self) -> Tensor:
        """The teacher's class of each sample: its largest output, (sample,)."""
        return self.trace.output.argmax(1)

    @cached_property
    def trace(self) -> Trace:
        return self.teacher.trace(self.inputs)

    @cached_property
    def standardized(self) -> list[Tensor]:
        return [standardized(f) for f in self.trace.activations[:-1]]

    @cached_property
    def fanout_norms(self) -> list[Tensor]:
        return _fanout_norms(_network(self.teacher), self.inputs, self.trace)


def _network(member: Network | Own) -> Network:
    if isinstance(member, Own):
        raise ValueError(f"measure: {type(member.module).__name__} is a module of the user's own, without known layers")
    return member


def _fanout_norms(network: Network, x: Tensor, trace: Trace) -> list[Tensor]:
    return theory.fanout_norms(network, x if network.convolutional else trace)


@dataclass(frozen=True)
class Response:
    """A student on a probe; what observables share is computed once and only when asked for.

    Attributes:
        student: A network, or a module of the user's own.
        probe: The data set.
        correlated: Whether correlations are asked for, too.
    """

    student: Network | Own
    probe: Probe
    correlated: bool = False

    @cached_property
    def trace(self) -> Trace:
        return self.student.trace(self.probe.inputs)

    @cached_property
    def _sums(self) -> compiled_sums.Sums:
        student, probe = self.student, self.probe
        teachers, target = probe.standardized if self.correlated else [], probe.trace.output
        if isinstance(student, Network) and compiled_sums.serves(student, probe.inputs):
            return compiled_sums.sums(student, probe.inputs, target, teachers)
        pairs = zip(teachers, self.trace.activations, strict=False)
        return compiled_sums.Sums(
            (target - self.trace.output).square().sum(), [t.T @ standardized(f) for t, f in pairs]
        )

    @property
    def squared_error(self) -> Tensor:
        """Σ (f* − f)² over samples and outputs."""
        return self._sums.squared_error

    @property
    def mse(self) -> Tensor:
        """As the module's `mse`."""
        return self.squared_error / self.probe.trace.output.numel()

    @property
    def correlations(self) -> list[Tensor]:
        """`correlation` of each hidden layer."""
        return self._sums.correlations


@dataclass(frozen=True)
class Measurement:
    """One member at one epoch; what observables share is computed once and only when asked for.

    Attributes:
        student: A network, or a module of the user's own; `network` and `net` where only the former will do, or only
            plain linear layers.
        train, eval: What it is measured on.
        band: Of `observation`.
        layout: Sizes that the record decides.
        objective: The loss that is trained; gradients and Hessians are of it.
        labels: Whose classes it is of, where it is of classes.
    """

    student: Network | Own
    train: Probe
    eval: Probe
    band: float = 0.1
    layout: schema.Layout | None = None
    objective: Loss = MSE
    labels: Literal["teacher", "data"] = "teacher"

    @property
    def network(self) -> Network:
        return _network(self.student)

    @property
    def net(self) -> Network:
        return _plain(self.network)

    @property
    def teacher(self) -> Network:
        return _plain(_network(self.eval.teacher))

    def loss(self, response: Response) -> Tensor:
        """J over a probe."""
        if self.objective == MSE:  # whose sums are compiled
            return 0.5 * response.squared_error / len(response.probe.inputs)
        return self.objective.over(response.trace.output, response.probe.trace.output, self._classes(response.probe))

    def target(self, probe: Probe) -> Tensor:
        """What the loss that is trained wants on a probe, (sample, output)."""
        return self.objective.target(probe.trace.output, self._classes(probe))

    def _classes(self, probe: Probe) -> Tensor:
        match self.labels:
            case "teacher":
                return probe.classes
            case "data":
                if probe.labels is None:
                    raise ValueError("measure: labels='data' needs Probes with labels")
                return probe.labels
            case other:
                assert_never(other)

    @cached_property
    def on_train(self) -> Response:
        return Response(self.student, self.train)

    @cached_property
    def on_eval(self) -> Response:
        own = isinstance(self.student, Own) or isinstance(self.eval.teacher, Own)  # which have no layers to compare
        return Response(self.student, self.eval, correlated=not own)

    @property
    def fanout_norms(self) -> list[Tensor]:
        student = self.network
        if student.plain and student.depth == 2:  # V_1 = W_2 whatever x
            return [student.weights[1].norm(dim=0)]
        return _fanout_norms(student, self.eval.inputs, self.on_eval.trace)

    @cached_property
    def moments(self) -> theory.Moments:
        return theory.expectations(self.network, _network(self.eval.teacher), self.eval.inputs)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """g_l of the loss that is trained, over the training set."""
        trace = self.on_train.trace
        residual = self.objective.residual(trace.output, self.target(self.train))
        return backpropagated_gradients(self.net, trace, residual)


Layers: TypeAlias = list[Tensor | None]
Observable: TypeAlias = Callable[[Measurement], Tensor | Layers]
#: tsdyn's own, by the variable that each fills.
OBSERVABLES: dict[str, Observable] = {}


@dataclass(frozen=True)
class Observed:
    """An observable of a package or of the user's own: what an entry point of ``tsdyn.observables`` names.

    Attributes:
        variable: As `tsdyn.declare` gives it; experiment files ask for it by its name.
        measure: `Measurement` → a tensor, or one per layer from the lowest up, of the variable's sizes.
    """

    variable: vocabulary.Variable
    measure: Observable

    @property
    def name(self) -> str:
        return self.variable.name


def observable(name: str) -> Observable:
    """The measurement of that name: tsdyn's own, or one that a package offers or `tsdyn.run` was given.

    Raises:
        PartError: if there is none, or what a package offers is no `Observed` of that name.
    """
    if name in OBSERVABLES:
        return OBSERVABLES[name]
    found = registers.OBSERVABLES.load(name)
    if not isinstance(found, Observed) or found.name != name or schema.DECLARED.get(name) != found.variable:
        raise registers.PartError(
            f"observable {name!r}: {registers.OBSERVABLES.origin(name).target} is {found!r}; it must be a tsdyn "
            "Observed whose variable tsdyn.declare gave, of that name"
        )
    return found.measure


@contextmanager
def added(observables: Sequence[Observed]) -> Iterator[None]:
    """Inside, experiments of this process can ask for these observables by name."""
    done: list[str] = []
    try:
        for each in observables:
            if each.name not in done:
                schema.adopt(each.variable)
                registers.OBSERVABLES.add(each.name, each)
                done.append(each.name)
        yield
    finally:
        for name in done:
            registers.OBSERVABLES.remove(name)


def load(experiment: Experiment) -> None:
    """Load the observables that packages offer and `experiment` asks for, so that their variables are declared.

    Raises:
        ExperimentError: if one is not there, or cannot be measured of this experiment's networks.
    """
    for register, name in experiment.parts.values():
        if register is not registers.OBSERVABLES:
            continue
        try:
            observable(name)
        except registers.PartError as error:
            raise ExperimentError(f"record.observables: {error}") from None
        row = schema.variable(name)
        if experiment.deep and not row.deep:
            raise ExperimentError(f"record.observables: {name} is not measured of convolutions and BatchNorm (deep)")
        if experiment.student.module is not None and not row.own:
            raise ExperimentError(f"record.observables: {name} is not measured of modules of your own (own)")


def fills(variable: str) -> Callable[[Observable], Observable]:
    """Register a measurement under the schema variable it fills."""
    if variable not in vocabulary.VARIABLES:
        raise ValueError(f"fills: {variable!r} is not a variable of the schema; declare it in tsdyn.vocabulary first")

    def register(observable: Observable) -> Observable:
        OBSERVABLES[variable] = observable
        return observable

    return register


fills("loss_train")(lambda m: m.loss(m.on_train))
fills("loss_eval")(lambda m: m.loss(m.on_eval))
fills("mse_train")(lambda m: m.on_train.mse)
fills("mse_eval")(lambda m: m.on_eval.mse)
fills("weight")(lambda m: [w.flatten(1) for w in m.network.weights])
fills("bias")(lambda m: [w.new_zeros(len(w)) if b is None else b for w, b in _layers(m.network)])
fills("correlation")(lambda m: list(m.on_eval.correlations))
fills("fanout_norm")(lambda m: list(m.fanout_norms))
fills("teacher_fanout_norm")(lambda m: list(m.eval.fanout_norms))
fills("gradient_rms")(lambda m: [g.square().mean(0).sqrt() for g in m.gradients])
fills("gradient_max")(lambda m: [g.abs().amax(0) for g in m.gradients])
fills("observation")(lambda m: [observation(t, s, band=m.band) for t, s in _hidden_z(m)])
fills("observation_count")(lambda m: [observation_count(t, s) for t, s in _hidden_z(m)])


for _moment in vocabulary.FAMILIES["moments"]:
    fills(_moment)(lambda m, name=_moment: list(getattr(m.moments, name)))  # type: ignore[misc]


@fills("lemma1_residual")
def _lemma1_residual(m: Measurement) -> Tensor:
    return torch.tensor(theory.lemma1_residual(m.net, m.teacher, m.eval.inputs))


@fills("alignment")
def _alignment(m: Measurement) -> Tensor:
    return alignment.alignment(m.teacher, m.net)


@fills("gradient_norm")
def _gradient_norm(m: Measurement) -> Tensor:
    """‖∂J_x/∂θ‖² = Σ_l ‖g_l‖² (‖f_{l−1}‖² + 1), the 1 where layer l has a bias."""
    below = [m.train.inputs, *m.on_train.trace.activations[:-1]]
    squares = [
        g.square().sum(1) * (f.square().sum(1) + (bias is not None))
        for g, f, bias in zip(m.gradients, below, m.net.biases, strict=True)
    ]
    quantiles = torch.tensor(_layout(m).quantiles, dtype=squares[0].dtype, device=squares[0].device)
    return torch.quantile(torch.stack(squares).sum(0).sqrt(), quantiles)


@fills("hessian_eigenvalue")
def _hessian_eigenvalue(m: Measurement) -> Tensor:
    student, inputs, target = m.net, m.train.inputs, m.target(m.train)
    free = [*student.weights, *(b for b in student.biases if b is not None)]
    leak = student.activation.leak

    def at(parameters: list[Tensor]) -> Tensor:
        weights, rest = parameters[: student.depth], iter(parameters[student.depth :])
        biases = [None if b is None else next(rest) for b in student.biases]
        moved = Network(weights, biases, student.activation.name, leak=0.0 if leak is None else leak)
        return m.objective.value(moved(inputs), target)

    wanted = _layout(m).modes
    values = derivatives.hessian_spectrum(at, free, wanted)
    missing = values.new_full((wanted - len(values),), torch.nan)  # a student without biases may have fewer
    return torch.cat([values, missing])


def _layout(m: Measurement) -> schema.Layout:
    if m.layout is None:
        raise ValueError("measure: gradient_norm, hessian_eigenvalue and accuracy need the Measurement's layout")
    return m.layout


@fills("accuracy")
def _accuracy(m: Measurement) -> Tensor:
    return accuracy(m.eval.classes, m.on_eval.trace.output, most=_layout(m).padded("top_k"))


@fills("label_accuracy")
def _label_accuracy(m: Measurement) -> Tensor:
    if m.eval.labels is None:
        raise ValueError("measure: label_accuracy needs a Probe with labels")
    return accuracy(m.eval.labels, m.on_eval.trace.output, most=_layout(m).padded("top_k"))


@fills("conserved_norm")
def _conserved_norm(m: Measurement) -> Layers:
    return list(theory.conserved_norms(m.network))


def _of_norms(variable: str, name: str) -> None:
    def measured(m: Measurement) -> Layers:
        nothing = [torch.full_like(w.flatten(1)[:, 0], torch.nan) for w in m.network.weights[:-1]]
        held = [None if n is None else n.tensors().get(name) for n in m.network.norms]
        return [n if h is None else h for h, n in zip(held, nothing, strict=True)]

    fills(variable)(measured)


for _variable, _name in (
    ("norm_scale", "weight"), ("norm_shift", "bias"), ("norm_mean", "running_mean"), ("norm_variance", "running_var"),
):  # fmt: skip
    _of_norms(_variable, _name)


@fills("parameter")
def _parameter(m: Measurement) -> Tensor:
    if not isinstance(m.student, Own):
        raise ValueError("measure: parameter is of students that are modules of the user's own; record weight")
    return m.student.entries()


def _layers(network: Network) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(network.weights, network.biases, strict=True))


def _plain(network: Network) -> Network:
    require_plain("measure", network)
    return network


def _hidden_z(m: Measurement) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(m.train.trace.preactivations, m.on_train.trace.preactivations, strict=True)
    return list(pairs)[:-1]


Record: TypeAlias = Mapping[str, np.ndarray | list[np.ndarray]]


def measure(variables: Iterable[str], measurement: Measurement) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The named variables of one member: an array, or one for each layer from the lowest up.

    A list shorter than the depth means that the variable has no value at the layers above.

    Raises:
        KeyError: for a variable without a measurement.
    """
    found: dict[str, np.ndarray | list[np.ndarray]] = {}
    with torch.no_grad():
        for name in variables:
            value = observable(name)(measurement)
            if name not in OBSERVABLES:
                value = _checked(name, value, _layout(measurement))
            found[name] = (
                [v.cpu().numpy() for v in value if v is not None] if isinstance(value, list) else value.cpu().numpy()
            )
    return found


def _checked(name: str, value: Tensor | Layers, layout: schema.Layout) -> Tensor | Layers:
    """What a user's observable gave, if it has the dimensions that its variable declares.

    Raises:
        PartError: otherwise, naming both.
    """
    row = schema.variable(name)
    parts = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) != row.layered or len(parts) > max(layout.depth, 1):
        what = f"a list of {len(parts)}" if isinstance(value, (list, tuple)) else "one array"
        raise registers.PartError(
            f"observable {name!r} gave {what}; its variable has dimensions {row.dims}: "
            + ("give a list of one tensor per layer from the lowest up" if row.layered else "give one tensor")
        )
    tensors = [torch.as_tensor(part) for part in parts if part is not None]
    for layer, tensor in enumerate(tensors, start=1):
        wanted = layout.block(row, layer if row.layered else None)
        if tuple(tensor.shape) != wanted:
            inner = [dim for dim in row.dims if dim not in ("seed", "epoch", "layer")]
            where = f" at layer {layer}" if row.layered else ""
            raise registers.PartError(
                f"observable {name!r} gave shape {tuple(tensor.shape)}{where}; its variable declares "
                f"({', '.join(inner)}), which is {wanted} here"
            )
    return list(tensors) if row.layered else tensors[0]
