"""One step of training linearised, backwards (`pulled`) and forwards (`pushed`).

Any step is linearised by torch.func.  For fully connected networks on the squared error or cross entropy the gradient's
derivative along a direction is written out, with no graph and no Hessian: with R the derivative along (Λ, μ) of weights
and biases (Pearlmutter 1994),

    R z_l = f_{l−1} Λ_lᵀ + R f_{l−1} W_lᵀ + μ_l,   R g_{l−1} = (g_l Λ_l + R g_l W_l) σ' + (g_l W_l) σ'' R z_{l−1},
    R ∂J/∂W_l = −(R g_lᵀ f_{l−1} + g_lᵀ R f_{l−1}),

which is also the transposed derivative, since a Hessian is symmetric.  The optimizer's part is elementwise: of SGD it
is written out, of all others autograd's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp

from tsdyn.engine.ensemble import Named, layer_of
from tsdyn.engine.loss import CROSS_ENTROPY, MSE
from tsdyn.engine.rule import Rule
from tsdyn.networks.activations import Activation
from tsdyn.networks.network import Network
from tsdyn.through_training.steps import Inputs, Kind, State, beyond_clip, learns, step, updated

#: A quantity and its tangent.
Pair: TypeAlias = tuple[Tensor, Tensor]


def by_hand(kind: Kind, rule: Rule) -> bool:
    """Whether the derivative of the gradient is written out for these members and this loss."""
    return type(kind) is Network and kind.plain and rule.loss in (MSE, CROSS_ENTROPY)


def moved_on(kind: Kind, state: State, given: Inputs, rule: Rule, count: int) -> State:
    """The state after a step, as `step` gives it."""
    if by_hand(kind, rule):
        assert isinstance(kind, Network)
        gradients = _passed(kind, state.values, given, rule).gradients
        values, moments = updated(kind, state, gradients, given.rate, rule, count)
        return State(values, state.buffers, moments)
    return step(kind, state, given, rule, count)[0]


def pulled(
    kind: Kind, state: State, given: Inputs, rule: Rule, count: int, slope: State, names: Sequence[str]
) -> tuple[State, State, Named]:
    """The step backwards: the state after it, the slope in the state before it, and in the named parts of `given`.

    Args:
        kind: What the members are.
        state, given, rule, count: As `step` takes them.
        slope: The slope in the state after the step.
        names: Fields of `Inputs`.
    """
    if by_hand(kind, rule):
        assert isinstance(kind, Network)
        return _pulled_by_hand(kind, state, given, rule, count, slope, names)

    def moved(state: State, *parts: Tensor) -> State:
        return step(kind, state, given._replace(**dict(zip(names, parts, strict=True))), rule, count)[0]

    after, pull = vjp(moved, state, *(getattr(given, name) for name in names))  # type: ignore[misc]
    before, *parts = pull(slope)
    return after, State(*before), dict(zip(names, parts, strict=True))


def pushed(
    kind: Kind, state: State, tangent: State, given: Inputs, along: Inputs, rule: Rule, count: int
) -> tuple[State, list[Pair], Pair | None]:
    """The step forwards: the tangent after it, and the gates, hidden nodes' and that of clipping, with their tangents.

    Args:
        kind: What the members are.
        state, given, rule, count: As `step` takes them.
        tangent: Of the state before the step.
        along: Of `given`.
    """
    if by_hand(kind, rule):
        assert isinstance(kind, Network)
        return _pushed_by_hand(kind, state, tangent, given, along, rule, count)

    def moved(state: State, *parts: Tensor) -> tuple[State, list[Tensor], list[Tensor]]:
        after, gates = step(kind, state, Inputs(*parts), rule, count)
        return after, gates.hidden, [] if gates.clip is None else [gates.clip]

    (_, hidden, clip), (after, dots, clip_dot) = jvp(moved, (state, *given), (tangent, *along))  # type: ignore[misc]
    return State(*after), list(zip(hidden, dots, strict=True)), (clip[0], clip_dot[0]) if clip else None


# --- the gradient, written out -------------------------------------------------------------------------------


@dataclass
class _Pass:
    """A forward and backward pass of all members; index l holds layer l, g and f as in the module's text."""

    f: list[Tensor]
    z: list[Tensor | None]
    gate: list[Tensor | None]
    g: list[Tensor]
    over: list[Tensor | None]  #: g_{l+1} W_{l+1}, which the gate of layer l then multiplies
    residual: Tensor  #: negative gradient of each sample's loss in the output
    share: Tensor  #: w_i/batch, (member, batch, 1)
    softmax: Tensor | None
    total: Tensor | None  #: Σ_c y_c, (member, batch, 1), for cross entropy; 1 for classes
    gradients: Named  #: of parameters that learn


