"""Trains an epoch by gradient flow dθ/dt = −∇J on each member's own finite data, for `training.method = "flow"`.

An epoch lasts for the time learning rate × steps, so that ``flow`` is the limit of ``gd`` at smaller rates and
correspondingly more steps.  Only the parameters are carried from one epoch to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tsdyn.engine.ensemble import Ensemble, layer_of, network_of
from tsdyn.engine.rule import Rule
from tsdyn.flow.flows import gradient_flow
from tsdyn.flow.stationary import FunctionLoss
from tsdyn.memory import refuse_beyond

#: Tolerance of a step's local error: well below what plots show and below the differences between seeds.
RTOL, ATOL = 1e-6, 1e-8
#: The method of integration, as `gradient_flow` takes it; `tsdyn.running.conventions` says it in every archive.
METHOD = "rodas"
#: Limit on the bytes of activations held for the Hessian rows that are computed together.
_CHUNK_BYTES = 1 << 27
_log = logging.getLogger("tsdyn")


class TrainingLoss(FunctionLoss):
    """J of one member on its data, as a function of the parameters that are not frozen.

    Args:
        ensemble: Shapes, activation and the frozen parameters.
        member: Index of the member in the ensemble.
        inputs: (sample, input).
        targets: (sample, output).
        rule: J and its weight decay, ½ λ|θ|²; frozen layers.
    """

    def __init__(self, ensemble: Ensemble, member: int, inputs: Tensor, targets: Tensor, rule: Rule) -> None:
        own = {name: p[member].cpu() for name, p in ensemble.values.items()}
        free = [name for name in own if layer_of(name) not in rule.frozen]
        sizes = [own[name].numel() for name in free]
        architecture = ensemble.connected
        assert architecture is not None  # experiments with method = "flow" refuse other networks

        def objective(row: Tensor) -> Tensor:
            pairs = zip(free, row.split(sizes), strict=True)
            moved = own | {name: values.view(own[name].shape) for name, values in pairs}
            output = network_of(architecture, moved, {})(inputs)
            return rule.loss.value(output, targets) + 0.5 * rule.weight_decay * row.square().sum()

        super().__init__(objective, sum(sizes), dtype=inputs.dtype)
        nodes = sum(w.shape[1] for w in ensemble.weights)
        self._rows = max(1, _CHUNK_BYTES // (4 * inputs.element_size() * len(inputs) * nodes))

    def hessian(self, parameters: Tensor) -> Tensor:
        """Hessian by torch.func, some rows at a time: all at once would keep every activation once per parameter."""
        one = torch.func.jacrev(torch.func.grad(self._function), chunk_size=self._rows)
        lead = parameters.shape[:-1]
        found = torch.stack([one(row) for row in parameters.reshape(-1, self.parameters)])
        return found.reshape(*lead, *found.shape[1:])


def train_epoch(ensemble: Ensemble, data: Sequence[tuple[Tensor, Tensor]], rule: Rule, *, time: float) -> None:
    """Advance every living member by gradient flow for the given time, in place; NaN where the flow stops early.

    It runs on the CPU wherever the members are, since a member's Hessian is too small to profit from a device.

    Args:
        ensemble: Trained in place.
        data: Inputs (sample, input) and targets (sample, output) of each member.
        rule: J, its weight decay and which layers are frozen; its learning rate is not used.
        time: Duration t of dθ/dt = −∇J.

    Raises:
        MemoryError: if a Hessian does not fit.
    """
    for member, (inputs, targets) in enumerate(data):
        free = [p[member] for name, p in ensemble.values.items() if layer_of(name) not in rule.frozen]
        if ensemble.idle[member] >= 0 or not free:
            continue
        row = torch.cat([p.flatten() for p in free]).cpu()
        refuse_beyond(
            "training.method = 'flow'",
            4 * 8 * len(row) ** 2,
            row.device,
            "the Hessian is dense: use 'gd', or fewer nodes",
        )
        loss = TrainingLoss(ensemble, member, inputs.cpu(), targets.cpu(), rule)
        ds = gradient_flow(loss, row, end=time, rtol=RTOL, atol=ATOL, gradient_tolerance=0.0, method=METHOD)
        reached, reason = torch.from_numpy(ds["final"].values[0]), ds["stop_reason"].item()
        if reason != "time":
            _log.warning("gradient flow of member %d ended by %r at t = %g", member, reason, ds["stop_time"].item())
            reached = torch.full_like(reached, torch.nan)
        for p, values in zip(free, reached.split([p.numel() for p in free]), strict=True):
            p.copy_(values.view(p.shape))
