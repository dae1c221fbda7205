"""How teachers enter a run that is differentiated: by the targets they give."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import jvp, vjp

from tsdyn.engine.ensemble import Ensemble, Named, network_of
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network
from tsdyn.running.members import Members
from tsdyn.through_training.steps import forward


class Teachers:
    """The teachers of some members in float64, side by side; `values` are their parameters, None for own modules."""

    def __init__(self, members: Members) -> None:
        networks = [teacher for teacher in members.teachers if isinstance(teacher, Network)]
        self._own = [Own(copy.deepcopy(t.module)).to(torch.float64) for t in members.teachers if isinstance(t, Own)]
        self._ensemble = Ensemble.of(networks).to(torch.float64) if networks else None
        self.values: Named | None = None if self._ensemble is None else self._ensemble.values

    def one(self, i: int, values: Mapping[str, Tensor] | None = None) -> Network | Own:
        """The teacher of one member, with other parameters if they are given."""
        if self._ensemble is None:
            return self._own[i]
        architecture = self._ensemble.architecture
        assert isinstance(architecture, Network)
        assert self.values is not None
        own = {n: t[i] for n, t in self.values.items()} if values is None else dict(values)
        return network_of(architecture, own, {n: t[i] for n, t in self._ensemble.buffers.items()})

    def _targets(self, values: Named, x: Tensor) -> Tensor:
        assert self._ensemble is not None
        architecture = self._ensemble.architecture
        assert isinstance(architecture, Network)
        # beyond a member's own samples inputs are NaN, and the derivative in their targets is 0
        return forward(architecture, values, self._ensemble.buffers, x.nan_to_num(0.0), training=False)[0]

    def pulled(self, x: Tensor, slope: Tensor) -> Named:
        """The derivative in the parameters from that in the targets of inputs x, (member, sample, ...)."""
        assert self.values is not None
        _, pull = vjp(lambda values: self._targets(values, x), self.values)  # type: ignore[misc]
        (found,) = pull(slope)
        return dict(found)

    def pushed(self, x: Tensor, direction: Named) -> Tensor:
        """The tangent of the targets of inputs x along a direction of the parameters."""
        assert self.values is not None
        tangent: Tensor = jvp(lambda values: self._targets(values, x), (self.values,), (direction,))[1]
        return tangent
