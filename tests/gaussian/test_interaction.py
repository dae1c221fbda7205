import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.cases import rng
from tsdyn import registers
from tsdyn.gaussian import interaction
from tsdyn.networks import activations

COSINES = (-1.0, -1 + 1e-9, -0.7, 0.0, 0.3, 0.9999, 1.0)
NORMS = (1e-3, 0.3, 2.0, 10.0)
SMOOTH = [n for n in activations.NAMES if not activations.activation(n).piecewise_linear]


def covariances(seed=0, count=20, largest=3.0):
    """Norms up to `largest` and cosines well inside ±1, as A, B, c."""
    draw = rng(seed)
    r1, r2, u = draw.uniform(0.05, largest, count), draw.uniform(0.05, largest, count), draw.uniform(-0.95, 0.95, count)
    return tuple(torch.from_numpy(v) for v in (r1**2, r2**2, r1 * r2 * u))


@pytest.mark.parametrize("name", activations.NAMES)
def test_interactions_are_the_double_integral(name):
    """Both sides err by rounding of sums of some 1e6 terms of one sign or less: 1e-12 of √(g₁₁ g₂₂)."""
    sigma = activations.activation(name)
    pairs = [(r1, r2, u) for r1 in NORMS for r2 in (0.05, 10.0) for u in COSINES]
    if not sigma.piecewise_linear:
        pairs = pairs[::3]  # covers every norm and cosine
    found = interaction.in_cosine(name, *torch.tensor(pairs, dtype=torch.float64).T)
    for (r1, r2, u), g in zip(pairs, found.tolist(), strict=True):
        size = math.sqrt(oracles.gaussian_pair(sigma, r1, r1, 1.0) * oracles.gaussian_pair(sigma, r2, r2, 1.0))
        assert abs(g - oracles.gaussian_pair(sigma, r1, r2, u)) <= 1e-12 * size, (r1, r2, u)


@pytest.fixture
def sine():
    registers.ACTIVATIONS.add("sin", activations.Activation("sin", torch.sin, torch.cos, torch.nn.Identity))
    yield "sin"
    registers.ACTIVATIONS.remove("sin")


def test_an_activation_registered_anew_gets_no_closed_form_of_another(sine):
    """E[sin(r₁x) sin(r₂y)] against Monte Carlo, and its own closed form e^(−(A+B)/2) sinh c."""
    A, B, c = (torch.tensor(v, dtype=torch.float64) for v in (1.2, 0.7, 0.5))
    found = float(interaction.interaction_of(sine)(A, B, c))
    x = rng(3).multivariate_normal([0, 0], [[1.2, 0.5], [0.5, 0.7]], 200_000)
    products = np.sin(x).prod(1)
    assert abs(found - products.mean()) < 5 * products.std() / len(x) ** 0.5
    assert found == pytest.approx(math.exp(-0.95) * math.sinh(0.5), rel=1e-12)
    # nor does one that takes a known name
    named_gelu = activations.Activation("gelu", torch.sin, torch.cos, torch.nn.Identity)
    assert float(interaction.interaction_of(named_gelu)(A, B, c)) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("name", activations.NAMES)
def test_partials_are_the_derivatives_of_the_interaction(name):
    kernel = interaction.interaction_of(name)
    point = torch.stack(covariances(), -1).requires_grad_()
    value = kernel(*point.unbind(-1))
    (first,) = torch.autograd.grad(value.sum(), point, create_graph=True)
    rows = [
        torch.autograd.grad(first[:, i].sum(), point, retain_graph=True)[0] if first.requires_grad else 0 * point
        for i in range(3)
    ]
    found = kernel.partials(*point.detach().unbind(-1))
    pairs = {
        "value": value,
        "A": first[:, 0],
        "c": first[:, 2],
        "AA": rows[0][:, 0],
        "Ac": rows[0][:, 2],
        "Bc": rows[1][:, 2],
        "cc": rows[2][:, 2],
    }
    for part, wanted in pairs.items():
        torch.testing.assert_close(getattr(found, part), wanted.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows[0][:, 1].detach(), found.cc / 4, rtol=1e-9, atol=1e-12)  # Price


