"""Gaussian interaction functions: g(w, v) = E[σ(w·x) σ(v·x)] for x ~ N(0, I).

g depends on the covariance of the two fields alone, A = |w|², B = |v|², c = w·v.  In these variables Price's theorem
gives every derivative as an expectation of derivatives of σ,

    ∂g/∂c = E[σ'σ'],  ∂g/∂A = ½ E[σ''σ],  so that also  ∂²g/∂A∂B = ¼ ∂²g/∂c²,

which stays finite at w ∥ v and, for a smooth σ, as w → 0.  The registered activations have closed forms
(`tsdyn.gaussian.closed_forms`); any other smooth σ is integrated by the trapezoid rule.

Source: Saad & Solla (1995); Cho & Saul (2009); Simsek et al. (2023), section 3; Price (1958).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tsdyn.arguments import NUMBERS, SIGMA, takes
from tsdyn.gaussian.closed_forms import NORM_FLOOR, Erf, Gelu, LogisticMixture, Partials, PiecewiseLinear
from tsdyn.networks import activations
from tsdyn.networks.activations import Activation

Elementwise: TypeAlias = Float[Tensor, "..."]
Function: TypeAlias = Callable[[Tensor], Tensor]

#: The trapezoid rule's half width, where the normal density is 2e-17 of its peak; least and most nodes per side; error.
_EDGE, _FEWEST, _MOST, _TOLERANCE = 8.8, 48, 6144, 1e-13


@runtime_checkable
class Interaction(Protocol):
    """The interaction function g of one activation, as a function of the covariances A, B, c.

    ``interaction(A, B, c)`` is g, elementwise, twice differentiable by autograd; ``partials`` its closed derivatives.
    """

    homogeneous: bool

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor: ...

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        """First and second derivatives of g in A, B and c, elementwise."""


# --- a user's own σ ------------------------------------------------------------------------------------------


def _derivative(function: Function, order: int) -> Function:
    """The derivative of the given order of an elementwise function, by autograd."""

    def derived(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = function(x)
            for remaining in range(order, 0, -1):
                if not y.requires_grad:  # autograd has no graph: the derivative is constant, so higher ones are 0
                    return torch.zeros_like(x)
                (y,) = torch.autograd.grad(y.sum(), x, create_graph=remaining > 1)
        return y.detach()

    return derived


class _Expectation(torch.autograd.Function):
    """E[σ⁽ⁱ⁾ σ⁽ʲ⁾], elementwise; by Price's theorem its derivatives are expectations of the same form, to any order."""

    @staticmethod
    def forward(A: Tensor, B: Tensor, c: Tensor, function: Function, i: int, j: int) -> Tensor:
        return _trapezoid(_derivative(function, i), _derivative(function, j), A, B, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.rest = inputs[3:]

    @staticmethod
    def _slopes(ctx: Any) -> list[Tensor]:
        function, i, j = ctx.rest
        steps = ((0.5, 2, 0), (0.5, 0, 2), (1.0, 1, 1))  # Price, in A, B and c
        return [f * _Expectation.apply(*ctx.saved_tensors, function, i + p, j + q) for f, p, q in steps]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grads[0] * slope for slope in _Expectation._slopes(ctx)), *(None,) * 3)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        moved = [t * slope for t, slope in zip(tangents[:3], _Expectation._slopes(ctx), strict=True) if t is not None]
        return torch.stack(moved).sum(0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], A: Tensor, B: Tensor, c: Tensor, *rest: Any) -> Any:
        fronted = [
            v.expand(info.batch_size, *v.shape) if d is None else v.movedim(d, 0)
            for v, d in zip((A, B, c), in_dims, strict=False)
        ]
        return _Expectation.apply(*fronted, *rest), 0


