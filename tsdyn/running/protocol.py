"""What a run is: begun, advanced step by step, measured, stored and restored, whatever its experiment's kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tsdyn.experiment.experiment import Experiment


class StateError(ValueError):
    """A stored state that is not one of these members."""


def of_this_shape(stored: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """`stored` itself, if it has all that `own` has, in the same shape: copied, a wrong shape could broadcast.

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
    """The members of one run; `runner` drives nothing else.

    A run has the steps 0, 1, ..., ``experiment.last``; step 0 is its beginning.  Steps are epochs of training, and the
    times or α of ``experiment.marks`` for other kinds.  What is measured after the steps of ``experiment.schedule`` is
    labelled by ``experiment.labels`` along the dimension ``experiment.layout.path``.

    Attributes:
        experiment: Without a sweep.
        device: Where it is computed.
    """

    experiment: Experiment
    device: str

    def draw(self) -> None:
        """Draw what the run begins with; what cannot be drawn fails here."""
        ...

    def advance(self, step: int) -> list[int]:
        """The step that ends at `step`; returns the seeds that died in it."""
        ...

    def measure(self, step: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """What is recorded after `step`: variable → (seed, ...), or one (seed, node...) array a layer."""
        ...

    def constants(self) -> dict[str, Any]:
        """What is known at the start, once a seed: the variables that the schema records at the ``start``."""
        ...

    def outcome(self) -> dict[str, Any]:
        """What is known after the last step, once a seed: the variables that the schema records at the ``end``."""
        ...

    def state(self) -> dict[str, np.ndarray]:
        """All that the next step depends on, by name; with ``death_epoch``, the step in which a seed died, −1 for none.

        The names, shapes and dtypes are the same at every step.
        """
        ...

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave, to the same bits.

        Raises:
            StateError: if it is not a state of these members.
        """
        ...
