"""Every registered activation: its derivative is autograd's, its module is itself, its closed forms are means."""

import math

import numpy as np
import pytest
import torch

from tsdyn import Network, population, registers
from tsdyn.networks.activations import activation, from_module
from tsdyn.population.two_layer_loss import PopulationLoss

NAMES = registers.ACTIVATIONS.names()
DTYPES = (torch.float32, torch.float64)


def grid(dtype):
    """Test points: far tails, the kink, its neighbours, and both signs of zero."""
    tiny = torch.finfo(dtype).tiny
    inner = torch.linspace(-8, 8, 401, dtype=dtype)
    return torch.cat([inner, torch.tensor([-60.0, -30.0, -tiny, -0.0, 0.0, tiny, 30.0, 60.0], dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_derivative_is_autograds(name, dtype):
    sigma, z = activation(name), grid(dtype).requires_grad_(True)
    (slope,) = torch.autograd.grad(sigma(z).sum(), z)
    mine = sigma.derivative(z.detach())
    assert mine.dtype == dtype
    # a few roundings of numbers of order 1; in the tails of relatives of exp, of their own exponent
    assert float((mine - slope).abs().max()) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_its_module_is_itself_and_is_read_back(name, dtype):
    sigma, z = activation(name), grid(dtype)
    module = sigma.module()
    assert torch.allclose(module(z), sigma(z), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    found = from_module(module)
    assert found is not None
    assert (found.name, found.leak) == (sigma.name, sigma.leak)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_called_piecewise_linear_obeys_lemma_1s_identity_and_nothing_else_does(name):
    sigma, z = activation(name), grid(torch.float64)
    z = z[z.abs() <= 8]
    obeys = bool(((sigma(z) - sigma.derivative(z) * z).abs() <= 1e-12).all())
    assert obeys == sigma.piecewise_linear


def quadrature(sigma, r1, r2, rho, nodes=1601, edge=9.0):
    """E[σ(r1 u) σ(r2 v)] by the trapezoid rule in both variables; u, v standard normal of correlation ρ."""
    t = np.linspace(-edge, edge, nodes)
    weight = np.exp(-t * t / 2) / math.sqrt(2 * math.pi) * (t[1] - t[0])
    outer = sigma(torch.from_numpy(r1 * t)).numpy()
    second = r2 * (rho * t[:, None] + math.sqrt(1 - rho * rho) * t)
    return float((weight * outer) @ (sigma(torch.from_numpy(second)).numpy() @ weight))


@pytest.mark.parametrize(("r1", "r2", "rho"), [(1.0, 1.0, 0.3), (0.4, 2.5, -0.7)])
@pytest.mark.parametrize("name", NAMES)
def test_the_interaction_is_the_expectation(name, r1, r2, rho):
    sigma = activation(name)
    mine = float(population.interaction(name, r1, r2, rho))
    # the trapezoid rule is exact to rounding for smooth σ; at a kink it stops at h², here 1e-4
    bound = 2e-4 if sigma.piecewise_linear and name != "identity" else 1e-9
    assert mine == pytest.approx(quadrature(sigma, r1, r2, rho), abs=bound)


@pytest.mark.parametrize("name", NAMES)
def test_the_population_loss_is_what_samples_say(name):
    draw = torch.Generator().manual_seed(1)

    def network(nodes):
        parts = (torch.randn(nodes, 4, generator=draw), torch.randn(2, nodes, generator=draw))
        return Network([p.double() for p in parts], activation=name)

    teacher, student = network(3), network(5)
    loss = PopulationLoss(teacher, 5)
    x = torch.randn(400_000, 4, generator=draw, dtype=torch.float64)
    errors = (student(x) - teacher(x)).square().sum(1)
    exact = float(loss.value(loss.pack([student])))
    assert abs(float(errors.mean()) - exact) <= 5 * float(errors.std()) / len(x) ** 0.5
