"""The derivatives of one block of members: replay, reverse pass, and the certificate's forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

from tsdyn import registers
from tsdyn.engine.ensemble import Ensemble, Named
from tsdyn.engine.loss import loss
from tsdyn.engine.rule import of_members
from tsdyn.experiment.experiment import Experiment
from tsdyn.problem.inputs import generator
from tsdyn.problem.students import draw_student
from tsdyn.running import packages
from tsdyn.running.members import Members
from tsdyn.running.own_modules import Maker
from tsdyn.through_training.adjoint import Sums, Wanted, forward_pass, reverse_pass
from tsdyn.through_training.certificate import Direction, Reach, forward_tangent, gated, kinked, winners_reach
from tsdyn.through_training.observed import Observed, Of, Student, observed
from tsdyn.through_training.replay import Course, KeptStates
from tsdyn.through_training.steps import Inputs, OwnModule, State, forward
from tsdyn.through_training.teaching import Teachers

#: Called with the number of steps done.
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What is computed of a block of members of one run; it can be sent to another process.

    Attributes:
        experiment: Without a sweep, of these seeds alone.
        epoch: Of the observable.
        of: The observable as asked for.
        wrt: In what it is differentiated.
        recorded: Epoch → name → recorded parameters (member, ...).
        certificate: Whether to compute radius and tangent growth.
        smoothed: How many starts to average over; 0 for the run itself.
        spread: Their standard deviation, relative to the root mean square of each of the start's tensors.
        student, teacher: Makers of modules of the user's own.
        device: Device on which it is computed.
        room: Bytes in which all states of a block may be kept.
        kept: States that the archive keeps along the way.
        states: How many states are held at once, at least.
        parts: What the experiment names and only the sending process has.
    """

    experiment: Experiment
    epoch: int
    of: Of
    wrt: tuple[str, ...]
    recorded: Mapping[int, Mapping[str, np.ndarray]]
    certificate: bool = True
    smoothed: int = 0
    spread: float = 0.0
    student: Maker | None = None
    teacher: Maker | None = None
    device: str = "cpu"
    room: int = 0
    kept: KeptStates | None = None
    states: int = 0
    parts: tuple[registers.Sent, ...] = ()

    @property
    def bytes(self) -> int:
        """What `states` take, without optimizer moments."""
        named = next(iter(self.recorded.values()), {})
        return self.states * sum(8 * array.size for array in named.values())

    @property
    def passes(self) -> int:
        """How many times it goes through all steps, there or back."""
        return 2 * (1 + self.smoothed) + (len(self.wrt) if self.certificate else 0)


@dataclass
class Found:
    """Results of a block, numpy arrays (member, ...); names as in the Dataset, but one array per layer in a list.

    Attributes:
        slopes: Derivatives: name → array, or one per layer (None where a layer has none).
        errors: Standard errors of those over starts, if `smoothed`.
        value: The observable.
        difference, compared: Largest difference to the recorded weights, and the last epoch that was compared.
        radius: (member, wrt, side), NaN without gates.
        kinks: As `radius`, of the samples that the observable is measured on; NaN where these are not known, too.
        growth: (member, wrt, epoch 1..T).
        gated: Whether there is anything that flips.
        way: ``"compiled"``, or ``"general"`` with the reason: how the reverse pass was made.
        begun: Epochs whose state the archive holds, from which it was trained again.
    """

    slopes: dict[str, np.ndarray | list[np.ndarray | None]]
    value: np.ndarray
    difference: np.ndarray
    compared: int
    errors: dict[str, np.ndarray | list[np.ndarray | None]] = field(default_factory=dict)
    radius: np.ndarray | None = None
    kinks: np.ndarray | None = None
    growth: np.ndarray | None = None
    gated: bool = False
    way: str = ""
    begun: list[int] = field(default_factory=list)


@dataclass
class _Slope:
    """The observable of each member and its derivatives in what it is computed from directly."""

    value: Tensor
    state: State
    teacher: Named | None
    input: Tensor | None
    target: Tensor | None


