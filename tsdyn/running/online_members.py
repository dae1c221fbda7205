"""The students of an online run: all seeds, simulated in N dimensions and by the equation for N → ∞."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tsdyn.experiment.experiment import Experiment
from tsdyn.flow import overlap_matrices as order
from tsdyn.flow.online_learning import Member, Simulation
from tsdyn.flow.overlap_dynamics import Rates, order_parameters
from tsdyn.flow.overlap_matrices import Overlaps
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation
from tsdyn.running.protocol import of_this_shape


class OnlineMembers:
    """All seeds of one online run; a `tsdyn.running.protocol.Runnable`.

    Every seed draws weights N(0, 1) in N dimensions for teacher and student; outgoing weights are 1 if only the first
    layer learns, and N(0, 1) if both do.  Simulation and equation start from the same order parameters.

    Args:
        experiment: Of kind ``online``, without a sweep.
        device: ``cpu``.
    """

    def __init__(self, experiment: Experiment, device: str = "cpu") -> None:
        self.experiment, self.device = experiment, device

    @property
    def _inputs(self) -> int:
        return self.experiment.student_widths[0]

    @cached_property
    def _sigma(self) -> Activation:
        return activations.activation(self.experiment.student.activation, leak=self.experiment.student.leak)

    @cached_property
    def _rates(self) -> Rates:
        rate, online = self.experiment.training.rate(1), self.experiment.online
        rates = Rates(rate, rate if online.both else 0.0, noise=online.noise)
        rates.check(self.experiment.name)
        return rates

    @cached_property
    def begin(self) -> Overlaps:
        """Order parameters of all seeds at the start."""
        drawn = [self._start(seed) for seed in self.experiment.seed_labels]
        return order.checked(self.experiment.name, *(np.stack(part) for part in zip(*drawn, strict=True)))

    def _start(self, seed: int) -> tuple[np.ndarray, ...]:
        nodes, M, inputs = self.experiment.student_widths[1], self.experiment.teacher_widths[1], self._inputs
        draw = np.random.default_rng([seed, nodes, M])
        w, B = draw.standard_normal((nodes, inputs)), draw.standard_normal((M, inputs))
        both = self.experiment.online.both
        outgoing = [draw.standard_normal(n) if both else np.ones(n) for n in (nodes, M)]
        return w @ w.T / inputs, w @ B.T / inputs, B @ B.T / inputs, *outgoing

    @cached_property
    def simulation(self) -> Simulation:
        """The simulation in N dimensions, which holds the students' weights."""
        each = (Overlaps(*(x[i] for x in self.begin)) for i in range(len(self.experiment.seed_labels)))
        members = [
            Member.draw(one, self._inputs, seed) for one, seed in zip(each, self.experiment.seed_labels, strict=True)
        ]
        return Simulation(members, self._sigma, self._rates)

    @cached_property
    def _equation(self) -> Mapping[str, np.ndarray]:
        """Q, R, v and eg by the equation at all α, (seed, alpha, ...); computed anew on resume instead of stored."""
        ds = order_parameters(
            *self.begin,
            learning_rate=self._rates.learning_rate,
            second_learning_rate=self._rates.second_learning_rate,
            noise=self._rates.noise,
            activation=self._sigma,
            alpha=np.array(self.experiment.marks),
        )
        return {name: ds[name].values for name in ("Q", "R", "v", "eg")}

    def draw(self) -> None:
        """Draw the starts."""
        _ = self.simulation

    def _steps(self, step: int) -> int:
        return round(self.experiment.marks[step] * self._inputs)

    def advance(self, step: int) -> list[int]:
        """Take steps of online SGD up to α = ``experiment.marks[step]``; returns the seeds that died meanwhile."""
        dead = self.simulation.ensemble.death_epoch
        before = dead < 0
        with torch.no_grad():
            self.simulation.until(self._steps(step))
        died = (before & (dead >= 0)).nonzero()[:, 0].tolist()
        self._died[died] = step
        return [self.experiment.seed_labels[i] for i in died]

    @cached_property
    def _died(self) -> np.ndarray:
        """The step in which each seed died, −1 for none."""
        return np.full(len(self.experiment.seed_labels), -1)

    def measure(self, step: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """Order parameters, outgoing weights and generalization error, simulated and by the equation."""
        with torch.no_grad():
            Q, R, v = self.simulation.until(self._steps(step))
            now = Overlaps(Q, R, self.begin.T, v, self.begin.A)
            found = {"Q": Q, "R": R, "outgoing": v, "eg": order.generalization_error(now, self._sigma)}
        solved = {"Q": "Q", "R": "R", "outgoing": "v", "eg": "eg"}
        values = {name: tensor.numpy() for name, tensor in found.items()}
        values |= {f"{name}_equation": self._equation[of][:, step] for name, of in solved.items()}
        return {name: values[name] for name in variables}

    def constants(self) -> dict[str, Any]:
        """The teacher: T and its outgoing weights."""
        return {"T": self.begin.T.numpy(), "teacher_outgoing": self.begin.A.numpy()}

    def outcome(self) -> dict[str, Any]:
        """An empty dict: an online run has no variables that are only known at its end."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """The simulation's state."""
        return self.simulation.state() | {"death_epoch": self._died.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the members to a stored state.

        Raises:
            StateError: if it is not a state of these members.
        """
        self.simulation.restore(of_this_shape(state, self.state()))
        self._died[:] = state["death_epoch"]
