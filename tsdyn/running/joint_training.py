"""Train several points of a sweep as one ensemble, if their shapes allow it."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tsdyn.engine.batches import Batches, Stream, finite_stream
from tsdyn.engine.ensemble import Ensemble, mark_dead
from tsdyn.engine.train import COMPILED, chosen, train_epoch
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import (
    new_at_every_step,
)
from tsdyn.running import estimates
from tsdyn.running.joint_sums import MemberSums
from tsdyn.running.members import Members

#: Points are small, and share the work of each epoch's beginning, if each takes at most so many multiply-adds, some
#: tens of milliseconds, and at most so many bytes; so many at most run at once, which is what a kill costs.
SMALL_WORK, SMALL_BYTES, SMALL_POINTS = 5e8, 4 << 20, 16


def ensemble_key(experiment: Experiment) -> object | None:
    """A key that is equal for experiments that can train as one ensemble (`JointTraining`); None if it cannot.

    It is equal if students have the same layers and take equally many steps of the same rule.  Learning rates, starts,
    teachers and data may differ.
    """
    training, student = experiment.training, experiment.student
    if experiment.kind != "training" or experiment.deep or training.method == "flow" or experiment.of_own_modules:
        return None
    if experiment.fork.parent is not None:  # points that branch off at different epochs do not step together
        return None
    return (
        experiment.dtype,
        experiment.student_widths,
        (student.activation, student.leak, student.bias),
        training.model_copy(update={"learning_rate": 0.0, "arguments": None}),
        json.dumps(training.arguments, sort_keys=True),
        experiment.steps,
        new_at_every_step(experiment),
        (experiment.data.train, experiment.data.augment) if training.whole else None,
        experiment.data.leave_out.subset is None,
    )


class JointTraining:
    """Members of several experiments of one `ensemble_key` and at one epoch, trained as one ensemble.

    Random draws of a member are the same as when it trains alone.  With the compiled step so are its bits; batched
    products may round otherwise when the ensemble is larger.

    Args:
        parts: The members of each run; their ensembles become views of one, and so do their training sets.

    Raises:
        ValueError: if the runs took different numbers of steps so far.
    """

    def __init__(self, parts: Sequence[Members]) -> None:
        self.parts = parts
        for part in parts:
            part.prepare()
        self.ensemble = Ensemble.joined([part.ensemble for part in parts])
        finite = [part.finite for part in parts] if not new_at_every_step(parts[0].experiment) else []
        self._finite = tuple(_stacked(each) for each in zip(*finite, strict=True))
        self._places: list[slice] = []
        stop = 0
        for part in parts:
            start, stop = stop, stop + len(part.teachers)
            self._places.append(slice(start, stop))
            part.ensemble = self.ensemble.block(self._places[-1])
            if self._finite:
                part.finite = (self._finite[0][start:stop], self._finite[1][start:stop])
        drawn = [part.drawn_by() for part in parts]
        #: for each part the first one whose data are drawn as its own are, and with them the batches
        self._like = [i if d is None else drawn.index(d) for i, d in enumerate(drawn)]
        self._sums = MemberSums(parts)
        for part in parts:
            part.measured_with(self._sums)
        self._sums.renew(0)

    def train(self, epoch: int) -> list[list[int]]:
        """Train the epoch that ends at `epoch`; returns, for each part, the seeds that died in it."""
        rates = [
            torch.full((len(p.teachers),), p.experiment.training.rate(epoch), dtype=torch.float64) for p in self.parts
        ]
        rule = replace(self.parts[0].rule(epoch), learning_rate=torch.cat(rates))
        train_epoch(self.ensemble, self._stream(epoch), rule, batch=self.parts[0].batch)
        died = mark_dead(self.ensemble, epoch)
        for part in self.parts:
            part.ensemble.steps = self.ensemble.steps
        self._sums.renew(epoch)
        return [
            [part.experiment.seed_labels[i - place.start] for i in died if place.start <= i < place.stop]
            for part, place in zip(self.parts, self._places, strict=True)
        ]

    def _stream(self, epoch: int) -> Stream:
        if not self._finite:
            return lambda members: self._fresh(members, epoch)
        rows: list[Tensor | None] = []
        for i, part in enumerate(self.parts):
            rows.append(part.rows(epoch) if self._like[i] == i else rows[self._like[i]])
        chosen = None if rows[0] is None else torch.cat([r for r in rows if r is not None])
        return finite_stream(self._finite[0], self._finite[1], chosen, steps=self.parts[0].experiment.steps)

    def _fresh(self, members: slice, epoch: int) -> Iterator[Batches]:
        at_once = self.parts[0].steps_at_once(members.stop - members.start)
        pieces = []
        for part, place in zip(self.parts, self._places, strict=True):
            first, last = max(members.start, place.start), min(members.stop, place.stop)
            if first < last:
                pieces.append(part.fresh(slice(first - place.start, last - place.start), epoch, at_once))
        for each in zip(*pieces, strict=True):
            inputs, targets = torch.cat([b.inputs for b in each]), torch.cat([b.targets for b in each])
            rows = torch.cat([b.rows for b in each if b.rows is not None])  # batches of new samples always have rows
            yield Batches(inputs, targets, rows, each[0].steps)


def keeps_bits(members: Members) -> bool:
    """Whether what each of the members becomes does not depend on who trains beside it, to the last bit."""
    return chosen(members.ensemble, members.rule(1)) is COMPILED


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Several tensors (member, sample, ...) concatenated along members; shorter ones are padded with NaN samples."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([
        torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1]), value=torch.nan) for part in parts
    ])  # fmt: skip


def group_points(
    points: Mapping[str, Experiment], workers: int, room: int, *, small: bool = False
) -> list[dict[str, Experiment]]:
    """Points divided into ensembles, each of one `ensemble_key`, at most `room` bytes and at most `_at_most` points.

    Args:
        points: Directory name → experiment.
        workers: Number of workers that share the groups; there are enough groups that none is idle.
        room: Memory of one worker, in bytes; a point that takes more is a group of its own.
        small: Whether only small points are put together, at most `SMALL_POINTS` of them.
    """
    share = min(_at_most(), -(-len(points) // workers))
    share = min(share, SMALL_POINTS) if small else share
    groups: list[dict[str, Experiment]] = []
    open_ones: dict[object, tuple[dict[str, Experiment], estimates.Footprint]] = {}
    for name, single in points.items():
        alone = estimates.footprint(single)
        kin = None if small and not _is_small(single, alone) else ensemble_key(single)
        group, held = open_ones.get(kin, ({}, estimates.Footprint()))
        if kin is None or not group or len(group) >= share or (held + alone).bytes > room:
            group, held = {}, estimates.Footprint()
            groups.append(group)
        group[name] = single
        open_ones[kin] = group, held + alone
    return groups


def beside(experiment: Experiment, runs: int) -> int:
    """How many of `runs` experiments of one shape train together unasked on a CPU."""
    small = _is_small(experiment, estimates.footprint(experiment)) and ensemble_key(experiment) is not None
    return min(runs, SMALL_POINTS, _at_most()) if small else 1


def _is_small(experiment: Experiment, footprint: estimates.Footprint) -> bool:
    training, data = experiment.training, experiment.data
    if experiment.kind != "training" or footprint.bytes > SMALL_BYTES:
        return False
    measured = data.eval + (data.train if isinstance(data.train, int) else data.eval)
    batch = data.train if training.whole and isinstance(data.train, int) else training.batch
    samples = 3 * batch * experiment.steps * training.epochs + measured * len(experiment.schedule)
    work = estimates.multiply_adds(experiment) * samples * len(experiment.seed_labels)
    return work <= SMALL_WORK


def _at_most() -> int:
    """The most points that one process may write at once: each keeps its lock file open, and joining opens more."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