def _passed(kind: Network, values: Named, given: Inputs, rule: Rule) -> _Pass:
    depth, sigma = kind.depth, kind.activation
    f: list[Tensor] = [given.input]
    z: list[Tensor | None] = [None]
    gate: list[Tensor | None] = [None]
    for layer in range(1, depth + 1):
        weight, bias = values[f"weight_{layer}"], values.get(f"bias_{layer}")
        here = torch.bmm(f[-1], weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), f[-1], weight.mT)
        z.append(here)
        gate.append(sigma.gate(here) if layer < depth else None)
        f.append(sigma(here) if layer < depth else here)
    softmax = torch.softmax(f[-1], -1) if rule.loss is CROSS_ENTROPY else None
    target = given.target
    total = None if softmax is None else target.sum(-1, keepdim=True)
    residual = target - f[-1] if softmax is None or total is None else target - total * softmax
    share = (given.weight / given.weight.shape[1]).unsqueeze(2)
    g: list[Tensor] = [residual * share]
    over: list[Tensor | None] = [None]
    gradients: Named = {}
    for layer in range(depth, 0, -1):
        if learns(rule, f"weight_{layer}"):
            gradients[f"weight_{layer}"] = -torch.bmm(g[0].mT, f[layer - 1])
            if f"bias_{layer}" in values:
                gradients[f"bias_{layer}"] = -g[0].sum(1)
        below = torch.bmm(g[0], values[f"weight_{layer}"]) if layer > 1 else None
        open_ = gate[layer - 1]
        if below is not None and open_ is not None:
            over.insert(0, below)
            g.insert(0, below * open_)
    # the order of the parameters, which clipping and optimizers see
    gradients = {name: gradients[name] for name in values if name in gradients}
    return _Pass(f, z, gate, [f[0], *g], [None, *over], residual, share, softmax, total, gradients)


@dataclass
class _Along:
    """R of a pass along a direction: of the gradients, the pre-activations, the output and the inputs' gradient."""

    gradients: Named
    z: list[Tensor]
    output: Tensor
    input: Tensor | None


def _curved(sigma: Activation, z: Tensor) -> Tensor | None:
    """σ''(z); None where it is 0 but for jumps."""
    if sigma.piecewise_linear:
        return None
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (found,) = torch.autograd.grad(sigma.derivative(leaf).sum(), leaf)
    return found