def compute(job: Job, tick: Tick | None = None) -> Found:
    """Derivatives and certificate of a block of members.

    Raises:
        ReplayError: if the replayed run is not the recorded one.
        ExperimentError: if something cannot be differentiated.
    """
    with packages.known(job.parts):
        return _computed(job, tick)


def _computed(job: Job, tick: Tick | None) -> Found:
    """`compute` where all parts of the experiment are known."""
    block = Block(job)
    course = block.course(recorded=True)
    start = course.state()
    sums, slope, teacher, way = block.derivative(course, tick)
    found = Found(
        block.named(sums, teacher), _numbers(slope.value), course.difference.copy(), course.compared,
        gated=gated(course) or block.observed.maximum, way=way, begun=course.known_epochs,
    )  # fmt: skip
    if job.certificate:
        found.radius, found.kinks, found.growth = block.certificate(course, start, sums, teacher, tick)
    if job.smoothed:
        found.slopes, found.errors = _averaged(block, start, tick)
    gone = np.isnan(found.value)
    for array in found.slopes.values():
        for each in array if isinstance(array, list) else [array]:
            if each is not None:
                each[gone] = np.nan
    return found


class Block:
    """Members, their teachers and the observable of a job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.members = Members(job.experiment, job.device, job.student, job.teacher)
        self.members.draw()
        self.observed: Observed = observed(job.of, job.experiment)
        self.teachers = Teachers(self.members)

    def course(self, *, recorded: bool) -> Course:
        """The course of the members from their start."""
        held = self.job.recorded if recorded else {}
        named = {
            e: {n: torch.from_numpy(np.array(a)).to(self.job.device) for n, a in by_name.items()}
            for e, by_name in held.items()
        }
        return Course(self.members, self.job.epoch, named, kept=self.job.kept if recorded else None)

    # --- the derivative --------------------------------------------------------------------------------------

    def derivative(self, course: Course, tick: Tick | None) -> tuple[Sums, _Slope, Named | None, str]:
        """Goes to the end and back: the derivatives, the observable, that in the teacher if asked for, and the way."""
        wrt = self.job.wrt
        kept = forward_pass(course, tick, self.job.room)
        slope, way = self._slope(course, kept.end), kept.way
        teacher = slope.teacher

        def of_target(count: int, part: Tensor, given: Inputs) -> None:
            assert teacher is not None
            for name, more in self.teachers.pulled(given.input, part).items():
                teacher[name] += more

        taught = "teacher" in wrt
        sums = reverse_pass(
            course,
            kept,
            slope.state,
            Wanted(
                "learning_rate" in wrt,
                "sample" in wrt,
                "target" in wrt or (taught and not course.fresh),
                "input" in wrt,
                of_target if taught and course.fresh else None,
            ),
            tick,
        )
        if sums.target is not None and slope.target is not None:
            sums.target += slope.target
        if sums.input is not None and slope.input is not None:
            sums.input += slope.input
        if taught and not course.fresh:
            assert sums.target is not None
            assert teacher is not None
            for name, more in self.teachers.pulled(course.finite[0], sums.target).items():
                teacher[name] += more
        return sums, slope, teacher, way

    def _student(self, course: Course, i: int, state: State, teacher: Named | None, train: bool) -> Student:
        members, kind = self.members, course.kind
        probe = members.eval_probes[i]
        if isinstance(kind, OwnModule):
            kind = OwnModule(kind.module, {n: t[i] for n, t in kind.fixed.items()})
        return Student(
            kind,
            dict(state.values),
            dict(state.buffers),
            self.teachers.one(i, teacher),
            probe.inputs.double(),
            probe.labels if self.job.experiment.training.of_data else None,
            (course.finite[0][i], course.finite[1][i]) if train else None,
            loss(self.job.experiment.training.loss),
        )

    def values(self, course: Course, end: State, teacher: Named | None = None) -> Tensor:
        """The observable of every member at a last state, (member,); with moved teachers if they are given."""
        found = []
        on_train = self.job.experiment.data.train != "fresh" and not course.fresh
        for i in range(course.ensemble.members):
            theirs = None if teacher is None else {n: t[i] for n, t in teacher.items()}
            # a function of the user's own is asked for its gradient, too
            mine = self._one(end, i).map(lambda t: t.detach().clone().requires_grad_())
            found.append(self.observed.value(self._student(course, i, mine, theirs, on_train)).detach())
        return torch.stack(found)

    def _one(self, state: State, i: int) -> State:
        return State({n: t[i] for n, t in state.values.items()}, {n: t[i] for n, t in state.buffers.items()}, {})

    def _slope(self, course: Course, end: State) -> _Slope:
        """The observable at the last state, and its derivatives in what it is computed from, one member at a time."""
        state, values = end.map(torch.zeros_like), []
        taught = "teacher" in self.job.wrt and self.observed.teaches
        teacher = None
        if "teacher" in self.job.wrt:
            assert self.teachers.values is not None
            teacher = {n: torch.zeros_like(t) for n, t in self.teachers.values.items()}
        on_train = self.job.experiment.data.train != "fresh" and not course.fresh
        x, y = (torch.zeros_like(t) for t in course.finite) if on_train else (None, None)
        for i in range(course.ensemble.members):
            mine = self._one(end, i).map(lambda t: t.detach().clone().requires_grad_())
            theirs = None
            if taught:
                assert self.teachers.values is not None
                theirs = {n: t[i].detach().clone().requires_grad_() for n, t in self.teachers.values.items()}
            student = self._student(course, i, mine, theirs, on_train)
            seen: list[Tensor] = []
            if student.train is not None and x is not None:
                seen = [t.detach().clone().requires_grad_() for t in student.train]
                student = _with_train(student, seen)
            with torch.enable_grad():
                value = self.observed.value(student)
            values.append(value.detach())
            if bool(value.detach().isnan()):
                continue
            leaves = [*mine.values.values(), *mine.buffers.values(), *(theirs or {}).values(), *seen]
            slopes = iter(torch.autograd.grad(value, leaves, allow_unused=True))
            for total, held in ((state.values, mine.values), (state.buffers, mine.buffers), (teacher, theirs or {})):
                for name in held:
                    _put(total, name, i, next(slopes))
            for sums, slope in zip((x, y), slopes, strict=False):
                if sums is not None and slope is not None:
                    sums[i] = slope.nan_to_num(0.0)
        return _Slope(torch.stack(values), state, teacher, x, y)

    # --- names -----------------------------------------------------------------------------------------------

    def named(self, sums: Sums, teacher: Named | None) -> dict[str, np.ndarray | list[np.ndarray | None]]:
        """The derivatives by their names in the Dataset."""
        found: dict[str, np.ndarray | list[np.ndarray | None]] = {}
        if "start" in self.job.wrt:
            found |= _layered(self.members.ensemble, sums.start.values, "d_start")
        for name in ("sample", "target", "input", "learning_rate"):
            part = getattr(sums, name)
            if name in self.job.wrt and part is not None:
                found[f"d_{name}"] = _numbers(part)
        if teacher is not None:
            found |= _layered(None, teacher, "d_teacher")
        if "scale" in self.job.wrt:
            found["d_scale"] = _numbers(_dot(sums.start.values, self._by_scale()))
        return found

    def _by_scale(self) -> Named:
        """dθ_0/d scale of every member: a start drawn at twice the scale minus the start, which is linear in it."""
        experiment = self.job.experiment.replace({"dtype": "float64"})
        scale = experiment.student.scale
        twice = experiment.replace({"student.scale": 2 * scale})
        pairs = [[draw_student(e, seed) for seed in e.seed_labels] for e in (experiment, twice)]
        one, two = (Ensemble.of(each, device=self.job.device).values for each in pairs)
        return {n: (two[n] - one[n]) / scale for n in one}

    # --- the certificate -------------------------------------------------------------------------------------

    def certificate(
        self, course: Course, start: State, sums: Sums, teacher: Named | None, tick: Tick | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Radius, that of the observable's kinks (member, wrt, side), and growth (member, wrt, epoch), along each
        normalised derivative.
        """
        radii, kinks, growths = [], [], []
        flips = gated(course)
        for name in self.job.wrt:
            direction, taught, length = self.direction(name, course, start, sums, teacher)
            found = forward_tangent(course, start, direction, tick)
            sides = torch.stack([found.reach.plus, found.reach.minus], 1)
            if self.observed.maximum:
                sides = torch.minimum(sides, self._winners(course, found.end, taught))
            if not flips and not self.observed.maximum:
                sides = torch.full_like(sides, torch.nan)
            sides[length == 0] = torch.nan
            own = self._kinks(course, found.end, direction)
            own[length == 0] = torch.nan
            radii.append(_numbers(sides))
            kinks.append(_numbers(own))
            growths.append(_numbers(found.growth[:, 1:]))
        return np.stack(radii, 1), np.stack(kinks, 1), np.stack(growths, 1)

    def direction(
        self, name: str, course: Course, start: State, sums: Sums, teacher: Named | None
    ) -> tuple[Direction, Named | None, Tensor]:
        """The normalised derivative as a direction, its part in the teacher, and the derivative's length."""
        if name == "start":
            unit, length = _unit(sums.start.values)
            return Direction(start.map(torch.zeros_like)._replace(values=unit)), None, length
        if name == "scale":
            by_scale = self._by_scale()
            slope = _dot(sums.start.values, by_scale)
            along = {n: t * slope.sign().view(-1, *[1] * (t.ndim - 1)) for n, t in by_scale.items()}
            return Direction(start.map(torch.zeros_like)._replace(values=along)), None, slope.abs()
        if name == "teacher":
            assert teacher is not None
            unit, length = _unit(teacher)
            if course.fresh:
                return Direction(of_target=lambda _, given: self.teachers.pushed(given.input, unit)), unit, length
            return Direction(target=self.teachers.pushed(course.finite[0], unit)), unit, length
        held: dict[str, Tensor | None] = {
            "learning_rate": sums.learning_rate,
            "sample": sums.sample,
            "target": sums.target,
            "input": sums.input,
        }
        part = held[name]
        assert part is not None
        by_name, length = _unit({name: part})
        parts = {key: by_name.get(key) for key in held}
        return (
            Direction(None, parts["learning_rate"], parts["sample"], parts["target"], parts["input"]), None, length
        )  # fmt: skip

    def _kinks(self, course: Course, tangent: State, direction: Direction) -> Tensor:
        """How far no sample that the observable is measured on crosses a kink of a hidden node, (member, side)."""
        end, kind = course.state(), course.kind
        sides = torch.full((course.ensemble.members, 2), torch.nan, dtype=torch.float64)
        if not kinked(kind) or self.observed.samples is None:
            return sides
        for i in range(len(sides)):
            if self.observed.samples == "train":
                x, moved = course.finite[0][i], None if direction.input is None else direction.input[i]
                there = ~x.isnan().any(1)
                x, moved = x[there], None if moved is None else moved[there]
            else:
                x, moved = self.members.eval_probes[i].inputs.double(), None
            dot = torch.zeros_like(x) if moved is None else moved
            held = [self._one(state, i).map(lambda t: t.unsqueeze(0)) for state in (end, tangent)]

            def hidden(state: State, x: Tensor) -> list[Tensor]:
                return forward(kind, state.values, state.buffers, x.unsqueeze(0), training=False)[2]

            reach = Reach.whole(1, x)
            values, dots = jvp(hidden, (held[0], x), (held[1], dot))[:2]
            for value, along in list(zip(values, dots, strict=True))[: self.observed.depth]:
                reach.see(value, along)
            sides[i] = torch.stack([reach.plus[0], reach.minus[0]])
        return sides

    def _winners(self, course: Course, tangent: State, teacher: Named | None) -> Tensor:
        """How far the maxima of the observable keep their winners, (member, side)."""
        end, sides = course.state(), []
        for i in range(course.ensemble.members):
            mine, dots = self._one(end, i), self._one(tangent, i)
            own = {} if self.teachers.values is None else {n: t[i] for n, t in self.teachers.values.items()}
            along = {n: torch.zeros_like(t) if teacher is None else teacher[n][i] for n, t in own.items()}

            def scores(state: State, theirs: Named) -> Tensor:
                taught = theirs or None
                return self.observed.scores(self._student(course, i, state, taught, False))  # noqa: B023

            sides.append(winners_reach(*jvp(scores, (mine, own), (dots, along))))
        return torch.tensor(sides, dtype=torch.float64)


