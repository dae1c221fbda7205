"""Which members stop learning, by what was recorded of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tsdyn.experiment.parts import Stop


@dataclass
class Watch:
    """The least value that each member's watched variable had, and the number of records since.

    Attributes:
        stop: When a member stops.
        best: (member,), infinite before the first record.
        since: (member,), records since `best`.
    """

    stop: Stop
    best: np.ndarray
    since: np.ndarray

    @classmethod
    def of(cls, stop: Stop, members: int) -> Watch:
        return cls(stop, np.full(members, np.inf), np.zeros(members, np.int64))

    def look(self, values: np.ndarray, stop_epoch: Tensor, idle: Tensor, epoch: int) -> None:
        """Take the values recorded at `epoch`, (member,), and note it in `stop_epoch` for those that stop there.

        A NaN is never below a number and never a new minimum.
        """
        better = values < self.best
        self.best[better] = values[better]
        self.since = np.where(better, 0, self.since + 1)
        if self.stop.below is not None:
            ends = values < self.stop.below
        else:
            assert self.stop.patience is not None
            ends = self.since >= self.stop.patience
        for member in np.flatnonzero(ends):
            if idle[member] < 0:
                stop_epoch[member] = epoch

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` goes on."""
        return {"stop_best": self.best.copy(), "stop_since": self.since.copy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.best, self.since = np.array(state["stop_best"]), np.array(state["stop_since"])