def _trapezoid(left: Function, right: Function, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
    """E[left(√A x) right(√B y)] by the trapezoid rule on a square grid, refined until two grids agree."""
    A, B, c = torch.broadcast_tensors(A, B, c)
    r1, r2 = A.sqrt(), B.sqrt()
    norms = r1 * r2
    u = (c / norms.clamp(min=NORM_FLOOR)).clamp(-1, 1)
    rows = torch.stack([r1, r2, u, ((1 - u) * (1 + u)).sqrt()], -1).reshape(-1, 4)
    return torch.stack([_one_expectation(left, right, *row) for row in rows]).reshape(A.shape)


def _one_expectation(left: Function, right: Function, r1: Tensor, r2: Tensor, u: Tensor, s: Tensor) -> Tensor:
    before, nodes = None, _FEWEST
    while nodes <= _MOST:
        z = torch.linspace(-_EDGE, _EDGE, nodes + 1, dtype=r1.dtype, device=r1.device)
        density = torch.exp(-z * z / 2) * (2 * _EDGE / nodes / math.sqrt(2 * math.pi))
        along = left(r1 * z) * density
        # parallel fields are one field, so a one-dimensional grid is enough
        across = right(r2 * u * z) if s == 0 else right(r2 * (u * z[:, None] + s * z)) @ density
        found = along @ across
        size = along.abs() @ across.abs()
        if before is not None and (found - before).abs() <= _TOLERANCE * (1 + size):
            return found
        if not torch.isfinite(found):
            break
        before, nodes = found, 2 * nodes
    raise ValueError(
        f"interaction: the trapezoid rule for norms {float(r1):.3g} and {float(r2):.3g} does not settle to "
        f"{_TOLERANCE:g} on {_MOST}² nodes; σ or a derivative that is asked for is not smooth, or grows too fast. "
        "Register a closed form, use a registered activation or smaller norms"
    )


class _Quadrature:
    """Interaction of any smooth σ, by quadrature."""

    homogeneous = False

    def __init__(self, function: Function) -> None:
        self.function = function

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        A, B, c = torch.broadcast_tensors(A, B, c)
        found: Tensor = _Expectation.apply(A, B, c, self.function, 0, 0)
        return found

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        A, B, c = torch.broadcast_tensors(A, B, c)

        def expectation(i: int, j: int) -> Tensor:
            found: Tensor = _Expectation.apply(A, B, c, self.function, i, j)
            return found

        return Partials(
            expectation(0, 0),
            expectation(2, 0) / 2,
            expectation(1, 1),
            expectation(4, 0) / 4,
            expectation(3, 1) / 2,
            expectation(1, 3) / 2,
            expectation(2, 2),
        )


# --- what others use -----------------------------------------------------------------------------------------


#: Closed forms by activation object (not by name, which can be registered anew); all others are integrated.
_CLOSED_FORMS: Mapping[Activation, Interaction] = {
    activations.activation(name): closed
    for name, closed in (
        ("erf", Erf()),
        ("gelu", Gelu()),
        ("sigmoid", LogisticMixture("sigmoid")),
        ("tanh", LogisticMixture("tanh")),
        ("softplus", LogisticMixture("softplus")),
        ("silu", LogisticMixture("silu")),
    )
}


def interaction_of(activation: str | Activation | Function, *, leak: float = 0.01) -> Interaction:
    """The interaction function of an activation.

    Args:
        activation: Name of a registered one, an `Activation`, or any smooth elementwise function of a tensor.
        leak: Slope of ``"leaky_relu"`` below 0.

    Raises:
        ValueError: if no activation has that name.
    """
    if isinstance(activation, str):
        activation = activations.activation(activation, leak=leak)
    if not isinstance(activation, Activation):
        return _Quadrature(activation)
    if activation.leak is not None:
        return PiecewiseLinear(activation.leak)
    closed = _CLOSED_FORMS.get(activation)
    return _Quadrature(activation.function) if closed is None else closed


@takes(activation=SIGMA, r1=NUMBERS, r2=NUMBERS, rho=NUMBERS)
def in_cosine(
    activation: str | Activation | Function, r1: Any, r2: Any, rho: Any, *, leak: float = 0.01
) -> Elementwise:
    """g(r₁, r₂, ρ) = E[σ(r₁x) σ(r₂y)], x and y standard normal with correlation ρ.

    Args:
        activation: Name, `Activation` or any smooth elementwise function.
        r1: Norm of the first weight, ≥ 0; float64 unless given as a tensor of another type.
        r2: Norm of the second; the three broadcast.
        rho: Cosine of their angle, in [−1, 1].
        leak: Slope of ``"leaky_relu"`` below 0.

    Returns:
        g, elementwise, twice differentiable by autograd and torch.func, finite at ρ = ±1 and r = 0.

    Raises:
        ValueError: for an unknown activation, a negative norm, a correlation beyond ±1 or one that is not a number,
            or a σ whose integral does not settle.

    Source: Simsek et al. (2023), section 3.

    Examples:
        >>> from tsdyn import population
        >>> round(float(population.interaction("erf", 1.0, 1.0, 0.0)), 12)  # orthogonal weights
        0.0
    """
    first, second, cosine = _broadcast(r1, r2, rho)
    _check("r1", first, lambda v: v >= 0, "a norm is not negative")
    _check("r2", second, lambda v: v >= 0, "a norm is not negative")
    _check("rho", cosine, lambda v: v.abs() <= 1, "a cosine lies in [−1, 1]; clip what rounding pushed out")
    kernel = interaction_of(activation, leak=leak)
    if isinstance(kernel, PiecewiseLinear):
        return kernel.in_cosine(first, second, cosine)
    return kernel(first * first, second * second, first * second * cosine)


def _broadcast(*values: Any) -> tuple[Tensor, ...]:
    """Values as tensors of one shape: numbers and arrays on the device of the tensors among them, else on the CPU."""
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    given = [v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
    return tuple(torch.broadcast_tensors(*given))


def _check(name: str, value: Tensor, holds: Callable[[Tensor], Tensor], rule: str) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(value):  # vmap hides the values
        return
    wrong = ~holds(value.detach())
    if wrong.any():
        raise ValueError(f"interaction: {name}={value.detach()[wrong].flatten()[0].item():g}; {rule}")


class Derivatives(NamedTuple):
    """g(r₁, r₂, ρ), ∂g/∂(r₁, r₂, ρ) as (..., 3), and second derivatives in the same order, (..., 3, 3); elementwise."""

    value: Tensor
    gradient: Tensor
    hessian: Tensor


def derivatives(
    activation: str | Activation | Function, r1: Any, r2: Any, rho: Any, *, leak: float = 0.01
) -> Derivatives:
    """g(r₁, r₂, ρ) with first and second derivatives; arguments and errors as `in_cosine`."""
    point = torch.stack([v.detach().to(torch.float64) for v in _broadcast(r1, r2, rho)], -1).requires_grad_()
    with torch.enable_grad():
        value = in_cosine(activation, *point.unbind(-1), leak=leak)
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=True)
        rows = [torch.autograd.grad(gradient[..., i].sum(), point, retain_graph=True)[0] for i in range(3)]
    return Derivatives(value.detach(), gradient.detach(), torch.stack(rows, -2))
