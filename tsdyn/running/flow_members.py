"""The students of a population flow: all seeds of one (n, k), from a Glorot start to the end of gradient flow.

At its end each student is polished by Newton's method to |∇| ≤ 1e-12, and the Hessian's signature and the class of the
point, with the number that decided it, are recorded; so are the critical points that theory gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsdyn import vocabulary
from tsdyn.experiment.experiment import Experiment
from tsdyn.experiment.shapes import FLOW_END
from tsdyn.flow.flows import Flow
from tsdyn.flow.stationary import polish, signature
from tsdyn.flow.steps import Limits
from tsdyn.networks.network import Network
from tsdyn.population.critical_point_kinds import Classification, classify
from tsdyn.population.critical_points import ODD, copy_average, one_neuron, perturbed_copy
from tsdyn.population.two_layer_loss import PopulationLoss, starts
from tsdyn.running.protocol import of_this_shape


class FlowMembers:
    """All seeds of one population flow; a `tsdyn.running.protocol.Runnable`.

    The teacher has k orthonormal nodes along the axes and outgoing weights 1.  The start of a student depends only on
    its seed, n and d.

    Args:
        experiment: Of kind ``population-flow``, without a sweep.
        device: ``cpu``.
    """

    def __init__(self, experiment: Experiment, device: str = "cpu") -> None:
        self.experiment, self.device = experiment, device

    @cached_property
    def loss(self) -> PopulationLoss:
        """The population loss of these students."""
        inputs, k, _ = self.experiment.teacher_widths
        student = self.experiment.student
        eye = torch.eye(k, inputs, dtype=torch.float64)
        teacher = Network(
            [eye, torch.ones(1, k, dtype=torch.float64)], activation=student.activation, leak=student.leak
        )
        return PopulationLoss(teacher, self.experiment.student_widths[1])

    @cached_property
    def flow(self) -> Flow:
        """The integrator, which holds the students' parameters."""
        begin = starts(self.loss, self.experiment.seed_labels)
        return Flow(self.loss, begin, times=np.array(self.experiment.labels), limits=Limits(end=FLOW_END))

    def draw(self) -> None:
        """Draw the starts."""
        _ = self.flow

    def advance(self, step: int) -> list[int]:
        """Follow gradient flow until all students reach time ``experiment.marks[step]`` or stop; none dies."""
        last = step == self.experiment.last
        with torch.no_grad():
            self.flow.until(math.inf if last else self.experiment.marks[step])
        return []

    def measure(self, step: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """``weight`` and ``population_loss`` at that time; NaN for students that stopped before."""
        rows = self.flow.joined("path")[:, step]
        found: dict[str, Any] = {"weight": self._layers(rows), "population_loss": self.loss.value(rows).numpy()}
        return {name: found[name] for name in variables}

    def _layers(self, rows: Tensor) -> list[np.ndarray]:
        w, a = self.loss.unpack(rows)
        return [w.numpy(), a.mT.numpy()]

    @property
    def _members(self) -> int:
        return len(self.experiment.seed_labels)

    def constants(self) -> dict[str, Any]:
        """The teacher's weights, and the losses and signatures of critical points that theory gives."""
        teacher = [np.repeat(w.numpy()[None], self._members, 0) for w in self.loss.teacher.weights]
        return {"teacher_weight": teacher} | {
            name: np.full(self._members, value) for name, value in _theory(self.loss).items()
        }

    def outcome(self) -> dict[str, Any]:
        """The point at which each student ended, its kind and its class."""
        flow, loss = self.flow, self.loss
        final = flow.joined("y")
        # one by one: eigenvectors round by where in memory a Hessian begins
        ends = [polish(loss, row) for row in final]
        # Newton steps are only taken from small gradients: from a singularity or a channel they would lead away
        arrived = torch.from_numpy(flow.reasons == "gradient")
        at = torch.where(arrived[:, None], torch.cat([end.point for end in ends]), final)
        found = [classify(loss.network(row), loss.teacher) for row in at]
        reasons = _hyphened(flow.reasons)
        kinds = np.where(arrived.numpy(), _hyphened(np.concatenate([end.kind for end in ends])), reasons)
        index = torch.cat([end.signature.negative for end in ends]).double()
        return {
            "end_weight": self._layers(at),
            "end_loss": loss.value(at).numpy(),
            "end_gradient_max": loss.gradient(at).abs().amax(-1).numpy(),
            "end_index": torch.where(arrived, index, math.nan).numpy(),
            "end_kind": _codes(kinds, vocabulary.END_KINDS),
            "end_class": _codes([c.kind for c in found], vocabulary.END_CLASSES),
            "end_ground": _codes([c.ground for c in found], vocabulary.END_GROUNDS),
            "end_margin": np.array([c.margin for c in found]),
            "end_owner": np.stack([_owners(c) for c in found]),
            "stop_time": flow.joined("t").numpy(),
            "stop_reason": _codes(reasons, vocabulary.STOP_REASONS),
        }

    def state(self) -> dict[str, np.ndarray]:
        """The integrator's state."""
        return self.flow.state() | {"death_epoch": np.full(self._members, -1)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the members to a stored state.

        Raises:
            StateError: if it is not a state of these members.
        """
        self.flow.restore(of_this_shape(state, self.state()))


def _hyphened(words: np.ndarray) -> np.ndarray:
    return np.char.replace(words.astype(str), " ", "-")


def _codes(words: Iterable[str], known: tuple[str, ...]) -> np.ndarray:
    return np.array([float(known.index(word)) for word in words])


def _owners(found: Classification) -> np.ndarray:
    """The student node that owns each teacher node; NaN for shared teacher nodes."""
    owners = np.full(found.cosine.shape[1], np.nan)
    for node, group in enumerate(found.groups):
        owners[list(group)] = node
    return owners


def _theory(loss: PopulationLoss) -> dict[str, float]:
    """Losses and signatures of the critical points that theory gives; NaN where there is no such point."""
    sigma = loss.teacher.activation
    activation, n, k = sigma.name, loss.nodes, loss.teacher.widths[1]
    values = dict.fromkeys(
        (
            "loss_copy_average", "loss_perturbed_copy", "index_copy_average", "index_perturbed_copy",
            "one_neuron_norm", "one_neuron_outgoing",
        ),
        math.nan,
    )  # fmt: skip
    if n > k:
        return values
    best = one_neuron(activation, k - n + 1, leak=0.01 if sigma.leak is None else sigma.leak)
    values |= {"loss_copy_average": best.loss}
    if n == 1:
        values |= {"one_neuron_norm": best.norm, "one_neuron_outgoing": best.outgoing}
    if activation in ODD:
        points = [copy_average(activation, loss.teacher, [1] * (n - 1) + [k - n + 1])]
        points += [perturbed_copy(loss.teacher, n)] if n < k else []
        rows = loss.pack(points)
        for name, value, index in zip(
            ("copy_average", "perturbed_copy"),
            loss.value(rows).tolist(),
            signature(loss, rows).negative.tolist(),
            strict=False,
        ):
            values |= {f"loss_{name}": value, f"index_{name}": index}
    return values