def _along(
    kind: Network,
    values: Named,
    p: _Pass,
    direction: Named,
    moved: Inputs | None,
    names: Collection[str],
    of_input: bool,
) -> _Along:
    """R of a pass along a direction of parameters and of `moved` inputs, targets and weights.

    Of the gradients in the parameters `names`, and if `of_input` in the inputs.
    """
    depth = kind.depth
    rf: Tensor | None = None if moved is None else moved.input
    rz: list[Tensor] = []
    kept: list[Tensor | None] = [rf]
    for layer in range(1, depth + 1):
        here = torch.zeros_like(p.f[layer]) if rf is None else torch.bmm(rf, values[f"weight_{layer}"].mT)
        if f"weight_{layer}" in direction:
            here = torch.baddbmm(here, p.f[layer - 1], direction[f"weight_{layer}"].mT)
        if f"bias_{layer}" in direction:
            here = here + direction[f"bias_{layer}"].unsqueeze(1)
        rz.append(here)
        gate = p.gate[layer]
        rf = here if gate is None else here * gate
        kept.append(rf)
    output = rz[-1]
    change = output if p.softmax is None else _softmax_curved(p, output)
    rg = -change * p.share
    if moved is not None:
        dy = moved.target
        dy = dy if p.softmax is None else dy - dy.sum(-1, keepdim=True) * p.softmax
        rg = rg + dy * p.share + p.residual * (moved.weight / moved.weight.shape[1]).unsqueeze(2)
    gradients: Named = {}
    for layer in range(depth, 0, -1):
        if f"weight_{layer}" in names:
            total, below = torch.bmm(rg.mT, p.f[layer - 1]), kept[layer - 1]
            if below is not None:
                total = torch.baddbmm(total, p.g[layer].mT, below)
            gradients[f"weight_{layer}"] = -total
        if f"bias_{layer}" in names:
            gradients[f"bias_{layer}"] = -rg.sum(1)
        if layer == 1 and not of_input:
            break
        lower = torch.bmm(rg, values[f"weight_{layer}"])
        if f"weight_{layer}" in direction:
            lower = torch.baddbmm(lower, p.g[layer], direction[f"weight_{layer}"])
        if layer == 1:
            return _Along(gradients, rz[:-1], output, -lower)
        gate, z, over = p.gate[layer - 1], p.z[layer - 1], p.over[layer - 1]
        assert gate is not None
        assert z is not None
        assert over is not None
        rg = lower * gate
        curved = _curved(kind.activation, z)
        if curved is not None:
            rg = rg + over * curved * rz[layer - 2]
    return _Along(gradients, rz[:-1], output, None)


def _softmax_curved(p: _Pass, v: Tensor) -> Tensor:
    """The Hessian of cross entropy in the outputs, times v."""
    assert p.softmax is not None
    assert p.total is not None
    return p.total * p.softmax * (v - (p.softmax * v).sum(-1, keepdim=True))


# --- the optimizer -------------------------------------------------------------------------------------------


def _plain(rule: Rule) -> bool:
    """Whether the update is p − η (∇ + λ p), which is written out here."""
    return rule.name == "sgd" and rule.clip is None and not rule.normalize


def _decay(rule: Rule, parameter: Tensor) -> float:
    return rule.weight_decay if rule.decay_biases or parameter.dim() > 2 else 0.0


def _rates(rule: Rule, rate: Tensor, name: str, like: Tensor) -> Tensor:
    factor = rule.factors[layer_of(name) - 1] if rule.factors else 1.0
    return (rate * factor).view(-1, *[1] * (like.dim() - 1))


def _pulled_by_hand(
    kind: Network, state: State, given: Inputs, rule: Rule, count: int, slope: State, names: Sequence[str]
) -> tuple[State, State, Named]:
    p = _passed(kind, state.values, given, rule)
    pull = _pull_sgd if _plain(rule) else _pull_update
    after, before, direction, rate = pull(kind, state, p.gradients, given.rate, rule, count, slope)
    # ⟨c, ∇J⟩ has the derivative Hc, of frozen parameters too
    found = _along(kind, state.values, p, direction, None, state.values, "input" in names)
    values = {name: tensor + found.gradients[name] for name, tensor in before.values.items()}
    parts: Named = {}
    for name in names:
        if name == "rate":
            parts[name] = rate
        elif name == "weight":
            parts[name] = -(p.residual * found.output).sum(-1) / given.weight.shape[1]
        elif name == "target":
            v = found.output
            parts[name] = -p.share * (v if p.softmax is None else v - (p.softmax * v).sum(-1, keepdim=True))
        else:
            assert found.input is not None
            parts[name] = found.input
    return after, before._replace(values=values), parts