def _with_train(student: Student, seen: list[Tensor]) -> Student:
    x, y = seen
    return Student(
        student.kind, student.values, student.buffers, student.teacher, student.inputs, student.classes, (x, y),
        student.loss,
    )  # fmt: skip


def _put(total: Named | None, name: str, member: int, slope: Tensor | None) -> None:
    if total is not None and slope is not None:
        total[name][member] = slope


def _averaged(
    block: Block, start: State, tick: Tick | None
) -> tuple[dict[str, np.ndarray | list[np.ndarray | None]], dict[str, np.ndarray | list[np.ndarray | None]]]:
    """Mean and standard error of the derivatives over starts θ_0 + s ξ with keyed Gaussian ξ."""
    each = []
    for draw in range(1, block.job.smoothed + 1):
        course = block.course(recorded=False)
        values = {n: t.clone() for n, t in start.values.items()}
        for i, seed in enumerate(block.job.experiment.seed_labels):
            rng = generator(seed, "student", draw)  # runs draw their start at epoch 0 of this stream
            for name, tensor in values.items():
                xi = torch.from_numpy(rng.standard_normal(tuple(tensor[i].shape))).to(tensor)
                values[name][i] += block.job.spread * start.values[name][i].square().mean().sqrt() * xi
        course.go_to(start._replace(values=values), 0)
        sums, _, teacher, _ = block.derivative(course, tick)
        each.append(block.named(sums, teacher))

    def over(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray | list[np.ndarray | None]]:
        made: dict[str, np.ndarray | list[np.ndarray | None]] = {}
        for name, first in each[0].items():
            beside: list[Any] = [e[name] for e in each]
            if isinstance(first, list):
                layers = range(len(first))
                made[name] = [None if first[k] is None else change(np.stack([b[k] for b in beside])) for k in layers]
            else:
                made[name] = change(np.stack(beside))
        return made

    count = len(each)
    return over(lambda a: a.mean(0)), over(lambda a: a.std(0, ddof=1) / np.sqrt(count) if count > 1 else a[0] * np.nan)


