"""The runner's gradient flow: an epoch of dθ/dt = −∇J on each member's own finite data.

An epoch lasts as long as what the steps of ``gd`` add up to, learning rate × steps: ``flow`` is the limit of ``gd`` at
a smaller rate and as many more steps.  Nothing but parameters is carried from one epoch to the next.
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

#: Of a step's local error: that of a trajectory to be looked at, well below the plots' and the seeds' differences.
RTOL, ATOL = 1e-6, 1e-8
#: Bytes of activations behind the Hessian's rows in work at once.
_CHUNK_BYTES = 1 << 27
_log = logging.getLogger("tsdyn")


class TrainingLoss(FunctionLoss):
    """J of one member on its data, as a function of the parameters that are not frozen.

    Args:
        ensemble: Shapes, activation and the frozen parameters.
        member: Which.
        inputs: (sample, input).
        targets: (sample, output).
        rule: J and its weight decay, ½ λ|θ|²; frozen layers.
    """

    def __init__(self, ensemble: Ensemble, member: int, inputs: Tensor, targets: Tensor, rule: Rule) -> None:
        own = {name: p[member].cpu() for name, p in ensemble.values.items()}
        free = [name for name in own if layer_of(name) not in rule.frozen]
        sizes = [own[name].numel() for name in free]
        architecture = ensemble.connected
        assert architecture is not None  # an experiment lets nothing else flow

        def objective(row: Tensor) -> Tensor:
            pairs = zip(free, row.split(sizes), strict=True)
            moved = own | {name: values.view(own[name].shape) for name, values in pairs}
            output = network_of(architecture, moved, {})(inputs)
            return rule.loss.value(output, targets) + 0.5 * rule.weight_decay * row.square().sum()

        super().__init__(objective, sum(sizes), dtype=inputs.dtype)
        nodes = sum(w.shape[1] for w in ensemble.weights)
        self._rows = max(1, _CHUNK_BYTES // (4 * inputs.element_size() * len(inputs) * nodes))

    def hessian(self, parameters: Tensor) -> Tensor:
        """By torch.func, some rows at a time: all at once would hold every activation once a parameter."""
        one = torch.func.jacrev(torch.func.grad(self._function), chunk_size=self._rows)
        lead = parameters.shape[:-1]
        found = torch.stack([one(row) for row in parameters.reshape(-1, self.parameters)])
        return found.reshape(*lead, *found.shape[1:])


def train_epoch(ensemble: Ensemble, data: Sequence[tuple[Tensor, Tensor]], rule: Rule, *, time: float) -> None:
    """Gradient flow of every living member for this long, in place; NaN where it does not get to the end.

    It runs on the CPU, wherever the members are: a member's Hessian is small work for a device.

    Args:
        ensemble: Trained in place.
        data: Inputs (sample, input) and targets (sample, output) of each member.
        rule: J, its weight decay and which layers are frozen; its rate is not used.
        time: t of dθ/dt = −∇J.

    Raises:
        MemoryError: if a Hessian does not fit.
    """
    for member, (inputs, targets) in enumerate(data):
        free = [p[member] for name, p in ensemble.values.items() if layer_of(name) not in rule.frozen]
        if ensemble.death_epoch[member] >= 0 or not free:
            continue
        row = torch.cat([p.flatten() for p in free]).cpu()
        refuse_beyond(
            "training.method = 'flow'",
            4 * 8 * len(row) ** 2,
            row.device,
            "the Hessian is dense: use 'gd', or fewer nodes",
        )
        loss = TrainingLoss(ensemble, member, inputs.cpu(), targets.cpu(), rule)
        ds = gradient_flow(loss, row, end=time, rtol=RTOL, atol=ATOL, gradient_tolerance=0.0)
        reached, reason = torch.from_numpy(ds["final"].values[0]), ds["stop_reason"].item()
        if reason != "time":
            _log.warning("gradient flow of member %d ended by %r at t = %g", member, reason, ds["stop_time"].item())
            reached = torch.full_like(reached, torch.nan)
        for p, values in zip(free, reached.split([p.numel() for p in free]), strict=True):
            p.copy_(values.view(p.shape))
