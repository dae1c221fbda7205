"""Closed forms of Gaussian interaction functions and of their derivatives, in the covariances A, B, c.

Arcsine (erf), arc-cosine (relu and all that is piecewise linear) and gelu.  The logistic law is a scale mixture of
normal laws, so sigmoid, tanh, softplus and silu are mixtures of these.

Source: Saad & Solla (1995); Cho & Saul (2009); Andrews & Mallows (1974).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never

import numpy as np
import torch
from torch import Tensor

from tsdyn.networks import members_alone

Number: TypeAlias = Tensor | float

#: Weights with sin θ below this count as parallel: relu's E[σ''σ''], infinite at 0, enters a Hessian times sin² θ, so
#: that setting it to 0 errs by sin θ; and rounding leaves sin θ = 5e-8 between a weight and itself.
_PARALLEL, NORM_FLOOR = 1e-7, 1e-150
#: |w|²|v|² beyond which a covariance's determinant is computed in a form that avoids cancellation (`_determinant`).
_LARGE = 1e4
#: Spacing in log λ and range of the logistic law's scales; see `_logistic_scales`.
_SCALE_STEP, _SCALES = 0.1, (0.30, 9.2)


class Partials(NamedTuple):
    """g and its partial derivatives needed for a Hessian, elementwise; those in B follow by symmetry, ∂²g/∂A∂B = cc/4.

    Attributes:
        value: g.
        A: ∂g/∂A.
        c: ∂g/∂c.
        AA: ∂²g/∂A².
        Ac: ∂²g/∂A∂c.
        Bc: ∂²g/∂B∂c.
        cc: ∂²g/∂c².
    """

    value: Tensor
    A: Tensor
    c: Tensor
    AA: Tensor
    Ac: Tensor
    Bc: Tensor
    cc: Tensor


def _angle(y: Tensor, x: Tensor) -> Tensor:
    """Angle of the point (x, y)."""
    return members_alone.elementwise(torch.atan2, y, x)


def _determinant(A: Tensor, B: Tensor, c: Tensor, a: Number, b: Number) -> Tensor:
    """Determinant D = pq − c² with p = a + A, q = b + B, in a form that stays positive and accurate at large norms.

    At large norms pq and c² agree in all digits.  D is then (AB − c²) + aB + bA + ab, where AB − c² is set to 0 if
    only rounding (fields that are (anti)parallel as far as A, B, c tell), but keeps its derivatives.
    """
    plain = (a + A) * (b + B) - c * c
    square = A * B
    apart = square - c * c
    rounding = 4 * torch.finfo(apart.dtype).eps * square
    apart = apart - torch.where(apart.abs() <= rounding, apart, 0.0).detach()
    return torch.where(square > _LARGE, apart + (a * B + b * A + a * b), plain)


def _arcsine_partials(A: Tensor, B: Tensor, c: Tensor, a: Number, b: Number) -> Partials:
    """Partial derivatives of asin(c/√(pq)), with p = a + A, q = b + B and D = pq − c²."""
    p, q = a + A, b + B
    pq = p * q
    D = _determinant(A, B, c, a, b)
    root = D.rsqrt()
    cube = root / D
    value = _angle(c, D.sqrt())  # accurate near c = √(pq), where asin loses half of its digits
    A = -c * root / (2 * p)
    AA = c * (3 * pq - 2 * c * c) * cube / (4 * p * p)
    return Partials(value, A, root, AA, -q * cube / 2, -p * cube / 2, c * cube)


def _inverse_sine(sine: Tensor) -> Tensor:
    return torch.where(sine > _PARALLEL, 1 / sine.clamp(min=_PARALLEL), 0.0)


class _ArcCosine(torch.autograd.Function):
    """2π times the n-th derivative of K(u) = [√(1−u²) + u(π − acos u)]/2π, n = 0, 1, 2; finite at u = ±1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, order: int) -> Tensor:
        u = u.clamp(-1, 1)
        sine = ((1 - u) * (1 + u)).sqrt()
        if order == 2:
            return _inverse_sine(sine)
        beyond = math.pi - _angle(sine, u)
        return beyond if order else sine + u * beyond

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])
        ctx.order = inputs[1]

    @staticmethod
    def _slope(ctx: Any) -> Tensor:
        if ctx.order == 2:
            raise NotImplementedError("interaction: relu's has two derivatives; the third is infinite at w ∥ v")
        slope: Tensor = _ArcCosine.apply(ctx.saved_tensors[0], ctx.order + 1)
        return slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * _ArcCosine._slope(ctx), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        moved: Tensor = tangents[0] * _ArcCosine._slope(ctx)
        return moved


