"""Intermediate results for measuring one member: computed once, when first needed, and shared by observables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, assert_never

import torch
from numpy.typing import NDArray
from torch import Tensor

from tsdyn import schema
from tsdyn.engine import compiled_sums
from tsdyn.engine.loss import MSE, Loss
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network, Trace, require_plain
from tsdyn.observables import layers, module_couplings, similarities
from tsdyn.observables.formulas import standardized
from tsdyn.theory import coupling_moments, couplings
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
        return self.output.argmax(1)

    @cached_property
    def trace(self) -> Trace:
        return _trace(self.teacher, self.inputs)

    @cached_property
    def output(self) -> Tensor:
        """The teacher's outputs, (sample, output); without its trace where that is large."""
        return self.trace.output if _whole(self.teacher, self.inputs) else _network(self.teacher).output(self.inputs)

    @cached_property
    def standardized(self) -> list[Tensor]:
        return [standardized(f) for f in self.trace.activations[:-1]]

    @cached_property
    def taught(self) -> list[compiled_sums.Taught]:
        return [compiled_sums.Taught(t) for t in self.standardized]

    @cached_property
    def fanout_norms(self) -> list[Tensor]:
        return _fanout_norms(_network(self.teacher), self.inputs, self.trace)


def _network(member: Network | Own) -> Network:
    if isinstance(member, Own):
        raise ValueError(f"measure: {type(member.module).__name__} is a module of the user's own, not a Network")
    return member


def _whole(member: Network | Own, x: Tensor) -> bool:
    """Whether one pass takes all samples; of an own module always, for what it makes of one may depend on others."""
    return isinstance(member, Own) or len(member.pieces(x)) == 1


def _trace(member: Network | Own, x: Tensor) -> Trace:
    """A forward pass; of an own module its labelled layers' activations, the top one being the output."""
    if isinstance(member, Network) or not member.layers:
        return member.trace(x)
    passed = layers.traced(member.module.eval(), x, member.layers)
    return Trace([], [], [*(passed.rows(member.module, name) for name in member.layers[:-1]), passed.output])


def _at_layers(member: Network | Own, *, as_module: bool = False) -> module_couplings.AtLayers:
    if isinstance(member, Own):
        return module_couplings.AtLayers(member.module.eval(), member.layers)
    if not as_module:
        return module_couplings.AtLayers(_plain(member))
    module = member.to_torch().eval()
    return module_couplings.AtLayers(module, tuple(n for n, part in module.named_modules() if layers.is_layer(part)))


def _fanout_norms(network: Network, x: Tensor, trace: Trace) -> list[Tensor]:
    return coupling_moments.fanout_norms(network, x if network.convolutional else trace)


