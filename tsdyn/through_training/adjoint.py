"""The reverse pass: the derivative of an observable in all that a run starts from, streamed backwards.

    λ_{t−1} = λ_t ∂θ_t/∂θ_{t−1},   dO/dη_t = λ_t ∂θ_t/∂η_t,   dO/dw_i += λ_t ∂θ_t/∂w_i,   ...

θ is the whole state, moments and running statistics included.  The steps are replayed in blocks, the last block first,
each from the state that the archive holds at its beginning; where it holds none, all steps are replayed once to get
there.  Where the states of a block do not fit in memory, every √n-th is kept, and those between are computed again.
The backward pass is compiled where it can be (`compiled_adjoint`), and that of `linearised` elsewhere.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tsdyn.engine import compiled_adjoint
from tsdyn.experiment.errors import ExperimentError
from tsdyn.networks.network import Network
from tsdyn.through_training.linearised import moved_on, pulled
from tsdyn.through_training.replay import Course, ReplayError, taken
from tsdyn.through_training.steps import ROOTED, Inputs, State

_log = logging.getLogger("tsdyn")

#: What is held of one member beside the states of a block, in states: the graph of a step, and sums over samples.
BESIDE = 6
#: Two orders of summation may differ by this much, relative to the largest number that is summed: some thousand units
#: of the last place of float64, for products of some thousand terms.
ROUNDING = 1e4 * torch.finfo(torch.float64).eps


@dataclass
class Sums:
    """Derivatives of the observable, each (member, ...); those that were not asked for are None.

    Attributes:
        start: In the state before training.
        learning_rate: In the rate of each epoch, (member, epoch).
        sample: In the weight of each training sample, (member, sample).
        target, input: In the targets and inputs of the training set, (member, sample, ...).
    """

    start: State
    learning_rate: Tensor | None = None
    sample: Tensor | None = None
    target: Tensor | None = None
    input: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """What is differentiated in beside the start; `of_target` takes (step, λ ∂θ/∂y) where no sample is seen twice."""

    learning_rate: bool = False
    sample: bool = False
    target: bool = False
    input: bool = False
    of_target: Callable[[int, Tensor, Inputs], None] | None = field(default=None, compare=False)


def spacing(steps: int) -> int:
    """How many steps lie between two kept states."""
    return max(1, math.isqrt(max(0, steps - 1)) + 1)


def states_held(steps: int) -> int:
    """How many states the reverse pass holds at once: the kept ones, and those of one stretch between two."""
    apart = spacing(steps)
    return math.ceil(steps / apart) + apart + 2


@dataclass
class Replayed:
    """A block of steps that was replayed.

    Attributes:
        start: The state before it.
        states: States by number of steps taken, the first and the last included; or ...
        passages: ... what all steps went through, by (steps taken, steps taken at its end): compiled code only.
    """

    start: State
    states: dict[int, State]
    passages: dict[tuple[int, int], _Piece]


@dataclass
class Kept:
    """What a forward pass leaves for the backward pass.

    Attributes:
        end: The last state.
        starts: States at which blocks begin, by number of steps taken, beside those that the archive holds.
        last: The last block; None if there are no steps.
        why: Why compiled code is not taken; None if it is.
        room: Bytes in which all states of a block may be kept.
    """

    end: State
    starts: dict[int, State]
    last: Replayed | None
    why: str | None
    room: int

    @property
    def way(self) -> str:
        """How the backward pass is computed: ``"compiled"``, or ``"general"`` with the reason."""
        return "compiled" if self.why is None else f"general ({self.why})"

    def start(self, course: Course, first: int) -> State:
        """The state at which a block begins."""
        return self.starts.pop(first) if first in self.starts else course.known(first)


def forward_pass(course: Course, tick: Callable[[int], None] | None = None, room: int = 0) -> Kept:
    """Go to the end of a course: through its last block, and through all before whose states the archive does not hold.

    Args:
        course: From its start.
        tick: Called with the number of steps replayed.
        room: Bytes in which all states of a block may be kept, which saves going forth once more.
    """
    why = not_compiled(course)
    _log.info("sensitivity: the adjoint is %s", "compiled" if why is None else f"general ({why})")
    course.advance(0)
    starts = {0: course.state()}
    known = {epoch * course.per_epoch for epoch in course.known_epochs}
    for first, last in course.blocks[:-1]:
        if last not in known:
            course.begin(starts[first] if first in starts else course.known(first), first)
            course.advance(last - first)
            starts[last] = course.state()
    kept = Kept(course.state(), starts, None, why, room)
    if course.blocks:
        kept.last = _replayed(course, kept, *course.blocks[-1], tick)
        kept.end = course.state()
    return kept


def _replayed(course: Course, kept: Kept, first: int, last: int, tick: Callable[[int], None] | None) -> Replayed:
    """Replay the steps of a block."""
    block = Replayed(kept.start(course, first), {}, {})
    course.begin(block.start, first)
    if kept.why is None and bytes_of_steps(course, last - first) <= kept.room:
        marks = [first, *(count for count in range(first + 1, last) if _recorded(course, count)), last]
        for begin, end in itertools.pairwise(marks):
            state = course.state()
            block.passages[begin, end] = _piece(course, state, begin, end)
            course.arrive(state, end)
            _told(tick, end - begin)
        return block
    every = kept.why is not None and (last - first + BESIDE) * State.held(course.ensemble).bytes <= kept.room
    apart = 1 if every else spacing(last - first)
    block.states[first] = course.state()
    while course.taken < last:
        begin = course.taken
        course.advance(min(apart, last - begin))
        block.states[course.taken] = course.state()
        _told(tick, course.taken - begin)
    return block


def _told(tick: Callable[[int], None] | None, steps: int) -> None:
    if tick is not None:
        tick(steps)


def reverse_pass(
    course: Course, kept: Kept, slope: State, wanted: Wanted, tick: Callable[[int], None] | None = None
) -> Sums:
    """Go back from `slope` = ∂O/∂θ_T to the start.

    Args:
        course: The course after `forward_pass`.
        kept: What that left; emptied on the way.
        slope: Derivatives of the observable in the last state.
        wanted: What else is differentiated in.
        tick: Called with the number of steps replayed or gone back.

    Raises:
        ReplayError: if a step of the engine is not the step that is differentiated, or a block does not end in the
            state from which the next began.
        ExperimentError: if a derivative is not finite.
    """
    sums = _empty(course, slope, wanted)
    after = kept.end
    for first, last in reversed(course.blocks):
        block, kept.last = kept.last, None
        if block is None:
            block = _replayed(course, kept, first, last, tick)
            course.meet(after)
        _backward(course, block, kept.why, sums, wanted, tick)
        after = block.start
    if not all(bool(t.isfinite().all()) for t in sums.start.tensors()):
        raise ExperimentError(
            "sensitivity: the derivative is not finite: it grew beyond all numbers in the backward pass, or the "
            f"optimizer {course.rule(1).name!r} has a step without derivative; ask for an earlier epoch"
        )
    if sums.learning_rate is not None:
        sums.learning_rate = sums.learning_rate.unflatten(1, (course.epochs, course.per_epoch)).sum(2)
    return sums


def _backward(
    course: Course, block: Replayed, why: str | None, sums: Sums, wanted: Wanted, tick: Callable[[int], None] | None
) -> None:
    """The backward pass through a block, which frees what was kept of it."""
    for first, end in sorted(block.passages, reverse=True):
        block.passages.pop((first, end)).back(course, sums, wanted, first)
        _told(tick, end - first)
    through = _through_compiled if why is None else _through_general
    for first, end in reversed(list(itertools.pairwise(sorted(block.states)))):
        through(course, block.states[first], block.states.pop(end), first, end, sums, wanted)
        _told(tick, end - first)


def _empty(course: Course, slope: State, wanted: Wanted) -> Sums:
    members = course.ensemble.members
    sums = Sums(slope)
    like = slope.tensors()[0]
    if wanted.learning_rate:
        sums.learning_rate = _zeros(like, members, course.steps)  # summed over the steps of each epoch at last
    if not course.fresh:
        x, y = course.finite
        sums.sample = _zeros(like, *x.shape[:2]) if wanted.sample else None
        sums.target = _zeros(like, *y.shape) if wanted.target else None
        sums.input = _zeros(like, *x.shape) if wanted.input else None
    return sums


def _zeros(like: Tensor, *shape: int) -> Tensor:
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # of numpy, which asks for large pages: the first touch of small ones, in the order of the batches, takes a tenth
    # of the backward pass
    return torch.from_numpy(np.zeros(shape))


# --- step by step --------------------------------------------------------------------------------------------


def _through_general(
    course: Course, before: State, after: State, first: int, end: int, sums: Sums, wanted: Wanted
) -> None:
    """Go back from the state `after` step number `end` to `before`, that after `first` steps."""
    course.go_to(before, first)
    states = [course.state()]
    for _ in range(first, end - 1):
        course.advance(1)
        states.append(course.state())
    for count in range(end, first, -1):
        state = states.pop()
        sums.start = _back(course, state, after, sums, wanted, count)
        after = state


def _back(course: Course, before: State, after: State, sums: Sums, wanted: Wanted, count: int) -> State:
    """λ before step `count` from λ after it, which `sums.start` holds; adds what the step gives to `sums`."""
    given, rule = course.given(count), course.rule(count)
    of = {
        "rate": wanted.learning_rate,
        "weight": wanted.sample,
        "target": wanted.target or wanted.of_target is not None,
        "input": wanted.input,
    }
    names = [name for name, there in of.items() if there]

    found, lower, by_name = pulled(course.kind_at(count), before, given, rule, count, sums.start, names)
    if not _anchored(course, count):

        def moved() -> State:
            draw = torch.Generator(device="cpu").manual_seed(0)

            def last_digits(t: Tensor) -> Tensor:
                if not t.is_floating_point():
                    return t
                drawn = torch.randn(t.shape, generator=draw, dtype=t.dtype, device="cpu")
                return t * (1 + torch.finfo(t.dtype).eps * drawn.to(t.device))

            return moved_on(course.kind_at(count), before.map(last_digits), given, rule, count)

        _refuse_other_step(course, found, after, count, moved)
    rows = course.rows(count)
    if sums.learning_rate is not None:
        sums.learning_rate[:, count - 1] = by_name["rate"]
    if wanted.of_target is not None:
        wanted.of_target(count, by_name["target"], given)
    for total, name in ((sums.sample, "weight"), (sums.target, "target"), (sums.input, "input")):
        if total is not None:
            _add(total, rows, by_name[name])
    return lower


def _add(total: Tensor, rows: Tensor | None, part: Tensor) -> None:
    """Add the part of a batch, (member, batch, ...), to the sums over samples, (member, sample, ...)."""
    if rows is None:
        total += part
    else:
        total.scatter_add_(1, rows.view(*rows.shape, *[1] * (part.ndim - 2)).expand_as(part), part)


def _recorded(course: Course, count: int) -> bool:
    return count % course.per_epoch == 0 and course.epoch_of(count) in course.recorded


def _anchored(course: Course, count: int) -> bool:
    """Whether the recorded weights take the place of the state after `count` steps."""
    return course.anchors and _recorded(course, count)


# --- in compiled code ----------------------------------------------------------------------------------------


def not_compiled(course: Course) -> str | None:
    """Why the general adjoint is taken, step by step; None where compiled code goes back."""
    if course.anchors and len(course.anchor_epochs) < len(course.recorded):
        return "not all parameters are recorded"
    if course.steps and course.rows(1) is None:
        return "the whole training set is the batch"
    return compiled_adjoint.refusal(course.kind, course.rule(1), course.ensemble.device)


def _through_compiled(
    course: Course, before: State, after: State, first: int, end: int, sums: Sums, wanted: Wanted
) -> None:
    """As `_through_general`."""
    state = before.map(torch.clone)
    _piece(course, state, first, end).back(course, sums, wanted, first)
    if not _anchored(course, end):
        _refuse_other_step(course, state, after, end, None)


def bytes_of_steps(course: Course, steps: int) -> int:
    """Bytes that so many steps of all members of a course go through in compiled code."""
    assert isinstance(course.kind, Network)
    moments = bool(course.ensemble.moments)
    each = compiled_adjoint.bytes_of_step(course.kind, course.experiment.training.batch, moments=moments)
    return each * steps * course.ensemble.members


@dataclass(frozen=True)
class _Piece:
    """Steps that were taken."""

    passage: compiled_adjoint.Passage
    steps: compiled_adjoint.Steps

    def back(self, course: Course, sums: Sums, wanted: Wanted, first: int) -> None:
        """Go back, and add what the steps, after `first` others, give to `sums`."""
        x, y = self.steps.inputs, self.steps.targets
        # of samples that are not seen twice only the teacher's derivative is taken, by the targets
        of_target = torch.zeros_like(y) if course.fresh and wanted.of_target is not None else None
        slopes = [sums.start.values, *sums.start.moments.values()]
        by_rate = self.passage.back(slopes, sums.sample, sums.target if of_target is None else of_target, sums.input)
        if sums.learning_rate is not None:
            sums.learning_rate[:, first : first + by_rate.shape[1]] = by_rate
        if of_target is not None and wanted.of_target is not None:
            wanted.of_target(0, of_target, Inputs(by_rate[:, 0], x.new_ones(x.shape[:2]), y, x))


def _piece(course: Course, state: State, first: int, end: int) -> _Piece:
    """Go from `state` after `first` steps to that after `end`, which it becomes."""
    parts, rates = [], []
    for epoch in range(course.epoch_of(first + 1), course.epoch_of(end) + 1):
        before = (epoch - 1) * course.per_epoch
        steps = slice(max(first - before, 0), min(end - before, course.per_epoch))
        data = course.data(epoch)
        assert data.rows is not None
        parts.append((data, data.rows[:, steps]))
        rates += [course.experiment.training.rate(epoch)] * (steps.stop - steps.start)
    rows = torch.cat([chosen for _, chosen in parts], 1)
    if course.fresh:
        x, y = (
            torch.cat([taken(getattr(data, name), chosen.flatten(1)) for data, chosen in parts], 1)
            for name in ("inputs", "targets")
        )
        rows = torch.arange(x.shape[1]).view(1, *rows.shape[1:]).expand_as(rows)
    else:
        x, y = course.finite
    assert isinstance(course.kind, Network)
    given = compiled_adjoint.Steps(x, y, rows, rates)
    held = [state.values, *state.moments.values()]
    return _Piece(compiled_adjoint.Passage(course.kind, held, course.rule(first + 1), given), given)


def _refuse_other_step(
    course: Course, found: State, engine: State, count: int, moved: Callable[[], State] | None
) -> None:
    """Raise ReplayError if a step as it is differentiated is not the engine's.

    Args:
        course: The course.
        found, engine: The state after it, by either.
        count: Its number.
        moved: Gives `found` for a state whose last digits are others: how far roundings carry, which BatchNorm of nodes
            that hardly vary makes much of.  Asked only where the two are farther apart than roundings that do not grow.
    """
    rule = course.rule(count)
    scale = max(float(t.abs().max()) for t in engine.tensors() if t.numel() and t.is_floating_point())
    rooms = list(_rooms(course, engine, count, scale).values())
    rooms += [t.new_tensor(ROUNDING * scale) for t in engine.tensors()[len(rooms) :] if t.is_floating_point()]
    own, theirs = ([t for t in state.tensors() if t.is_floating_point()] for state in (found, engine))
    off = [(mine - other).abs() for mine, other in zip(own, theirs, strict=True)]
    if all(bool((apart <= room).all()) for apart, room in zip(off, rooms, strict=True)):
        return
    if moved is not None:
        again = [t for t in moved().tensors() if t.is_floating_point()]
        carried = [(t - mine).abs().max() if t.numel() else 0.0 for t, mine in zip(again, own, strict=True)]
        # of some tens of roundings of the step, where the state was moved by one
        rooms = [room + 100 * most for room, most in zip(rooms, carried, strict=True)]
        if all(bool((apart <= room).all()) for apart, room in zip(off, rooms, strict=True)):
            return
    most = max(float(apart.max()) for apart in off if apart.numel())
    raise ReplayError(
        f"sensitivity: step {count} as it is differentiated differs from the engine's by {most:.2g} in numbers up to "
        f"{scale:.2g}; this optimizer, loss or module computes something that torch.func does not see "
        f"({rule.name!r}, {rule.loss.name!r}): it cannot be differentiated here"
    )


def _rooms(course: Course, engine: State, count: int, scale: float) -> dict[str, Tensor]:
    """How far two computations of a step may be apart in each parameter: the rounding of numbers as large as the state.

    The gradient's rounding, c G for its largest entry G, comes in η times, and of optimizers that divide by the root of
    the second moment v, η/(√v̂ + ε) times, which is large where the gradient is 0 but for rounding.
    """
    rule = course.rule(count)
    plain = {name: t.new_tensor(ROUNDING * scale) for name, t in engine.values.items()}
    if rule.name not in ROOTED or "second" not in engine.moments:
        return plain
    second = engine.moments["second"]
    largest = max(float(v.max()) for v in second.values()) / (1 - rule.beta_2)  # g² of the last step is no larger
    unbias = 1 - rule.beta_2**count
    rates = float(torch.as_tensor(rule.learning_rate).max()) * max(rule.factors, default=1.0)
    return plain | {
        n: plain[n] + ROUNDING * rates * largest**0.5 / ((v / unbias).sqrt() + rule.epsilon) for n, v in second.items()
    }