def arc_cosine(u: Tensor) -> Tensor:
    """K(u) = E[relu relu] of two unit weights at cosine u, twice differentiable and finite at u = ±1."""
    found: Tensor = _ArcCosine.apply(u, 0)
    return found / (2 * math.pi)


def _rectifier_partials(A: Tensor, B: Tensor, c: Tensor) -> Partials:
    """Partial derivatives of r₁ r₂ K(u), r₁ = √A, r₂ = √B, with s = sin θ."""
    r1, r2 = A.sqrt().clamp(min=NORM_FLOOR), B.sqrt().clamp(min=NORM_FLOOR)
    product = r1 * r2
    u = (c / product).clamp(-1, 1)
    s = ((1 - u) * (1 + u)).sqrt()
    inverse = _inverse_sine(s)
    slope = math.pi - _angle(s, u)
    A_safe, B_safe = r1 * r1, r2 * r2
    return Partials(
        product * (s + u * slope) / (2 * math.pi),
        r2 / r1 * s / (4 * math.pi),
        slope / (2 * math.pi),
        r2 / (r1 * A_safe) * (2 * u * u - 1) * inverse / (8 * math.pi),
        -u * inverse / (4 * math.pi * A_safe),
        -u * inverse / (4 * math.pi * B_safe),
        inverse / (2 * math.pi * product),
    )


class Erf:
    """Interaction of erf(x/√2): (2/π) asin(c/√((1+A)(1+B)))."""

    homogeneous = False

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        return _angle(c, _determinant(A, B, c, 1.0, 1.0).sqrt()) * (2 / math.pi)

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        return _scaled(_arcsine_partials(A, B, c, 1.0, 1.0), 2 / math.pi)


class PiecewiseLinear:
    """Interaction of σ with slope `leak` below 0: (1−leak)² r₁r₂K(u) + leak·c; relu has leak 0, the identity 1."""

    homogeneous = True

    def __init__(self, leak: float) -> None:
        self.leak = leak

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        if self.leak == 1:
            return c + 0 * (A + B)
        norms = A.sqrt() * B.sqrt()
        return (1 - self.leak) ** 2 * norms * arc_cosine(c / norms.clamp(min=NORM_FLOOR)) + self.leak * c

    def in_cosine(self, r1: Tensor, r2: Tensor, u: Tensor) -> Tensor:
        """The interaction as a function of norms and cosine, differentiable at norm 0 too."""
        kernel = self.leak * u
        return r1 * r2 * (kernel if self.leak == 1 else kernel + (1 - self.leak) ** 2 * arc_cosine(u))

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        if self.leak == 1:
            zero = torch.zeros_like(A + B + c)
            return Partials(c + zero, zero, 1 + zero, zero, zero, zero, zero)
        found = _scaled(_rectifier_partials(A, B, c), (1 - self.leak) ** 2)
        return found._replace(value=found.value + self.leak * c, c=found.c + self.leak)


