"""Online SGD in finite dimension, in the order parameters' own units: every sample is seen once, α = steps/N.

The engine of `training` runs it.  Its one rule, parameter += rate · (1/batch) Σ g fᵀ at outputs f = Σ u_i σ(w_i·x'),
covers both rates: inputs are x' = x/√N, and with outputs and targets divided by s the outgoing weights are u = v/s, so
that a rate ρ = η₂/N moves v by η₂/N σ Δ and w by (ρ/s²) v σ' Δ x', which is η at s² = η₂/(Nη).  A layer whose rate is
0 is frozen.

Source: Goldt et al. (2019), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from tsdyn import activations
from tsdyn import overlaps as order
from tsdyn.activations import Activation
from tsdyn.batches import Batches, Stream
from tsdyn.ensemble import Ensemble, mark_dead
from tsdyn.networks import Network
from tsdyn.order_parameters import Rates, checked_times
from tsdyn.overlaps import Overlaps
from tsdyn.rules import Rule
from tsdyn.train import train_epoch

#: Inputs of a block of members are drawn in pieces of about this size.
_PIECE_BYTES = 1 << 23


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
    """Online SGD of students that start with exactly these order parameters, in N dimensions.

    Each seed draws its own weights, uniform among those with these overlaps, and its own samples; what it draws does
    not depend on the other seeds nor on `alpha`.

    Args:
        Q: w·w/N, (node, node_2); with a leading dimension of any of the five, one row a seed.
        R: w·B/N, (node, teacher_node).
        T: B·B/N, (teacher_node, teacher_node_2).
        v: Outgoing weights of the student; ones unless given.
        A: Of the teacher; ones unless given.
        inputs: N, at least as many as student and teacher nodes together.
        learning_rate: η of the first layer; 0 keeps it.
        alpha: Increasing times to report; rounded to whole steps, and labelled with what they are then.
        second_learning_rate: η₂ of the second layer; 0 keeps it.
        weight_decay: λ: every learning weight times 1 − λ/N a step.
        batch: Samples a step.
        noise: Standard deviation of the noise on the teacher's output.
        activation: Any registered one.
        seeds: How many, or their labels.

    Returns:
        Dataset over seed and alpha as `order_parameters` gives it, ``eg`` exact from the overlaps; NaN from where a
        parameter was not finite.

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
    members = [_Member.draw(begin if not lead else Overlaps(*(x[i] for x in begin)), inputs, seed)
               for i, seed in enumerate(labels)]  # fmt: skip
    with torch.no_grad():
        path = _trained(members, steps, sigma, rates)
        T_, A_ = (x.expand(len(labels), *x.shape[len(lead) :]) for x in (begin.T, begin.A))
        return order.labelled(
            Overlaps(path[0], path[1], T_, path[2], A_),
            steps / inputs,
            sigma,
            seeds=labels,
            attrs={"method": "online SGD", "inputs": inputs, **rates.attrs()},
        )


@dataclass
class _Member:
    """One seed: its weights at the start, its teacher and its samples to come."""

    w: Tensor
    B: Tensor
    v: Tensor
    A: Tensor
    x: np.random.Generator
    noise: np.random.Generator

    @classmethod
    def draw(cls, begin: Overlaps, inputs: int, seed: int) -> _Member:
        frame, x, noise = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
        w, B = order.weights(begin, inputs, frame)
        return cls(w, B, begin.v.clone(), begin.A, x, noise)


def _trained(
    members: list[_Member], steps: np.ndarray, sigma: Activation, rates: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """Q, R (seed, alpha, …) and v at each of these steps."""
    inputs = members[0].w.shape[1]
    rule, scale = _rule(rates, inputs)
    leak = 0.0 if sigma.leak is None else sigma.leak
    ensemble = Ensemble.of([Network([m.w, m.v[None] / scale], activation=sigma.name, leak=leak) for m in members])
    B = torch.stack([m.B for m in members])
    batch, found, taken = int(rates.batch), [], 0
    for step in steps.tolist():
        if step > taken:
            stream = _stream(members, sigma, rates, scale, step - taken)
            train_epoch(ensemble, stream, rule, batch=batch)
            mark_dead(ensemble, step)
            taken = step
        w, u = ensemble.weights
        found.append((w @ w.mT / inputs, w @ B.mT / inputs, u[:, 0] * scale))
    Q, R, v = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return Q, R, v


def _rule(rates: Rates, inputs: int) -> tuple[Rule, float]:
    """The engine's rule and what outputs are divided by."""
    first, second = rates.learning_rate, rates.second_learning_rate / inputs
    rate = second or first
    frozen = (*((1,) if not first else ()), *((2,) if not second else ()))
    scale = math.sqrt(second / first) if first and second else 1.0
    return Rule(rate, weight_decay=rates.weight_decay / (inputs * rate), frozen=frozen), scale


def _stream(members: list[_Member], sigma: Activation, rates: Rates, scale: float, steps: int) -> Stream:
    batch, inputs = int(rates.batch), members[0].w.shape[1]

    def stream(chosen: slice) -> Iterator[Batches]:
        block = members[chosen]
        piece = max(1, _PIECE_BYTES // (8 * len(block) * batch * inputs))
        for done in range(0, steps, piece):
            count = min(piece, steps - done)
            x = np.stack([m.x.standard_normal((count * batch, inputs)) for m in block])
            fields = torch.from_numpy(x).div_(math.sqrt(inputs))
            y = torch.stack([sigma(field @ m.B.T) @ m.A for field, m in zip(fields, block, strict=True)])
            if rates.noise:
                y += rates.noise * torch.from_numpy(np.stack([m.noise.standard_normal(y.shape[1]) for m in block]))
            rows = torch.arange(count * batch).view(1, count, batch).expand(len(block), -1, -1)
            yield Batches(fields, y[..., None] / scale, rows, count)

    return stream
