"""The members that run an experiment, by its kind."""

from __future__ import annotations

from typing import assert_never

from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.running.flow_members import FlowMembers
from tsdyn.running.forked_members import ForkedMembers
from tsdyn.running.members import Members
from tsdyn.running.online_members import OnlineMembers
from tsdyn.running.own_modules import Maker
from tsdyn.running.protocol import Runnable


def members_of(
    experiment: Experiment, device: str = "cpu", student: Maker | None = None, teacher: Maker | None = None
) -> Runnable:
    """The members of `experiment`, which has no sweep; nothing is drawn yet.

    Args:
        experiment: Without a sweep.
        device: Device on which it runs.
        student, teacher: Makers of modules of the user's own, as `Members` takes them.

    Raises:
        ExperimentError: for a kind that this device, or modules of the user's own, cannot run.
    """
    kind = experiment.kind
    if kind == "training":
        if experiment.fork.parent is not None:
            return ForkedMembers(experiment, device, student, teacher)
        return Members(experiment, device, student, teacher)
    if student is not None or teacher is not None:
        raise ExperimentError(f"student, teacher: kind = {kind!r} makes its networks itself; leave them out")
    if device != "cpu":
        raise ExperimentError(f"device {device!r}: kind = {kind!r} runs on the CPU; leave --device out")
    if kind == "population-flow":
        return FlowMembers(experiment)
    if kind == "online":
        return OnlineMembers(experiment)
    assert_never(kind)
