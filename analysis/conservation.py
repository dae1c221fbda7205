"""Checks the exact change of the balance c_j = ‖a_j‖² − ‖w_j‖² − b_j² of hidden nodes, step by step, on an archive.

a_j are a node's outgoing weights, w_j its incoming ones, b_j its bias.  Where σ(z) = σ'(z) z the gradients of any loss
satisfy a_j·∂a_j = w_j·∂w_j + b_j ∂b_j, so that gradient flow conserves c_j, and a step p ← ρ_p p − r_p ∂p of every
parameter (r its rate, ρ = 1 − rλ its weight decay) changes it exactly by

    (ρ_a² − 1)‖a‖² + r_a²‖∂a‖² − (ρ_w² − 1)‖w‖² − r_w²‖∂w‖² − (ρ_b² − 1) b² − r_b² ∂b²
    − 2 (r_a ρ_a − r_w ρ_w) w·∂w − 2 (r_a ρ_a − r_b ρ_b) b ∂b.

With one rate η for all and no weight decay that is η²(‖∂a‖² − ‖∂w‖² − ∂b²).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tsdyn.analysis.identity import begun, points
from tsdyn.analysis.members import PARAMETERS, Member, member

from tsdyn import theory
from tsdyn.engine.batches import finite_stream
from tsdyn.engine.ensemble import Ensemble
from tsdyn.engine.rule import Rule
from tsdyn.engine.train import train_epoch
from tsdyn.experiment.experiment import Experiment
from tsdyn.networks.network import Network
from tsdyn.problem import targets
from tsdyn.problem.inputs import batch_indices, fresh_batches, labels, new_at_every_step, training_generator

#: Most steps that are taken again per member; of a longer interval only the first ones are checked.
STEPS = 1000
#: New samples are drawn for this many steps at once.
_STEPS_AT_ONCE = 16


def balance_kept(ds: xr.Dataset, tolerance: dict[str, float]) -> tuple[xr.DataArray, xr.DataArray]:
    """Whether each member's training changes the balance by known amounts, and the largest error over `tolerance`.

    The training between the last two recorded epochs is done again from the recorded weights, by the engine that
    trained.  After each step the balance is compared with the one before plus the exact change, and at the end the
    recorded balance with the sum of all; errors are relative to the largest ‖a‖² + ‖w‖² + b² of the layer.

    Args:
        ds: Archive with ``weight``, ``bias``, the teacher's, and ``balance``.
        tolerance: Relative error that rounding may leave, by dtype.

    Returns:
        Hypothesis met, and margin: over (swept..., seed).  The hypothesis: SGD or GD without momentum, hidden rows not
        normalised, a piecewise linear σ, a fully connected student, and two recorded epochs of a living member.
    """
    dead, committed = ds["death_epoch"], begun(ds)
    met, margin = xr.full_like(dead, False, dtype=bool), xr.full_like(dead, np.nan, dtype=float)
    for chosen, experiment in points(ds).values():
        there = bool(committed.sel({dim: value for dim, value in chosen.items() if dim in committed.dims}))
        experiment = experiment.as_trained
        if not there or not _steps_of_sgd(experiment):
            continue
        for seed in np.atleast_1d(ds["seed"].values):
            at = {**chosen, **({"seed": seed} if "seed" in ds.dims else {})}
            found = _error(ds.sel(at), experiment)
            if int(dead.sel(at)) < 0 and found is not None:
                index = tuple(dead.get_index(dim).get_loc(at[str(dim)]) for dim in dead.dims)
                met[index], margin[index] = True, found / tolerance[experiment.dtype]
    return met, margin


def _steps_of_sgd(experiment: Experiment) -> bool:
    training = experiment.training
    if experiment.data.leave_out.subset is not None:  # steps of weighted samples
        return False
    if experiment.deep or experiment.student.module is not None or training.method == "flow":
        return False
    return Rule.of(training, 1).optimizer.name == "sgd" and not training.normalize


def _error(ds: xr.Dataset, experiment: Experiment) -> float | None:
    """Largest relative error of one member; None if it has no two recorded epochs, or σ is not piecewise linear."""
    recorded = ds["balance"].transpose("epoch", "layer", "node").load()
    alive = np.flatnonzero(recorded.sel(layer=1, node=0).notnull().values)
    if len(alive) < 2:
        return None
    first, last = (int(recorded["epoch"][i]) for i in alive[-2:])
    start = member(ds[list(PARAMETERS)].sel(epoch=first), experiment)
    if not start.student.activation.piecewise_linear:
        return None
    ensemble, taken = Ensemble.of([start.student]), 0
    errors: list[float] = []
    balance = sum_of_changes = _balances(start.student)
    for epoch in range(first + 1, last + 1):
        rule = Rule.of(experiment.training, epoch)
        for x, y in _batches(start, epoch):
            if taken == STEPS:
                return max(errors)
            change = _change(ensemble.network(0), start, x, y, rule)
            train_epoch(ensemble, finite_stream(x[None], y[None], None), rule, batch=len(x))
            after, scales = _balances(ensemble.network(0)), _sizes(ensemble.network(0))
            errors += [
                float((new - old - step).abs().max()) / scale
                for new, old, step, scale in zip(after, balance, change, scales, strict=True)
            ]
            sum_of_changes = [total + step for total, step in zip(sum_of_changes, change, strict=True)]
            balance, taken = after, taken + 1
    end = recorded.sel(epoch=last)
    for layer, (total, scale) in enumerate(zip(sum_of_changes, _sizes(ensemble.network(0)), strict=True), start=1):
        held = torch.from_numpy(end.sel(layer=layer).values[: len(total)]).double()
        errors.append(float((held - total).abs().max()) / scale)
    return max(errors)


def _balances(network: Network) -> list[Tensor]:
    return theory.balances(network.to(torch.float64))


def _sizes(network: Network) -> list[float]:
    """Largest ‖a‖² + ‖w‖² + b² of each hidden layer; 1 for a layer of zeros."""
    found = []
    for layer in range(network.depth - 1):
        bias = network.biases[layer]
        size = network.weights[layer + 1].square().sum(0) + network.weights[layer].square().sum(1)
        found.append(float((size if bias is None else size + bias.square()).max()) or 1.0)
    return found


def _batches(of: Member, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each step of the epoch that ends at `epoch`, as they were trained on."""
    experiment, seed = of.experiment, of.seed
    if not new_at_every_step(experiment):
        x, y = of.training_inputs, of.training_targets
        if experiment.training.whole:
            yield from ((x, y) for _ in range(experiment.steps))
            return
        yield from ((x[rows], y[rows]) for rows in torch.from_numpy(batch_indices(experiment, seed, epoch, len(x))))
        return
    noise, taken, shown = training_generator(experiment, seed, "noise", epoch), 0, None
    if experiment.training.of_data:
        own = labels(experiment, seed, "train")
        shown = torch.from_numpy(own[batch_indices(experiment, seed, epoch, len(own))])
    for draws in fresh_batches(experiment, seed, epoch, steps_at_once=_STEPS_AT_ONCE):
        for x in torch.from_numpy(draws):
            clean = of.loss.target(of.teacher(x), None if shown is None else shown[taken])
            yield x, targets.spoiled(experiment, clean, noise)
            taken += 1


