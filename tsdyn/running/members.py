"""The members of a training run: they are drawn, trained, measured, stored and restored together."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tsdyn import registers, schema
from tsdyn.engine import train
from tsdyn.engine.batches import Batches, Stream, finite_stream
from tsdyn.engine.ensemble import Ensemble, mark_dead
from tsdyn.engine.loss import loss, weighted
from tsdyn.engine.rule import Rule
from tsdyn.experiment import subsets
from tsdyn.experiment.errors import ExperimentError
from tsdyn.experiment.experiment import Experiment
from tsdyn.flow import epochs
from tsdyn.networks.any_module import Own
from tsdyn.networks.network import Network
from tsdyn.observables import layers, registry
from tsdyn.observables.member import Measurement, Probe
from tsdyn.problem import augmentation, input_files, targets
from tsdyn.problem.inputs import (
    batch_indices,
    evaluation_inputs,
    fresh_batches,
    labels,
    new_at_every_step,
    training_generator,
    training_inputs,
)
from tsdyn.problem.students import draw_student
from tsdyn.problem.teachers import draw_teacher
from tsdyn.running.joint_sums import MemberSums
from tsdyn.running.own_modules import Maker, made, makers, refuse_other_source
from tsdyn.running.protocol import Runnable, of_this_shape
from tsdyn.running.stopping import Watch

_log = logging.getLogger("tsdyn")
#: Fresh batches of a block of members are drawn this many bytes at a time.
FRESH_BYTES = 1 << 26
#: Students before training are kept for the next runs if their weights are so many numbers at most.
KEPT_NUMBERS = 1 << 16


@dataclass
class Members:
    """All members of a training run: teachers, data and the ensemble; a `tsdyn.running.protocol.Runnable`."""

    experiment: Experiment
    device: str = "cpu"
    student: Maker | None = None  #: makes a module of the user's own, as `teacher` does
    teacher: Maker | None = None

    def __post_init__(self) -> None:
        self._told: set[str] = set()
        self._sums: MemberSums | None = None
        given = self.student, self.teacher
        self.student, self.teacher = makers(self.experiment, student=self.student, teacher=self.teacher)
        if given[0] is None and self.student is not None:
            refuse_other_source(self.experiment, "student", self.student)
        if given[1] is None and self.teacher is not None:
            refuse_other_source(self.experiment, "teacher", self.teacher)
        stop = self.experiment.training.stop
        self._watch = None if stop is None else Watch.of(stop, len(self.experiment.seed_labels))
        if stop is not None and schema.variable(stop.variable).dims != ("seed", "epoch"):
            dims = ", ".join(schema.variable(stop.variable).dims)
            raise ExperimentError(
                f"training.stop.variable = {stop.variable!r}: has dimensions {dims}; take one of (seed, epoch)"
            )
        of, data = loss(self.experiment.training.loss), self.experiment.data
        if (data.noise and of.targets == "classes") or (data.flip and of.targets == "outputs"):
            raise ExperimentError(
                f"data: noise = {data.noise}, flip = {data.flip}: training.loss = {of.name!r} has {of.targets} as "
                "targets; noise is of outputs, flip of classes"
            )

    @cached_property
    def teachers(self) -> list[Network | Own]:
        return [self._teacher(seed).to(self.device) for seed in self.experiment.seed_labels]

    def _teacher(self, seed: int) -> Network | Own:
        if self.teacher is None:
            return draw_teacher(self.experiment, seed)
        module = made(self.teacher, self.experiment, seed, "teacher").requires_grad_(False)
        return Own(module, self.experiment.teacher.layers or ())

    @cached_property
    def ensemble(self) -> Ensemble:
        seeds = self.experiment.seed_labels
        if self.student is not None:
            return Ensemble.of([made(self.student, self.experiment, s, "student") for s in seeds], device=self.device)
        return Ensemble.of(self._starts if self.started_by() is None else self.starts, device=self.device)

    @property
    def _starts(self) -> list[Network]:
        pairs = zip(self.experiment.seed_labels, self.teachers, strict=True)
        taught = [(seed, None if isinstance(t, Own) else t.to("cpu")) for seed, t in pairs]
        return [draw_student(self.experiment, seed, t) for seed, t in taught]

    @cached_property
    def starts(self) -> list[Network]:
        """The students before training, kept for other runs that start alike (`started_by`)."""
        return self._starts

    @cached_property
    def eval_probes(self) -> list[Probe]:
        pairs = zip(self.experiment.seed_labels, self.teachers, strict=True)
        draws = [(evaluation_inputs(self.experiment, seed), t, self._labels(seed, "eval")) for seed, t in pairs]
        return [Probe(self._tensor(x), t, labels) for x, t, labels in draws]

    @cached_property
    def _left_out(self) -> Tensor | None:
        """Indices of the samples that are not trained on (``data.leave_out``); None if all are."""
        subset = self.experiment.data.leave_out.subset
        return None if subset is None else torch.from_numpy(subsets.left_out(self.experiment.data, subset))

    @cached_property
    def trained_probes(self) -> list[Probe]:
        """`_finite_probes` without the samples that are left out."""
        if self._left_out is None:
            return self._finite_probes
        found = []
        for probe, teacher in zip(self._finite_probes, self.teachers, strict=True):
            kept = torch.ones(len(probe.inputs), dtype=torch.bool, device=probe.inputs.device)
            kept[self._left_out] = False
            own = None if probe.labels is None else probe.labels[kept]
            found.append(
                Probe(probe.inputs[kept], teacher, own, None if probe.targets is None else probe.targets[kept])
            )
        return found

    @cached_property
    def finite(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the training sets, (member, sample, ...); NaN beyond a member's own samples."""
        inputs = [probe.inputs for probe in self._finite_probes]
        aims = [
            self.targets(member, probe.inputs) if probe.targets is None else probe.targets
            for member, probe in enumerate(self._finite_probes)
        ]
        if self._left_out is not None:
            weights = torch.ones(len(aims[0]), 1, dtype=aims[0].dtype, device=aims[0].device)
            weights[self._left_out] = 0
            aims = [torch.cat([aim, weights], 1) for aim in aims]
        padded = (pad_sequence(each, batch_first=True, padding_value=torch.nan) for each in (inputs, aims))
        return next(padded), next(padded)

    @property
    def sums(self) -> MemberSums:
        """The members' compiled sums, made side by side: with those of other runs while they train together."""
        if self._sums is None or not self._sums.fit():
            self._sums = MemberSums([self])
        return self._sums

    def measured_with(self, sums: MemberSums) -> None:
        """Have the members' sums made with those of other runs, whose owner renews them."""
        self._sums = sums

    def living(self, epoch: int) -> list[int]:
        """Members that are measured at `epoch`: those that live and had not stopped before."""
        ended, stopped = self.ensemble.death_epoch.tolist(), self.ensemble.stop_epoch.tolist()
        return [i for i, (d, s) in enumerate(zip(ended, stopped, strict=True)) if d < 0 and not 0 <= s < epoch]

    def drawn_by(self) -> tuple[object, ...] | None:
        """All that teachers and data are drawn by: equal for members whose teachers and data have the same bits.

        None where files, modules of the user's own or parts of other packages have a say.
        """
        e = self.experiment
        foreign = registers.LAWS.foreign(e.data.law) or registers.TEACHERS.foreign(e.teacher.init)
        if foreign or self.student is not None or self.teacher is not None or input_files.files(e):
            return None
        of_student = e.student_widths, e.student.activation, e.student.leak
        return (e.seed_labels, e.dtype, e.teacher, e.data, e.fork, of_student, e.training.loss, e.training.labels,
                self.device)  # fmt: skip

    def started_by(self) -> tuple[object, ...] | None:
        """All that students are drawn by, as `drawn_by`; None also where they are too large to be kept."""
        e, drawn = self.experiment, self.drawn_by()
        if drawn is None or registers.STARTS.foreign(e.student.init):
            return None
        numbers = sum(math.prod(shape) for shape in e.weight_shapes(e.student_widths)) * len(e.seed_labels)
        return (*drawn, e.student, e.training.normalize) if numbers <= KEPT_NUMBERS else None

    def draw(self) -> None:
        """Draw the students and, if it is finite, the training data."""
        _ = self.ensemble
        if not new_at_every_step(self.experiment):
            _ = self.finite

    def targets(self, member: int, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """The clean targets of a member on its inputs `x`, (sample, output).

        These are the teacher's outputs; for a loss of classes one-hot rows of `classes`, of the data's labels (`x` must
        then be the training set) or of the teacher's largest output.
        """
        training = self.experiment.training
        output = self._taught(member, x)
        if training.of_data and classes is None:
            classes = self._finite_probes[member].labels
        return loss(training.loss).target(output, classes)

    def _taught(self, member: int, x: Tensor) -> Tensor:
        """The outputs of a member's teacher on `x`, (sample, output)."""
        teacher = self.teachers[member]
        with torch.no_grad():
            return teacher.output(x) if isinstance(teacher, Network) else teacher(x)

    def _labels(self, seed: int, part: Literal["train", "eval"]) -> Tensor | None:
        """The data's own labels, if the loss or a recorded variable needs them, else None."""
        asked = "label_accuracy" in schema.expand(self.experiment.record.observables)
        if not asked and not self.experiment.training.of_data:
            return None
        return self._tensor(labels(self.experiment, seed, part))

    @cached_property
    def _finite_probes(self) -> list[Probe]:
        found = []
        for member, (seed, teacher) in enumerate(zip(self.experiment.seed_labels, self.teachers, strict=True)):
            x, own = self._training_set(seed, teacher), self._labels(seed, "train")
            found.append(Probe(x, teacher, own, self._spoiled(member, x, own)))
        return found

    def _spoiled(self, member: int, x: Tensor, own: Tensor | None, epoch: int = 0) -> Tensor | None:
        """The targets on training inputs `x` with noise or wrong classes; None if the experiment has neither."""
        if not targets.spoils(self.experiment):
            return None
        classes = own if self.experiment.training.labels == "data" else None
        clean = loss(self.experiment.training.loss).target(self._taught(member, x), classes)
        return targets.of_training_set(self.experiment, self.experiment.seed_labels[member], clean, epoch)

    def _training_set(self, seed: int, teacher: Network | Own) -> Tensor:
        if isinstance(teacher, Network) and teacher.plain and self.student is None:
            return augmentation.training_set(self.experiment, seed, teacher)
        return self._tensor(training_inputs(self.experiment, seed))

    def train_probe(self, member: int, epoch: int) -> Probe:
        """The samples on which this member's training quantities are measured, with the teacher's trace."""
        if self.experiment.data.train != "fresh":
            return self.trained_probes[member]
        seed = self.experiment.seed_labels[member]
        x = self._tensor(training_inputs(self.experiment, seed, epoch))
        return Probe(x, self.teachers[member], targets=self._spoiled(member, x, None, epoch))

    def stream(self, epoch: int) -> Stream:
        """Batches of the epoch that ends at `epoch`."""
        if new_at_every_step(self.experiment):
            return lambda members: self.fresh(
                members, epoch, self.steps_at_once(len(range(len(self.teachers))[members]))
            )
        found = finite_stream(*self.finite, self.rows(epoch), steps=self.experiment.steps)
        if self.student is None:
            return found
        return lambda members: (replace(batches, noises=self._noises(members, epoch)) for batches in found(members))

    def _noises(self, members: slice, epoch: int) -> tuple[np.random.Generator, ...]:
        """The generators from which dropout layers of own modules draw in that epoch."""
        seeds = self.experiment.seed_labels[members]
        return tuple(training_generator(self.experiment, seed, "dropout", epoch) for seed in seeds)

    def rows(self, epoch: int) -> Tensor | None:
        """Indices of samples in each batch of that epoch, (member, step, batch); None: every step uses all samples."""
        if self.experiment.training.whole:
            return None
        pairs = zip(self.experiment.seed_labels, self._finite_probes, strict=True)
        draws = [batch_indices(self.experiment, seed, epoch, len(probe.inputs)) for seed, probe in pairs]
        return torch.from_numpy(np.stack(draws))

    def steps_at_once(self, members: int) -> int:
        """How many steps' new samples are drawn at once for this many members."""
        step = members * self.experiment.training.batch * self.experiment.layout.input_width * 8
        return max(1, FRESH_BYTES // step)

    def fresh(self, members: slice, epoch: int, steps_at_once: int) -> Iterator[Batches]:
        """Batches of new samples, no sample in two of them, drawn some steps at a time."""
        seeds = self.experiment.seed_labels[members]
        classes = self._shown(members, epoch) if self.experiment.training.of_data else [None] * len(seeds)
        taken = 0
        pieces = [fresh_batches(self.experiment, seed, epoch, steps_at_once=steps_at_once) for seed in seeds]
        noises = [training_generator(self.experiment, seed, "noise", epoch) for seed in seeds]
        dropped = self._noises(members, epoch) if self.student is not None else ()
        for draws in zip(*pieces, strict=True):
            steps, batch, _ = draws[0].shape
            x = torch.stack([self._tensor(draw) for draw in draws]).flatten(1, 2)  # (member, sample, input)
            own = range(*members.indices(len(self.teachers)))
            clean = [
                self.targets(member, part, None if shown is None else shown[taken : taken + steps].flatten())
                for member, part, shown in zip(own, x, classes, strict=True)
            ]
            y = torch.stack([
                targets.spoiled(self.experiment, each, noise) for each, noise in zip(clean, noises, strict=True)
            ])  # fmt: skip
            taken += steps
            rows = torch.arange(steps * batch).view(1, steps, batch).expand(len(seeds), -1, -1)
            yield Batches(x, y, rows, steps, dropped)

    def _shown(self, members: slice, epoch: int) -> list[Tensor]:
        """Labels of the samples of each step of the epoch, one tensor (step, batch) per member."""
        found = []
        for seed, probe in zip(self.experiment.seed_labels[members], self._finite_probes[members], strict=True):
            assert probe.labels is not None
            rows = batch_indices(self.experiment, seed, epoch, len(probe.labels))
            found.append(probe.labels[torch.from_numpy(rows).to(probe.labels.device)])
        return found

    def measure(self, epoch: int, variables: tuple[str, ...]) -> dict[str, Any]:
        """Measurements of all members: variable → (seed,), or one array (seed, node...) per layer.

        NaN for the dead, and for those that stopped before.  Members whose watched variable says so stop here.
        """
        found: list[dict[str, Any] | None] = [None] * self.ensemble.members
        sums = self.sums
        if sums.alone:
            sums.renew(epoch)
        for member in self.living(epoch):
            view = Measurement(
                self._student(member, sums),
                self.train_probe(member, epoch),
                self.eval_probes[member],
                self.experiment.record.band,
                self.experiment.layout,
                loss(self.experiment.training.loss),
                self.experiment.training.labels,
                *sums.of(self, member),
            )
            found[member] = registry.measure(variables, view)
            self._tell_odd(found[member] or {}, member, epoch)
        records = {name: self._stacked(name, [None if f is None else f[name] for f in found]) for name in variables}
        if self._watch is not None and self._watch.stop.variable in records:
            ensemble = self.ensemble
            self._watch.look(records[self._watch.stop.variable], ensemble.stop_epoch, ensemble.idle, epoch)
        return records

    def _tell_odd(self, record: Mapping[str, Any], member: int, epoch: int) -> None:
        """Log, once for each, which observables that are not tsdyn's own are NaN or infinite."""
        for name in set(record) - set(registry.OBSERVABLES) - self._told:
            parts = record[name] if isinstance(record[name], list) else [record[name]]
            if not all(np.isfinite(part).all() for part in parts):
                self._told.add(name)
                _log.warning(
                    "%s: observable %r is NaN or infinite for seed %d at epoch %d; it is recorded as it is",
                    self.experiment.name, name, self.experiment.seed_labels[member], epoch,
                )  # fmt: skip

    def _student(self, member: int, sums: MemberSums) -> Network | Own:
        if self.student is None:
            return sums.network(self, member)
        return Own(self.ensemble.module(member), self.experiment.student.layers or ())

    def _stacked(self, name: str, values: list[Any]) -> Any:
        variable, dtype, layout = schema.variable(name), self.experiment.dtype, self.experiment.layout

        def beside(parts: list[Any], layer: int | None) -> np.ndarray:
            if any(part is None for part in parts):
                nothing = np.full(layout.block(variable, layer), np.nan, dtype)
                parts = [nothing if part is None else part for part in parts]
            return np.stack(parts)

        if not variable.layered:
            return beside([None if v is None else np.asarray(v, dtype) for v in values], None)
        depth = max((len(v) for v in values if v is not None), default=0)
        return [beside([None if v is None else v[i] for v in values], i + 1) for i in range(depth)]

    def constants(self) -> dict[str, Any]:
        """The teachers' parameters, one array (seed, node...) per layer; for the user's own modules (seed, entry)."""
        own = [t for t in self.teachers if isinstance(t, Own)]
        found: dict[str, Any] = {"teacher_parameter": np.stack([t.entries().cpu().numpy() for t in own])} if own else {}
        if "teacher_weight" not in self.experiment.constants:
            return found
        each = [_weights(teacher) for teacher in self.teachers]
        weights = [np.stack([w.cpu().numpy() for w, _ in layer]) for layer in zip(*each, strict=True)]
        biases = [
            np.stack([(w.new_zeros(len(w)) if b is None else b).cpu().numpy() for w, b in layer])
            for layer in zip(*each, strict=True)
        ]
        return found | {"teacher_weight": weights, "teacher_bias": biases}

    def outcome(self) -> dict[str, Any]:
        """``stop_epoch``, if members may stop; a training run has no other variables that are only known at its end."""
        if self._watch is None:
            return {}
        at = self.ensemble.stop_epoch.numpy()
        return {"stop_epoch": np.where(at < 0, np.nan, at).astype(self.experiment.dtype)}

    def state(self) -> dict[str, np.ndarray]:
        """All that the next epoch depends on; random draws need no state, since they are keyed by (seed, epoch).

        Optimiser moments are included from the start, so that a run killed after its first commit can be resumed.
        """
        self.prepare()
        if self._watch is None:
            return self.ensemble.state()
        return self.ensemble.state() | {"stop_epoch": self.ensemble.stop_epoch.numpy().copy(), **self._watch.state()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Set the members to a stored state.

        Raises:
            StateError: if it is not a state of these members.
        """
        self.ensemble.restore(of_this_shape(state, self.state()))
        if self._watch is not None:
            self.ensemble.stop_epoch.copy_(torch.from_numpy(np.array(state["stop_epoch"])))
            self._watch.restore(state)

    def prepare(self) -> None:
        """Give the members the moments that training needs."""
        self.ensemble.prepare(Rule.of(self.experiment.training, 1).optimizer.moments)

    def rule(self, step: int) -> Rule:
        """The rule of the epoch that ends at `step`, with the loss of the samples that are kept."""
        rule = Rule.of(self.experiment.training, step)
        return rule if self._left_out is None else replace(rule, loss=weighted(rule.loss))

    def advance(self, step: int) -> list[int]:
        """Train the epoch that ends at `step`; returns the seeds that died in it."""
        rule = self.rule(step)
        if self.experiment.training.method == "flow":
            lasting = self.experiment.training.rate(step) * self.experiment.steps
            epochs.train_epoch(self.ensemble, list(zip(*self.finite, strict=True)), rule, time=lasting)
        else:  # every other method, a package's own too, takes the steps of its rule
            try:
                train.train_epoch(self.ensemble, self.stream(step), rule, batch=self.batch)
            except (ValueError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # the user's own code raises errors of every type
                if self.student is None:
                    raise
                raise ExperimentError(
                    f"student: {self.experiment.student.module} raised {type(error).__name__} while it was trained in "
                    f"epoch {step}: {error}"
                ) from error
        return self.mark_dead(step)

    def fallbacks(self) -> list[str]:
        """Why the members are not trained by compiled code, where that could be."""
        if self.experiment.training.method == "flow":
            return []  # the integrator is torch's everywhere
        return train.fallbacks(self.ensemble, self.rule(1))

    def mark_dead(self, epoch: int) -> list[int]:
        """Mark members whose parameters became NaN or infinite in `epoch` as dead; returns their seeds."""
        return [self.experiment.seed_labels[i] for i in mark_dead(self.ensemble, epoch)]

    @property
    def batch(self) -> int:
        """Samples per step."""
        return len(self.finite[0][0]) if self.experiment.training.whole else self.experiment.training.batch

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


class Shared:
    """Hands on what members drew, to those of the next run where the draws are the same: points of one sweep."""

    def __init__(self) -> None:
        self._latest: Members | None = None

    def hand_on(self, members: Runnable) -> None:
        """Give `members`, which drew nothing yet, what the latest ones drew; of others it is let go before they draw.

        The latest ones, at their end, hold nothing but what they drew and their parameters.
        """
        latest, self._latest = self._latest, members if isinstance(members, Members) else None
        if latest is None or self._latest is None:
            return
        asked, started = self._latest.drawn_by(), self._latest.started_by()
        if asked is not None and asked == latest.drawn_by():
            held = ["teachers", "eval_probes", "_finite_probes", "trained_probes", "finite"]
            held += ["starts"] if started is not None and started == latest.started_by() else []
            self._latest.__dict__ |= {name: latest.__dict__[name] for name in held if name in latest.__dict__}


def _weights(teacher: Network | Own) -> list[tuple[Tensor, Tensor | None]]:
    if isinstance(teacher, Own):
        return layers.weights_of(teacher.module, teacher.layers)
    return [(w.flatten(1), b) for w, b in zip(teacher.weights, teacher.biases, strict=True)]
