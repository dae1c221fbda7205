"""Intermediate results for measuring one member: computed once, when first needed, and shared by observables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, assert_never

from torch import Tensor

from tsdyn import schema
from tsdyn.engine import compiled_sums
from tsdyn.engine.loss import MSE, Loss
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network, Trace, require_plain
from tsdyn.observables.formulas import standardized
from tsdyn.theory import coupling_moments
from tsdyn.theory.couplings import backpropagated_gradients


@dataclass(frozen=True)
class Probe:
    """A data set with its teacher, and the teacher's activations on it; reused for as long as the data stay the same.

    Attributes:
        inputs: (sample, input).
        teacher: A network, or a module of the user's own.
        labels: The data set's own classes, (sample,), if the experiment uses them.
        targets: Targets of the trained loss, (sample, output), where they are not those of the teacher or the data:
            with ``data.noise`` or ``data.flip``.
    """

    inputs: Tensor
    teacher: Network | Own
    labels: Tensor | None = None
    targets: Tensor | None = None

    @cached_property
    def classes(self) -> Tensor:
        """The teacher's class of each sample, the index of its largest output, (sample,)."""
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
    return coupling_moments.fanout_norms(network, x if network.convolutional else trace)


@dataclass(frozen=True)
class Response:
    """A student's activations on a probe, computed once, when first needed, for all observables.

    Attributes:
        student: A network, or a module of the user's own.
        probe: The data set.
        correlated: Whether correlations are needed too.
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
        """Squared error Σ (f* − f)² over samples and outputs."""
        return self._sums.squared_error

    @property
    def mse(self) -> Tensor:
        """Mean squared error over samples and outputs, as `formulas.mse`."""
        return self.squared_error / self.probe.trace.output.numel()

    @property
    def correlations(self) -> list[Tensor]:
        """Correlations of each hidden layer, as `formulas.correlation`."""
        return self._sums.correlations


@dataclass(frozen=True)
class Measurement:
    """One member at one epoch, with the intermediate results that observables share.

    Attributes:
        student: A network, or a module of the user's own.  `network` is the student if it is a network, `net` if it has
            only plain linear layers; they raise ValueError otherwise.
        train, eval: The probes on which it is measured.
        band: Width of the boundary band of `observation`.
        layout: Array sizes that the experiment's record settings determine.
        objective: The loss that is trained, to which gradients and Hessians belong.
        labels: For a loss on classes, whether they are the teacher's or the data set's.
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
        """The trained loss J over a probe."""
        if response.probe.targets is not None:
            return self.objective.value(response.trace.output, response.probe.targets)
        if self.objective == MSE:  # its sums are compiled
            return 0.5 * response.squared_error / len(response.probe.inputs)
        return self.objective.over(response.trace.output, response.probe.trace.output, self._classes(response.probe))

    def target(self, probe: Probe) -> Tensor:
        """Targets of the trained loss on a probe, (sample, output)."""
        if probe.targets is not None:
            return probe.targets
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
        # own modules have no known layers to compare
        own = isinstance(self.student, Own) or isinstance(self.eval.teacher, Own)
        return Response(self.student, self.eval, correlated=not own)

    @property
    def fanout_norms(self) -> list[Tensor]:
        student = self.network
        if student.plain and student.depth == 2:  # V_1 = W_2 whatever x
            return [student.weights[1].norm(dim=0)]
        return _fanout_norms(student, self.eval.inputs, self.on_eval.trace)

    @cached_property
    def moments(self) -> coupling_moments.Moments:
        return coupling_moments.expectations(self.network, _network(self.eval.teacher), self.eval.inputs)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Backpropagated gradients g_l of the trained loss over the training set."""
        trace = self.on_train.trace
        residual = self.objective.residual(trace.output, self.target(self.train))
        return backpropagated_gradients(self.net, trace, residual)


def _plain(network: Network) -> Network:
    require_plain("measure", network)
    return network