def _change(network: Network, of: Member, x: Tensor, y: Tensor, rule: Rule) -> list[Tensor]:
    """Change of the balance of each hidden layer in one step, (node,), by the formula of this module."""
    trace = network.trace(x)
    g = theory.backpropagated_gradients(network, trace, of.loss.residual(trace.output, y))
    below = [x, *trace.activations[:-1]]
    gradients: dict[str, Tensor] = {}
    for layer, (back, f) in enumerate(zip(g, below, strict=True), start=1):
        gradients[f"weight_{layer}"] = -(back.T @ f)[None] / len(x)
        gradients[f"bias_{layer}"] = -back.sum(0)[None] / len(x)
    trained = {name: slope for name, slope in gradients.items() if _trained(name, network, rule)}
    clipped = rule.clipped(trained)
    # a frozen layer's gradient is in the law of the layer beside it, scaled like that one's
    scale = 1.0 if rule.clip is None else _norm(clipped) / (_norm(trained) or 1.0)
    slopes = {name: clipped.get(name, scale * slope)[0].double() for name, slope in gradients.items()}
    rate = float(rule.learning_rate)

    def moved(name: str, parameter: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """The parameter, its slope, its rate r and ρ."""
        layer = int(name.rpartition("_")[2])
        own = 0.0 if layer in rule.frozen else rate * (rule.factors[layer - 1] if rule.factors else 1.0)
        decay = rule.weight_decay if rule.decay_biases or name.startswith("weight") else 0.0
        return parameter.double(), slopes[name], own, 1 - own * decay

    found = []
    for layer in range(1, network.depth):
        bias = network.biases[layer - 1]
        a, da, r_a, keep_a = moved(f"weight_{layer + 1}", network.weights[layer])
        w, dw, r_w, keep_w = moved(f"weight_{layer}", network.weights[layer - 1])
        change = (keep_a**2 - 1) * a.square().sum(0) + r_a**2 * da.square().sum(0)
        change -= (keep_w**2 - 1) * w.square().sum(1) + r_w**2 * dw.square().sum(1)
        change -= 2 * (r_a * keep_a - r_w * keep_w) * (w * dw).sum(1)
        if bias is not None:
            b, db, r_b, keep_b = moved(f"bias_{layer}", bias)
            change -= (keep_b**2 - 1) * b.square() + r_b**2 * db.square()
            change -= 2 * (r_a * keep_a - r_b * keep_b) * b * db
        found.append(change)
    return found


def _trained(name: str, network: Network, rule: Rule) -> bool:
    kind, layer = name.split("_")
    return int(layer) not in rule.frozen and (kind == "weight" or network.biases[int(layer) - 1] is not None)


def _norm(slopes: Mapping[str, Tensor]) -> float:
    return float(torch.stack([slope.norm() for slope in slopes.values()]).norm()) if slopes else 0.0