class Gelu:
    """Interaction of x Φ(x/λ) with y Φ(y/λ'); gelu has λ = λ' = 1.

    It is cF + [AB + c²(λ²λ'² − AB)/pq] / 2π√(pq − c²) with p = λ² + A, q = λ'² + B, F = E[ΦΦ] = ¼ + asin(c/√(pq))/2π.
    With D = pq − c² the bracket is (AB D + λ²λ'²c²)/pq.  At c < 0 and large norms both terms grow and cancel; the sum
    is then computed as relu's interaction on fields of variances p and q, plus a remainder:

        2π g = [λ²λ'²c² − (pq − AB) D]/(pq √D) + √D + c (π/2 + atan(c/√D)).
    """

    homogeneous = False

    def __init__(self, variance: Number = 1.0, variance2: Number = 1.0) -> None:
        self.variances = variance, variance2

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        a, b = self.variances
        D = _determinant(A, B, c, a, b)
        return self._value(A, B, c, D, D.sqrt())

    def _value(self, A: Tensor, B: Tensor, c: Tensor, D: Tensor, root: Tensor) -> Tensor:
        a, b = self.variances
        pq = (a + A) * (b + B)
        # the remainder (AB D + λ²λ'²c²)/(pq √D) − √D, since _rectified contains √D already
        rest = (c * c * (a * b / pq) - (a * B + b * A + a * b) / pq * D) / root
        both = 0.25 + _angle(c, root) / (2 * math.pi)
        plain = c * both + (A * B + c * c * (a * b - A * B) / pq) / (2 * math.pi * root)
        return torch.where(A * B > _LARGE, (rest + _rectified(c, root)) / (2 * math.pi), plain)

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        a, b = self.variances
        p, q = a + A, b + B
        pq = p * q
        D = _determinant(A, B, c, a, b)
        root = D.rsqrt()
        arcsine = _arcsine_partials(A, B, c, a, b)
        # N = AB + c²(ab − AB)/pq; ∂_A of (ab − AB)/pq is −b(a + B)·/(p²q)…, written out: (ab − AB)/pq = S
        S = (a * b - A * B) / pq
        S_A = -(B + S * q) / pq
        S_B = -(A + S * p) / pq
        S_AA = 2 * (B + S * q) / (pq * p)
        N, N_c = A * B / pq * D + c * c * (a * b / pq), 2 * c * S
        N_A, N_B = B + c * c * S_A, A + c * c * S_B
        R, R_A, R_B, R_c = root, -q * root / (2 * D), -p * root / (2 * D), c * root / D
        R_AA = 3 * q * q * root / (4 * D * D)
        R_Ac, R_Bc = (-3 * c * side * root / (2 * D * D) for side in (q, p))
        R_cc = (pq + 2 * c * c) * root / (D * D)
        F, F_A, F_c = math.pi / 2 + arcsine.value, arcsine.A, arcsine.c
        F_B = -c * root / (2 * q)
        both = Partials(
            c * F + N * R,
            c * F_A + N_A * R + N * R_A,
            F + c * F_c + N_c * R + N * R_c,
            c * arcsine.AA + c * c * S_AA * R + 2 * N_A * R_A + N * R_AA,
            F_A + c * arcsine.Ac + 2 * c * S_A * R + N_A * R_c + N_c * R_A + N * R_Ac,
            F_B + c * arcsine.Bc + 2 * c * S_B * R + N_B * R_c + N_c * R_B + N * R_Bc,
            2 * F_c + c * arcsine.cc + 2 * S * R + 2 * N_c * R_c + N * R_cc,
        )
        found = _scaled(both, 1 / (2 * math.pi))
        return found._replace(value=self._value(A, B, c, D, D.sqrt()))


def _rectified(c: Tensor, root: Tensor) -> Tensor:
    """2π E[relu relu] of fields of covariance c and determinant D: √D + c (π/2 + atan(c/√D)).

    At c < 0, where these terms cancel, it is computed as |c| (t − atan t), t = √D/|c|.
    """
    size = torch.where(c < 0, -c, 1.0)
    return torch.where(c < 0, size * _beyond_slope(root / size), root + c * (math.pi / 2 + _angle(c, root)))


def _beyond_slope(t: Tensor) -> Tensor:
    """t − atan t for t > 0, by its series for small t, where the two terms cancel."""
    small = t < 0.25
    u = torch.where(small, t, 0.25)
    square, series = u * u, torch.zeros_like(u)
    for odd in range(29, 1, -2):  # 0.25²⁸/31 is 4e-19
        series = ((1 / odd if odd % 4 == 3 else -1 / odd) + series * square) if odd < 29 else series - 1 / odd
    return torch.where(small, series * square * u, t - torch.atan(t))


