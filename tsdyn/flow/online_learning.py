"""Online SGD in finite dimension N, in the units of the order parameters: every sample is seen once, α = steps/N.

The training engine runs it.  The engine's single rate, parameter += rate · (1/batch) Σ g fᵀ at outputs
f = Σ u_i σ(w_i·x'), gives both rates: inputs are x' = x/√N, and outputs and targets are divided by s, so that the
outgoing weights are u = v/s.  A rate ρ = η₂/N then moves v by η₂/N σ Δ and w by (ρ/s²) v σ' Δ x', which has rate η if
s² = η₂/(Nη).  A layer whose rate is 0 is frozen.

Source: Goldt et al. (2019), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn.engine.batches import Batches, Stream
from tsdyn.engine.ensemble import Ensemble, mark_dead
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.flow import overlap_matrices as order
from tsdyn.flow.overlap_dynamics import Rates, checked_times
from tsdyn.flow.overlap_matrices import Overlaps
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation
from tsdyn.networks.members_alone import product
from tsdyn.networks.network import Network

#: Approximate bytes of the pieces in which the inputs of each member are drawn, however many others there are: targets
#: of a piece of another length are products of another shape, which round differently.
PIECE_BYTES = 1 << 20


def online(
    Q: ArrayLike | Tensor,
    R: ArrayLike | Tensor,
    T: ArrayLike | Tensor,
    v: ArrayLike | Tensor | None = None,
    A: ArrayLike | Tensor | None = None,
    *,
    inputs: int,
    learning_rate: float,
    alpha: ArrayLike,
    second_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    batch: int = 1,
    noise: float = 0.0,
    activation: str | Activation = "erf",
    seeds: int | Sequence[int] = 1,
) -> xr.Dataset:
    """Simulate online SGD in N dimensions, of students that start with exactly the given order parameters.

    Each seed draws its own weights, uniformly among those with these overlaps, and its own samples; its draws depend
    neither on the other seeds nor on `alpha`.

    Args:
        Q: w·w/N, (node, node_2); any of Q, R, T, v, A may have a leading dimension with one row per seed.
        R: w·B/N, (node, teacher_node).
        T: B·B/N, (teacher_node, teacher_node_2).
        v: Outgoing weights of the student; ones unless given.
        A: Outgoing weights of the teacher; ones unless given.
        inputs: N, at least as many as student and teacher nodes together.
        learning_rate: η of the first layer; 0 freezes it.
        alpha: Increasing times to report; rounded to whole steps, and labelled with the rounded values.
        second_learning_rate: η₂ of the second layer; 0 freezes it.
        weight_decay: λ; each step multiplies every learning weight by 1 − λ/N.
        batch: Samples per step.
        noise: Standard deviation of the noise on the teacher's output.
        activation: Any registered activation.
        seeds: Number of seeds, or their labels.

    Returns:
        Dataset over seed and alpha with the variables of `order_parameters`, ``eg`` computed exactly from the overlaps;
        NaN from the time at which a parameter was not finite.

    Raises:
        ValueError: as `order_parameters`, for fewer inputs than nodes, both rates 0, and times closer than a step.

    Source: Goldt et al. (2019), section 2.
    """
    sigma = activations.activation(activation) if isinstance(activation, str) else activation
    begin = order.checked("online", Q, R, T, v, A)
    rates = Rates(learning_rate, second_learning_rate, weight_decay, batch, noise)
    rates.check("online")
    labels = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not labels or len(set(labels)) != len(labels) or min(labels) < 0:
        raise ValueError(f"online: seeds={seeds}; one or more different labels from 0 on")
    if batch != int(batch):
        raise ValueError(f"online: batch={batch}; a step sees a whole number of samples")
    if not learning_rate and not second_learning_rate:
        raise ValueError("online: both learning rates are 0; nothing would move")
    lead = begin.R.shape[:-2]
    if lead not in ((), (len(labels),)):
        raise ValueError(f"online: leading dimensions {tuple(lead)} for {len(labels)} seeds")
    times = checked_times("online", alpha)
    steps = np.round(times * inputs).astype(int)
    if (np.diff(steps) == 0).any():
        raise ValueError(f"online: alpha holds times closer than a step, 1/N = {1 / inputs:.3g}")
    members = [Member.draw(begin if not lead else Overlaps(*(x[i] for x in begin)), inputs, seed)
               for i, seed in enumerate(labels)]  # fmt: skip
    with torch.no_grad():
        simulation = Simulation(members, sigma, rates)
        path = [torch.stack(part, 1) for part in zip(*map(simulation.until, steps.tolist()), strict=True)]
        T_, A_ = (x.expand(len(labels), *x.shape[len(lead) :]) for x in (begin.T, begin.A))
        return order.labelled(
            Overlaps(path[0], path[1], T_, path[2], A_),
            steps / inputs,
            sigma,
            seeds=labels,
            attrs={"method": "online SGD", "inputs": inputs, **rates.attrs()},
        )


@dataclass
class Member:
    """One seed: its initial weights, its teacher and the generator of its samples."""

    w: Tensor
    B: Tensor
    v: Tensor
    A: Tensor
    x: np.random.Generator
    noise: np.random.Generator

    @classmethod
    def draw(cls, begin: Overlaps, inputs: int, seed: int) -> Member:
        frame, x, noise = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
        w, B = order.weights(begin, inputs, frame)
        return cls(w, B, begin.v.clone(), begin.A, x, noise)


class Simulation:
    """A simulation of several members, which can be halted at any step, stored and resumed.

    Args:
        members: Initial weights and generators of samples.
        sigma: Activation.
        rates: Learning rates, weight decay, batch and noise.
    """

    def __init__(self, members: list[Member], sigma: Activation, rates: Rates) -> None:
        self.members, self._sigma, self._rates = members, sigma, rates
        self._inputs = members[0].w.shape[1]
        self._rule, self._scale = _rule(rates, self._inputs)
        leak = 0.0 if sigma.leak is None else sigma.leak
        students = [Network([m.w, m.v[None] / self._scale], activation=sigma.name, leak=leak) for m in members]
        self.ensemble = Ensemble.of(students)
        self._B = torch.stack([m.B for m in members])
        self._taken = 0

    def until(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Advance to the given total number of steps; return Q, R and v (seed, …) there."""
        if step > self._taken:
            stream = _stream(self.members, self._sigma, self._rates, self._scale, step - self._taken)
            train_epoch(self.ensemble, stream, self._rule, batch=int(self._rates.batch))
            mark_dead(self.ensemble, step)
            self._taken = step
        w, u = self.ensemble.weights
        Q, R = (product(w, other.mT) / self._inputs for other in (w, self._B))
        return Q, R, u[:, 0] * self._scale

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name; generators as (seed, 6) numbers."""
        w, u = self.ensemble.weights
        generators = {name: np.stack([_numbers(getattr(m, name)) for m in self.members]) for name in ("x", "noise")}
        return {
            "w": w.numpy(),
            "u": u.numpy(),
            **generators,
            "taken": np.array(self._taken),
            "died": self.ensemble.death_epoch.numpy(),
        }

    def restore(self, stored: Mapping[str, np.ndarray]) -> None:
        """Continue from a stored `state`."""
        for name, parameter in zip(("w", "u"), self.ensemble.weights, strict=True):
            parameter.copy_(torch.from_numpy(np.array(stored[name])))
        for name in ("x", "noise"):
            for member, numbers in zip(self.members, stored[name], strict=True):
                _set(getattr(member, name), numbers)
        self._taken = self.ensemble.steps = int(stored["taken"])
        self.ensemble.death_epoch.copy_(torch.from_numpy(np.array(stored["died"])))


_LOW = (1 << 64) - 1


def _numbers(generator: np.random.Generator) -> np.ndarray:
    """State of a PCG64 generator as six numbers: its two 128-bit numbers in halves, and its buffered half draw."""
    state: Any = generator.bit_generator.state
    wide = (state["state"]["state"], state["state"]["inc"])
    halves = [half for number in wide for half in (number >> 64, number & _LOW)]
    return np.array([*halves, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def _set(generator: np.random.Generator, numbers: np.ndarray) -> None:
    high, low, inc_high, inc_low, has, kept = (int(number) for number in numbers)
    generator.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": high << 64 | low, "inc": inc_high << 64 | inc_low},
        "has_uint32": has,
        "uinteger": kept,
    }


def _rule(rates: Rates, inputs: int) -> tuple[Rule, float]:
    """The engine's rule, and the scale s by which outputs and targets are divided."""
    first, second = rates.learning_rate, rates.second_learning_rate / inputs
    rate = second or first
    frozen = (*((1,) if not first else ()), *((2,) if not second else ()))
    scale = math.sqrt(second / first) if first and second else 1.0
    return Rule(rate, weight_decay=rates.weight_decay / (inputs * rate), frozen=frozen), scale


def _stream(members: list[Member], sigma: Activation, rates: Rates, scale: float, steps: int) -> Stream:
    batch, inputs = int(rates.batch), members[0].w.shape[1]

    def stream(chosen: slice) -> Iterator[Batches]:
        block = members[chosen]
        piece = max(1, PIECE_BYTES // (8 * batch * inputs))
        for done in range(0, steps, piece):
            count = min(piece, steps - done)
            # each member's fields have memory of their own: products round by where it begins
            fields = [torch.from_numpy(m.x.standard_normal((count * batch, inputs))) / math.sqrt(inputs) for m in block]
            y = torch.stack([sigma(field @ m.B.T) @ m.A for field, m in zip(fields, block, strict=True)])
            if rates.noise:
                y += rates.noise * torch.from_numpy(np.stack([m.noise.standard_normal(y.shape[1]) for m in block]))
            rows = torch.arange(count * batch, device="cpu").view(1, count, batch).expand(len(block), -1, -1)
            yield Batches(torch.stack(fields), y[..., None] / scale, rows, count)

    return stream
