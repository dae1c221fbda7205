"""The protocol of a run of any kind: draw, advance step by step, measure, store the state and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tsdyn.experiment.experiment import Experiment


class StateError(ValueError):
    """A stored state does not fit these members."""


def of_this_shape(stored: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """`stored` itself, if it has all arrays of `own` in the same shape; else copying could broadcast silently.

    Raises:
        StateError: naming the array that differs.
    """
    for name, array in own.items():
        found = stored.get(name)
        if found is None or found.shape != array.shape or found.dtype != array.dtype:
            held = "missing" if found is None else f"{found.dtype} {found.shape}"
            raise StateError(
                f"the state to go on from has {name} {held}, this experiment needs {array.dtype} {array.shape}"
            )
    return stored


@runtime_checkable
class Runnable(Protocol):
    """The members of one run, as `runner` drives them.

    A run has the steps 0, 1, ..., ``experiment.last``; step 0 is its beginning.  A step is an epoch of training, or
    goes to the next time or α of ``experiment.marks`` for other kinds.  What is measured after the steps of
    ``experiment.schedule`` is labelled by ``experiment.labels`` along the dimension ``experiment.layout.path``.

    Attributes:
        experiment: Without a sweep.
        device: Device on which it is computed.
    """

    experiment: Experiment
    device: str

    def draw(self) -> None:
        """Draw all that the run begins with; raises if something cannot be drawn."""
        ...

    def advance(self, step: int) -> list[int]:
        """Compute the step that ends at `step`; returns the seeds that died in it."""
        ...

    def measure(self, step: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """The records after `step`: variable → (seed, ...), or one array (seed, node...) per layer."""
        ...

    def constants(self) -> dict[str, Any]:
        """The variables that the schema records at the ``start``, one value per seed."""
        ...

    def outcome(self) -> dict[str, Any]:
        """The variables that the schema records at the ``end``, one value per seed."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All arrays that the next step depends on, and ``death_epoch``, the step in which a seed died (−1: none).

        The names, shapes and dtypes are the same at every step.
        """
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the members to a state that `state` returned; later steps then give the same bits.

        Raises:
            StateError: if it is not a state of these members.
        """
        ...