def _layered(ensemble: Ensemble | None, named: Named, name: str) -> dict[str, np.ndarray | list[np.ndarray | None]]:
    """Parameters by name, (member, ...), as lists over layers; of modules one vector (member, entry)."""
    if ensemble is not None and isinstance(ensemble.architecture, torch.nn.Module):
        return {name: _numbers(torch.cat([of_members(t) for t in named.values()], 1))}
    depth = max(int(n.rpartition("_")[2]) for n in named)
    found: dict[str, np.ndarray | list[np.ndarray | None]] = {}
    for kind, suffix in (
        ("weight", ""),
        ("bias", "_bias"),
        ("norm_scale", "_norm_scale"),
        ("norm_shift", "_norm_shift"),
    ):
        parts = [named.get(f"{kind}_{layer}") for layer in range(1, depth + 1)]
        if any(part is not None for part in parts):
            flat = [None if p is None else p.flatten(2) if kind == "weight" else p for p in parts]
            found[name + suffix] = [None if p is None else _numbers(p) for p in flat]
    return found


def _dot(left: Named, right: Named) -> Tensor:
    return torch.stack([of_members(left[n] * right[n]).sum(1) for n in left]).sum(0)


def _unit(named: Named) -> tuple[Named, Tensor]:
    """The tensors of each member scaled to norm 1 together (0 where all are 0), and the norm."""
    length = _dot(named, named).sqrt()
    by = torch.where(length == 0, 1.0, length)
    return {n: t / by.view(-1, *[1] * (t.ndim - 1)) for n, t in named.items()}, length


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)
