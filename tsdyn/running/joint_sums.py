"""Compiled sums of the members of one run, or of several runs that are measured side by side, made in one call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import Tensor

from tsdyn.engine import compiled_sums
from tsdyn.engine.compiled_sums import JointSums, Pass, Sums
from tsdyn.networks.network import Network

if TYPE_CHECKING:
    from tsdyn.running.members import Members

#: `Measurement.joint_on_train` and `joint_on_eval`.
Both: TypeAlias = tuple[Callable[[], Sums | None], Callable[[], Sums | None]]


class MemberSums:
    """Sums of all members of these runs on their training and evaluation samples.

    Args:
        runs: The members of each run, which are not kept alive; the sums are of the tensors that their ensembles have
            now (`fit`).
    """

    def __init__(self, runs: Sequence[Members]) -> None:
        self._runs = [weakref.ref(run) for run in runs]
        self._of = _tensors(runs)
        self._first, count = dict[int, int](), 0
        for run in runs:
            self._first[id(run)] = count
            count += run.ensemble.members
        self._networks: list[Network | None] = [None] * count
        # training samples that are drawn anew for each measurement are held for one member at a time
        kept = all(run.experiment.data.train != "fresh" for run in runs)
        times = max(len(run.experiment.schedule) for run in runs)
        self._train = JointSums(partial(_all_passes, self._runs, "train"), times) if kept else None
        self._eval = JointSums(partial(_all_passes, self._runs, "eval"), times)

    @property
    def alone(self) -> bool:
        """Whether there is one run, which renews them itself."""
        return len(self._runs) == 1

    def fit(self) -> bool:
        """Whether the ensembles still have the tensors that they had when this was made."""
        now = _tensors(_alive(self._runs))
        return len(now) == len(self._of) and all(a is b for a, b in zip(now, self._of, strict=True))

    def network(self, run: Members, member: int) -> Network:
        """A member as a network that shares the ensemble's memory."""
        position = self._first[id(run)] + member
        found = self._networks[position]
        if found is None:
            found = self._networks[position] = run.ensemble.network(member)
        return found

    def renew(self, epoch: int) -> None:
        """Forget what was made, since members have changed; those that are measured at `epoch` are made together."""
        asked = [self._first[id(run)] + i for run in _alive(self._runs) for i in run.living(epoch)]
        for sums in (self._train, self._eval):
            if sums is not None:
                sums.renew(asked)

    def of(self, run: Members, member: int) -> Both:
        """Functions that give a member's sums on its training and its evaluation samples, or None if it has none."""
        position, train, held = self._first[id(run)] + member, self._train, self._eval
        return (lambda: None if train is None else train.of(position)), (lambda: held.of(position))


def _alive(runs: Sequence[weakref.ref[Members]]) -> list[Members]:
    found = [run for ref in runs if (run := ref()) is not None]
    assert len(found) == len(runs), "a run was let go while it was measured with others"
    return found


def _tensors(runs: Sequence[Members]) -> list[Tensor]:
    return [t for run in runs for named in (run.ensemble.values, run.ensemble.buffers) for t in named.values()]


def _all_passes(runs: Sequence[weakref.ref[Members]], on: Literal["train", "eval"]) -> list[Pass | None]:
    return [each for run in _alive(runs) for each in _passes(run, on)]


def _passes(run: Members, on: Literal["train", "eval"]) -> list[Pass | None]:
    """Each member's pass, as its `Response` would make it; None where no compiled pass serves it."""
    if run.student is not None:
        return [None] * run.ensemble.members
    found: list[Pass | None] = []
    for member, probe in enumerate(run.eval_probes if on == "eval" else run.trained_probes):
        network = run.sums.network(run, member)
        if not compiled_sums.serves(network, probe.inputs):
            found.append(None)
            continue
        taught = probe.taught if on == "eval" and isinstance(probe.teacher, Network) else []
        found.append(Pass(network, probe.inputs, probe.output, taught))
    return found