def _scaled(partials: Partials, factor: Number) -> Partials:
    return Partials(*(factor * part for part in partials))


# --- mixtures ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _logistic_scales() -> tuple[np.ndarray, np.ndarray]:
    """Nodes λ and weights p of the scale mixture 1/(1+e⁻ˣ) = Σ p Φ(x/λ).

    λ/2 has Kolmogorov's law (Andrews & Mallows 1974).  In log λ its density falls doubly exponentially, analytic for
    |Im| < π/4, as are the interactions, so the trapezoid rule of step h errs by exp(−π²/2h): 4e-22 for h = 0.1.
    """
    low, high = (math.log(edge / 2) for edge in _SCALES)
    k = np.exp(np.arange(low, high + _SCALE_STEP, _SCALE_STEP))[:, None]
    j = np.arange(1, 30)[None]
    odd = (2 * j - 1) ** 2 * np.pi**2
    with np.errstate(under="ignore"):
        above = (8 * k * (-1.0) ** (j - 1) * j**2 * np.exp(-2 * (j * k) ** 2)).sum(1)
        below = (math.sqrt(2 * np.pi) * (odd / (4 * k**4) - 1 / k**2) * np.exp(-odd / (8 * k**2))).sum(1)
    density = np.where(k[:, 0] < 1, below, above)  # expansions of one theta function, each where it converges fast
    return 2 * k[:, 0], density * k[:, 0] * _SCALE_STEP


class LogisticMixture:
    """Interaction of an activation that is a logistic scale mixture: Σ p p' g(λ, λ') over pairs of scales."""

    homogeneous = False

    def __init__(self, of: Literal["sigmoid", "tanh", "softplus", "silu"]) -> None:
        self.of = of

    def _mixed(self, A: Tensor, B: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        scales, weights = (torch.as_tensor(v, dtype=c.dtype, device=c.device) for v in _logistic_scales())
        if self.of == "tanh":  # tanh x = 2 sigmoid(2x) − 1
            scales = scales / 2
        square, pairs = scales * scales, weights[:, None] * weights
        A, B, c = (v[..., None, None] for v in torch.broadcast_tensors(A, B, c))
        return A, B, c, square[:, None], square, pairs

    def __call__(self, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        A, B, c, a, b, pairs = self._mixed(A, B, c)

        def angle() -> Tensor:
            return (_angle(c, _determinant(A, B, c, a, b).sqrt()) * pairs).sum((-2, -1))

        match self.of:
            case "softplus":  # E relu(x + λZ)
                return (_rectified(c, _determinant(A, B, c, a, b).sqrt()) * pairs).sum((-2, -1)) / (2 * math.pi)
            case "silu":
                return (Gelu(a, b)(A, B, c) * pairs).sum((-2, -1))
            case "tanh":
                return angle() * (2 / math.pi)
            case "sigmoid":
                return 0.25 + angle() / (2 * math.pi)
            case other:
                assert_never(other)

    def partials(self, A: Tensor, B: Tensor, c: Tensor) -> Partials:
        A, B, c, a, b, pairs = self._mixed(A, B, c)
        match self.of:
            case "softplus":
                value = _rectified(c, _determinant(A, B, c, a, b).sqrt()) / (2 * math.pi)
                parts, factor, constant = _rectifier_partials(a + A, b + B, c)._replace(value=value), 1.0, 0.0
            case "silu":
                parts, factor, constant = Gelu(a, b).partials(A, B, c), 1.0, 0.0
            case "tanh":
                parts, factor, constant = _arcsine_partials(A, B, c, a, b), 2 / math.pi, 0.0
            case "sigmoid":
                parts, factor, constant = _arcsine_partials(A, B, c, a, b), 1 / (2 * math.pi), 0.25
            case other:
                assert_never(other)
        found = Partials(*((part * pairs).sum((-2, -1)) * factor for part in parts))
        return found._replace(value=found.value + constant)
