"""How far a derivative through training may be believed: tangents, and the first gate that flips along them.

With a piecewise linear activation the derivative is exact, and yet predicts nothing beyond the first gate that flips.
Along a direction u of what the run starts from, the tangent of every pre-activation z is computed forwards, exactly,

    τ_t = (∂θ_t/∂θ_{t−1}) τ_{t−1} + (∂θ_t/∂p) u,

and to first order a gate flips at ε = −z/ż.  ρ₊ is the smallest such ε > 0 over steps, samples and hidden nodes, −ρ₋
the largest ε < 0.  Where ``training.clip`` begins or ends to act and where a maximum changes its winner is a gate,
too.  What flips in a step moves the run by a jump; a kink that a sample crosses where the observable is measured bends
the observable by that sample's share, so that it has a radius of its own (`Block.certificate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdyn.engine.rule import of_members
from tsdyn.networks.network import Network
from tsdyn.through_training.linearised import pushed
from tsdyn.through_training.replay import Course, taken
from tsdyn.through_training.steps import Inputs, Kind, State


@dataclass(frozen=True)
class Direction:
    """A direction of all that a run starts from; None is 0.

    Attributes:
        start: Of the state before training.
        learning_rate: (member, epoch).
        sample: (member, sample).
        target, input: (member, sample, ...).
        of_target: (step, inputs of the batch) → tangent of its targets, where no sample is seen twice.
    """

    start: State | None = None
    learning_rate: Tensor | None = None
    sample: Tensor | None = None
    target: Tensor | None = None
    input: Tensor | None = None
    of_target: Callable[[int, Inputs], Tensor] | None = None


@dataclass
class Reach:
    """How far ε may go to either side, (member,) each; infinite where nothing flips."""

    plus: Tensor
    minus: Tensor

    @classmethod
    def whole(cls, members: int, like: Tensor) -> Reach:
        """Without any gate so far."""
        return cls(like.new_full((members,), torch.inf), like.new_full((members,), torch.inf))

    def see(self, value: Tensor, tangent: Tensor) -> None:
        """Take in gates, (member, ...): those with a tangent flip at ε = −value/tangent."""
        at = torch.where(tangent == 0, torch.nan, -value / tangent).flatten(1)
        if not at.shape[1]:
            return
        forth = torch.where(at >= 0, at, torch.inf).amin(1)
        back = torch.where(at <= 0, -at, torch.inf).amin(1)
        self.plus = torch.minimum(self.plus, forth)
        self.minus = torch.minimum(self.minus, back)


@dataclass
class Tangent:
    """What a forward pass along one direction gives.

    Attributes:
        end: Tangent of the last state.
        growth: ‖τ‖ of the parameters after each epoch, (member, epoch), epoch 0 first.
        reach: How far the gates allow.
    """

    end: State
    growth: Tensor
    reach: Reach


def kinked(kind: Kind) -> bool:
    """Whether hidden nodes have a kink, at 0; of modules of the user's own it is not known."""
    return isinstance(kind, Network) and kind.activation.leak not in (None, 1.0) and kind.depth > 1


def gated(course: Course) -> bool:
    """Whether the steps have gates whose derivative jumps."""
    return kinked(course.kind) or course.rule(1).clip is not None


def forward_tangent(
    course: Course, start: State, direction: Direction, tick: Callable[[int], None] | None = None
) -> Tangent:
    """The tangent along a direction through all steps of a course, from its start.

    Args:
        course: Goes from its start to its end.
        start: The state before training.
        direction: The direction u.
        tick: Called with the number of steps gone.
    """
    course.go_to(start, 0)
    tau = start.map(torch.zeros_like) if direction.start is None else direction.start
    norms = [_norm(tau)]
    reach = Reach.whole(course.ensemble.members, norms[0])
    flips = kinked(course.kind)
    for count in range(1, course.steps + 1):
        before, given, rule = course.state(), course.given(count), course.rule(count)

        tau, hidden, clip = pushed(
            course.kind_at(count), before, tau, given, direction_of(course, direction, count), rule, count
        )
        for value, dot in hidden if flips else []:
            reach.see(value, dot)
        if clip is not None:
            reach.see(clip[0].unsqueeze(1), clip[1].unsqueeze(1))
        course.advance(1)
        if count % course.per_epoch == 0:
            norms.append(_norm(tau))
            if tick is not None:
                tick(course.per_epoch)
    return Tangent(tau, torch.stack(norms, 1), reach)


def direction_of(course: Course, direction: Direction, count: int) -> Inputs:
    """The tangent of what step `count` takes beside the state."""
    given, rows = course.given(count), course.rows(count)
    zero = Inputs(*(torch.zeros_like(part) for part in given))
    rate, weight, target, inputs = zero
    if direction.learning_rate is not None:
        rate = direction.learning_rate[:, course.epoch_of(count) - 1]
    if direction.sample is not None:
        weight = taken(direction.sample, rows)
    if direction.target is not None:
        target = taken(direction.target, rows)
    if direction.of_target is not None:
        target = direction.of_target(count, given)
    if direction.input is not None:
        inputs = taken(direction.input, rows)
    return Inputs(rate, weight, target, inputs)


def _norm(tau: State) -> Tensor:
    each = torch.stack([of_members(t).norm(dim=1) for t in tau.values.values()])
    together: Tensor = each.norm(dim=0)
    return together


def winners_reach(scores: Tensor, tangent: Tensor) -> tuple[float, float]:
    """How far no maximum over candidates changes its winner, (row, candidate) each: (ρ₊, ρ₋)."""
    plus, minus = float("inf"), float("inf")
    for row, dot in zip(scores, tangent, strict=True):
        there = ~row.isnan()
        if int(there.sum()) < 2:
            continue
        row, dot = row[there], dot[there]
        best = int(row.argmax())
        others = torch.arange(len(row)) != best
        reach = Reach.whole(1, row)
        reach.see((row[best] - row[others]).unsqueeze(0), (dot[best] - dot[others]).unsqueeze(0))
        plus, minus = min(plus, float(reach.plus)), min(minus, float(reach.minus))
    return plus, minus