def _pull_sgd(
    kind: Network, state: State, gradients: Named, rate: Tensor, rule: Rule, count: int, slope: State
) -> tuple[State, State, Named, Tensor]:
    """The update backwards: the state after it, the slopes in the state, in the gradients and in the rate."""
    after, before, direction = dict(state.values), dict(slope.values), dict[str, Tensor]()
    total = torch.zeros_like(rate)
    for name, gradient in gradients.items():
        parameter, slopes = state.values[name], slope.values[name]
        rates, decay = _rates(rule, rate, name, parameter), _decay(rule, parameter)
        change = gradient + decay * parameter if decay else gradient
        after[name] = parameter - rates * change
        direction[name] = -rates * slopes
        if decay:
            before[name] = slopes + decay * direction[name]
        factor = rule.factors[layer_of(name) - 1] if rule.factors else 1.0
        total = total - factor * (slopes * change).flatten(1).sum(1)
    return State(after, state.buffers, state.moments), slope._replace(values=before), direction, total


def _pull_update(
    kind: Network, state: State, gradients: Named, rate: Tensor, rule: Rule, count: int, slope: State
) -> tuple[State, State, Named, Tensor]:
    """As `_pull_sgd` of any update, by autograd."""
    leaves = state.map(lambda t: t.detach().requires_grad_())
    free = {n: g.detach().requires_grad_() for n, g in gradients.items()}
    eta = rate.detach().clone().requires_grad_()
    with torch.enable_grad():
        values, moments = updated(kind, leaves, free, eta, rule, count)
    after = State(values, state.buffers, moments)
    inputs = [*leaves.tensors(), *free.values(), eta]
    found = torch.autograd.grad(after.tensors(), inputs, slope.tensors(), allow_unused=True)
    slopes = iter([torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)])
    before = leaves.map(lambda _: next(slopes))
    direction = {n: next(slopes) for n in free}
    return after.map(torch.Tensor.detach), before, direction, next(slopes)


def _pushed_by_hand(
    kind: Network, state: State, tangent: State, given: Inputs, along: Inputs, rule: Rule, count: int
) -> tuple[State, list[Pair], Pair | None]:
    p = _passed(kind, state.values, given, rule)
    found = _along(kind, state.values, p, tangent.values, along, p.gradients, False)
    hidden = [(z, dot) for z, dot in zip(p.z[1:-1], found.z, strict=True) if z is not None]
    clip = beyond_clip(rule, p.gradients)
    gate = None
    if clip is not None and rule.clip is not None:
        dots = torch.stack([(g * found.gradients[n]).flatten(1).sum(1) for n, g in p.gradients.items()]).sum(0)
        gate = clip, dots / (clip + rule.clip)
    push = _push_sgd if _plain(rule) else _push_update
    after = push(kind, state, tangent, p.gradients, found.gradients, given.rate, along.rate, rule, count)
    return after, hidden, gate


def _push_sgd(
    kind: Network, state: State, tangent: State, gradients: Named, dots: Named, rate: Tensor, by: Tensor, rule: Rule,
    count: int,
) -> State:  # fmt: skip
    """The tangent after the update, from those of the state, the gradients and the rate."""
    values = dict(tangent.values)
    for name, gradient in gradients.items():
        parameter, tau = state.values[name], tangent.values[name]
        decay = _decay(rule, parameter)
        change = gradient + decay * parameter if decay else gradient
        moved = dots[name] + decay * tau if decay else dots[name]
        values[name] = tau - _rates(rule, rate, name, parameter) * moved - _rates(rule, by, name, parameter) * change
    return tangent._replace(values=values)


def _push_update(
    kind: Network, state: State, tangent: State, gradients: Named, dots: Named, rate: Tensor, by: Tensor, rule: Rule,
    count: int,
) -> State:  # fmt: skip
    """As `_push_sgd` of any update, by forward-mode autograd."""
    with forward_ad.dual_level():
        taus = iter(tangent.tensors())
        dual = state.map(lambda t: forward_ad.make_dual(t, next(taus)))
        slopes = {n: forward_ad.make_dual(g, dots[n]) for n, g in gradients.items()}
        values, moments = updated(kind, dual, slopes, forward_ad.make_dual(rate, by), rule, count)

        def of(t: Tensor) -> Tensor:
            dot = forward_ad.unpack_dual(t).tangent
            return torch.zeros_like(t) if dot is None else dot.clone()

        return State(values, tangent.buffers, moments).map(of)