@dataclass(frozen=True)
class Response:
    """A student's activations on a probe, computed once, when first needed, for all observables.

    Attributes:
        student: A network, or a module of the user's own.
        probe: The data set.
        correlated: Whether correlations are needed too.
        joint: Gives the compiled sums, made together with other members'; or None where these have none.
    """

    student: Network | Own
    probe: Probe
    correlated: bool = False
    joint: Callable[[], compiled_sums.Sums | None] = lambda: None

    @cached_property
    def trace(self) -> Trace:
        return _trace(self.student, self.probe.inputs)

    @cached_property
    def output(self) -> Tensor:
        """The student's outputs, (sample, output); without its trace where that is large."""
        x = self.probe.inputs
        return self.trace.output if _whole(self.student, x) else _network(self.student).output(x)

    @cached_property
    def _sums(self) -> compiled_sums.Sums:
        found = self.joint()
        if found is not None:
            return found
        student, probe = self.student, self.probe
        target = probe.output
        if isinstance(student, Network) and compiled_sums.serves(student, probe.inputs):
            return compiled_sums.sums(student, probe.inputs, target, probe.taught if self.correlated else [])
        own = isinstance(student, Own) or isinstance(probe.teacher, Own)
        teachers = probe.standardized if self.correlated and not own else []
        if not teachers:
            return compiled_sums.Sums((target - self.output).square().sum(), [])
        pairs = list(zip(teachers, self.trace.activations, strict=False))  # the output has none
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
        return self.squared_error / self.probe.output.numel()

    @property
    def correlations(self) -> list[Tensor]:
        """Correlations of each hidden layer, as `formulas.correlation`; of own modules the lowest with the lowest."""
        if not isinstance(self.student, Own) and not isinstance(self.probe.teacher, Own):
            return self._sums.correlations
        pairs = zip(self.probe.standardized, self.trace.activations[:-1], strict=False)
        return [t.T @ standardized(f) for t, f in pairs]

    @cached_property
    def _features(self) -> tuple[list[NDArray], list[NDArray]]:
        """Activations of every layer of student and teacher as `similarities.unit`, (sample, position·node)."""
        samples = len(self.probe.inputs)
        own, taught = (
            [similarities.unit(f.reshape(samples, -1).cpu().numpy()) for f in trace.activations]
            for trace in (self.trace, self.probe.trace)
        )
        return own, taught

    @property
    def enough_samples(self) -> bool:
        """Whether there are more samples than features of some layer of the student and one of the teacher."""
        fewest = [min(f.shape[1] for f in side) for side in self._features]
        return bool(len(self.probe.inputs) > sum(fewest))

    @property
    def similarities(self) -> list[Tensor]:
        """Linear CKA of each layer with every teacher layer, (teacher_layer,); NaN where samples are too few."""
        own, taught = self._features
        samples, like = len(self.probe.inputs), self.trace.output
        return [
            like.new_tensor(
                [similarities.cka(f, t) if samples > f.shape[1] + t.shape[1] else torch.nan for t in taught]
            )
            for f in own
        ]

    @property
    def cross_correlations(self) -> list[Tensor]:
        """Correlations of each layer with every teacher layer, padded, (teacher_layer, teacher_node, node)."""
        theirs = [standardized(f) for f in self.probe.trace.activations]
        widest = max(t.shape[1] for t in theirs)
        found = []
        for f in self.trace.activations:
            mine = standardized(f)
            whole = mine.new_full((len(theirs), widest, mine.shape[1]), torch.nan)
            for block, t in zip(whole, theirs, strict=True):
                if len(t) == len(mine):
                    block[: t.shape[1]] = t.T @ mine
            found.append(whole)
        return found


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
        joint_on_train, joint_on_eval: `Response.joint` on the two probes.
    """

    student: Network | Own
    train: Probe
    eval: Probe
    band: float = 0.1
    layout: schema.Layout | None = None
    objective: Loss = MSE
    labels: Literal["teacher", "data"] = "teacher"
    joint_on_train: Callable[[], compiled_sums.Sums | None] = lambda: None
    joint_on_eval: Callable[[], compiled_sums.Sums | None] = lambda: None

    @property
    def network(self) -> Network:
        return _network(self.student)

    @property
    def own(self) -> bool:
        """Whether the student or the teacher is a module of the user's own."""
        return isinstance(self.student, Own) or isinstance(self.eval.teacher, Own)

    @property
    def layer_weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each layer; a weight of several dimensions is flattened to (node, input_node)."""
        if isinstance(self.student, Own):
            return layers.weights_of(self.student.module, self.student.layers)
        return [(w.flatten(1), b) for w, b in zip(self.student.weights, self.student.biases, strict=True)]

    @property
    def net(self) -> Network:
        return _plain(self.network)

    @property
    def teacher(self) -> Network:
        return _plain(_network(self.eval.teacher))

    def loss(self, response: Response) -> Tensor:
        """The trained loss J over a probe."""
        if response.probe.targets is not None:
            return self.objective.value(response.output, response.probe.targets)
        if self.objective == MSE:  # its sums are compiled
            return 0.5 * response.squared_error / len(response.probe.inputs)
        return self.objective.over(response.output, response.probe.output, self._classes(response.probe))

    def target(self, probe: Probe) -> Tensor:
        """Targets of the trained loss on a probe, (sample, output)."""
        if probe.targets is not None:
            return probe.targets
        return self.objective.target(probe.output, self._classes(probe))

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
        return Response(self.student, self.train, joint=self.joint_on_train)

    @cached_property
    def on_eval(self) -> Response:
        return Response(self.student, self.eval, correlated=not self.own, joint=self.joint_on_eval)

    @cached_property
    def pair_sums(self) -> module_couplings.PairSums:
        """E[A], E[B] and others by Jacobians, where the student or the teacher is a module of the user's own."""
        return module_couplings.pair_sums(_at_layers(self.student), _at_layers(self.eval.teacher), self.eval.inputs)

    @property
    def fanout_norms(self) -> list[Tensor]:
        if isinstance(self.student, Own):
            return [b.diagonal().sqrt() for b in self.pair_sums.B]
        student = self.network
        if student.plain and student.depth == 2:  # V_1 = W_2 whatever x
            return [student.weights[1].norm(dim=0)]
        return _fanout_norms(student, self.eval.inputs, self.on_eval.trace)

    @cached_property
    def moments(self) -> coupling_moments.Moments:
        return coupling_moments.expectations(self.network, _network(self.eval.teacher), self.eval.inputs)

    @property
    def teacher_fanout_norms(self) -> list[Tensor]:
        if isinstance(self.eval.teacher, Own):
            return [b.diagonal().sqrt() for b in self.pair_sums.B_star]
        return self.eval.fanout_norms

    @property
    def lemma1_residual(self) -> float:
        """As `couplings.lemma1_residual`, of own modules as `module_couplings`."""
        if not self.own:
            return couplings.lemma1_residual(self.net, self.teacher, self.eval.inputs)
        sides = [_at_layers(member, as_module=True) for member in (self.student, self.eval.teacher)]
        return module_couplings.largest_residual(sides[0], sides[1], self.eval.inputs)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Backpropagated gradients g_l of the trained loss over the training set, (sample·position, node)."""
        if isinstance(self.student, Own):
            target = self.target(self.train)

            def negative_gradient(output: Tensor) -> Tensor:
                return self.objective.residual(output.detach(), target)

            module = self.student.module.eval()
            found = layers.pulled_back(module, self.student.layers, self.train.inputs, negative_gradient)
            return [g.flatten(0, 1) for g in found]
        trace = self.on_train.trace
        residual = self.objective.residual(trace.output, self.target(self.train))
        return backpropagated_gradients(self.net, trace, residual)


def _plain(network: Network) -> Network:
    require_plain("measure", network)
    return network