@pytest.mark.parametrize("name", SMOOTH)
def test_closed_forms_are_the_trapezoid_rules(name):
    """Price's theorem with σ's own derivatives against the derivatives of the closed form."""
    A, B, c = (v[:4] for v in covariances(1))
    closed = interaction.interaction_of(name).partials(A, B, c)
    quadrature = interaction.interaction_of(activations.activation(name).function).partials(A, B, c)
    for part, wanted in zip(closed, quadrature, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", activations.NAMES)
def test_derivatives_are_finite_where_weights_are_parallel_or_vanish(name):
    corners = torch.cartesian_prod(
        torch.tensor([0.0, 1e-12, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    ).double()
    found = interaction.derivatives(name, *corners.T)
    for part in found:
        assert torch.isfinite(part).all()
    A, B = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for part in interaction.interaction_of(name).partials(A, B, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)):
        assert torch.isfinite(part).all()


def test_a_users_own_activation_is_integrated_and_differentiated():
    """E[cos(r₁x) cos(r₂y)] = exp(−(A+B)/2) cosh(c); x³ and its fifth derivative, which is none."""
    A, B, c = covariances(2, 4)
    found = interaction.interaction_of(torch.cos).partials(A, B, c)
    g = torch.exp(-(A + B) / 2)
    wanted = (g * c.cosh(), -g * c.cosh() / 2, g * c.sinh(), g * c.cosh() / 4, -g * c.sinh() / 2, -g * c.sinh() / 2)
    for part, value in zip(found, (*wanted, g * c.cosh()), strict=True):
        torch.testing.assert_close(part, value, rtol=1e-11, atol=1e-12)
    cube = interaction.interaction_of(lambda z: z**3)
    torch.testing.assert_close(cube(A, B, c), 6 * c**3 + 9 * A * B * c, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(cube.partials(A, B, c).cc, 36 * c, rtol=1e-11, atol=1e-10)


def test_a_users_own_activation_goes_through_torch_func():
    point = torch.tensor([[0.8, 1.1, 0.4], [0.5, 0.2, -0.9]], dtype=torch.float64)

    def g(row, sigma):
        return interaction.in_cosine(sigma, *row)

    for transform in (torch.func.grad, torch.func.hessian):
        closed = torch.func.vmap(lambda row, t=transform: t(g)(row, "tanh"))(point)
        own = torch.func.vmap(lambda row, t=transform: t(g)(row, torch.tanh))(point)
        torch.testing.assert_close(own, closed, rtol=1e-10, atol=1e-11)


def test_linear_classes_of_the_piecewise_linear_family():
    r = torch.from_numpy(rng(3).uniform(0.1, 3, (2, 50)))
    u = torch.from_numpy(rng(4).uniform(-1, 1, 50))
    even, odd = (interaction.in_cosine("leaky_relu", *r, u, leak=leak) for leak in (0.0, 1.0))
    torch.testing.assert_close(even, interaction.in_cosine("relu", *r, u))
    torch.testing.assert_close(odd, interaction.in_cosine("identity", *r, u))
    torch.testing.assert_close(odd, r[0] * r[1] * u)


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus"])
@pytest.mark.parametrize("norm", [1e4, 1e6, 1e8])
def test_interactions_of_large_antiparallel_weights_keep_their_digits(name, norm):
    """E[σ(rx) σ(−rx)] = ∫ σ(t) σ(−t) e^{−t²/2r²} dt / (r √2π): by quadrature where σ(t) σ(−t) is not 0."""
    t = torch.linspace(-60, 60, 24_001, dtype=torch.float64)
    sigma = activations.activation(name)
    wanted = float(torch.trapezoid(sigma(t) * sigma(-t), t)) / (norm * math.sqrt(2 * math.pi))
    found = interaction.in_cosine(name, norm, norm, -1.0)
    assert float(found) == pytest.approx(wanted, rel=1e-7)  # e^{−t²/2r²} is 1 to 1e-7 where r ≥ 1e4 and |t| ≤ 5
    square = torch.tensor([norm**2], dtype=torch.float64)
    parts = interaction.interaction_of(name).partials(square, square, -square)
    assert float(parts.value) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("name", activations.NAMES)
@pytest.mark.parametrize("cosine", [-1.0, -0.5, 0.0, 1.0])
def test_interactions_of_large_weights_are_those_of_their_limit(name, cosine):
    """σ(rx)/r → relu (or its like), σ(rx) → a step: at r = 1e8 the limits' values to 1e-7 of the largest."""
    found = [float(interaction.in_cosine(name, r, r, cosine)) for r in (1e7, 1e8)]
    size = [float(interaction.in_cosine(name, r, r, 1.0)) for r in (1e7, 1e8)]
    assert all(math.isfinite(f) for f in found)
    assert found[0] / size[0] == pytest.approx(found[1] / size[1], abs=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"interaction: rho=1\.5; a cosine lies in \[−1, 1\]"):
        interaction.in_cosine("erf", 1.0, 1.0, 1.5)
    with pytest.raises(ValueError, match="interaction: r2=-1; a norm is not negative"):
        interaction.in_cosine("erf", 1.0, [1.0, -1.0], 0.0)
    with pytest.raises(ValueError, match="interaction: rho=nan"):
        interaction.in_cosine("erf", 1.0, 1.0, np.nan)
    with pytest.raises(ValueError, match="'step' is no activation; there are relu"):
        interaction.in_cosine("step", 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"trapezoid rule for norms 1 and 1 does not settle.*not smooth"):
        interaction.in_cosine(torch.abs, 1.0, 1.0, 0.5)
