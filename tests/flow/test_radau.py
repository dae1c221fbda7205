"""Radau IIA of order 9 against closed forms, tighter tolerances and SciPy; and what flows of both methods promise."""

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.cases import glorot_students, orthonormal_teacher
from tsdyn.flow import flows
from tsdyn.flow.flows import Flow, gradient_flow
from tsdyn.flow.radau import STAGES, Radau, _tableau
from tsdyn.flow.stationary import FunctionLoss
from tsdyn.flow.steps import Limits
from tsdyn.population.two_layer_loss import PopulationLoss

METHODS = pytest.mark.parametrize("method", ["rodas", "radau"])


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_tableau_has_the_properties_that_define_it():
    """Collocation, c_5 = 1 and order 9: Σ b_i c_i^(q−1) = 1/q to q = 9 and no further; b is the last row."""
    found = _tableau()
    for power in range(1, STAGES + 1):
        np.testing.assert_allclose(found.matrix @ found.nodes ** (power - 1), found.nodes**power / power, atol=1e-15)
    weights = found.matrix[-1]
    for order in range(1, 10):
        assert abs(weights @ found.nodes ** (order - 1) - 1 / order) < 1e-15
    assert abs(weights @ found.nodes**9 - 1 / 10) > 1e-6
    for power in range(1, STAGES):  # D(4), which with these gives order 9 for equations of every kind
        left = (weights * found.nodes ** (power - 1)) @ found.matrix
        np.testing.assert_allclose(left, weights * (1 - found.nodes**power) / power, atol=1e-15)
    diagonal = found.back @ found.matrix @ found.forth
    blocks = [[p.real, -p.imag, p.imag, p.real] for p in found.pairs]
    assert diagonal[0, 0] == pytest.approx(found.real, abs=1e-13)
    np.testing.assert_allclose(diagonal[1:3, 1:3].ravel(), blocks[0], atol=1e-13)
    np.testing.assert_allclose(diagonal[3:, 3:].ravel(), blocks[1], atol=1e-13)


def test_a_step_errs_by_the_tenth_power_of_its_size():
    """dx/dt = −x², x(t) = 1/(1 + t): one step of each of two sizes, solved to rounding."""
    loss, start, errors = FunctionLoss(lambda x: (x**3).sum() / 3, 1), tensor([1.0]), []
    for h in (0.6, 0.4):
        method = Radau(loss, start, Limits(rtol=1e-14, atol=1e-14))
        tried = method.attempt(start, torch.full((1,), h, dtype=torch.float64), loss.gradient(start), torch.arange(1))
        errors.append(abs(float(tried.end) - 1 / (1 + h)))
    assert errors[1] > 1e-13  # above rounding
    # the next terms of the expansion change the exponent by less than 1 at these sizes
    assert 9 <= math.log(errors[0] / errors[1]) / math.log(0.6 / 0.4) <= 11


@pytest.mark.parametrize(("method", "rtol"), [("rodas", 1e-5), ("radau", 1e-7), ("radau", 1e-10)])
def test_a_stiff_linear_flow_is_its_exponential(method, rtol):
    """Curvatures from −0.5, along which it grows, to 1e6; between output times and at the end."""
    curvature = tensor(-0.5, 0.0, 1.0, 30.0, 1e3, 1e6)
    loss = FunctionLoss(lambda x: 0.5 * (curvature * x.square()).sum(), 6)
    times = np.array([0.0, 1e-3, 0.01, 0.3, 1.0, 4.0])
    ds = gradient_flow(
        loss, torch.ones(1, 6, dtype=torch.float64), times=times, rtol=rtol, atol=rtol / 100,
        gradient_tolerance=0.0, method=method,
    )  # fmt: skip
    exact = np.exp(-curvature.numpy() * times[:, None])
    # each step errs by rtol of each parameter or less; what grows multiplies it by e² at most
    assert (np.abs(ds.parameters.values[0] - exact) <= 8 * rtol * int(ds.steps[0])).all()
    np.testing.assert_array_equal(ds.parameters.isel(time=-1).values[0], ds.final.values[0])
    assert ds.stop_reason.item() == "time"


def test_an_accurate_trajectory_is_one_of_a_tighter_tolerance():
    """erf, where the tolerance is that of every step and errors grow along the plateau's unstable directions."""
    loss = PopulationLoss(orthonormal_teacher(4), 2)
    initial, times = glorot_students(loss, 3), np.geomspace(0.1, 100, 9)
    limits = {"times": times, "gradient_tolerance": 0.0, "method": "radau"}
    found, finer = (gradient_flow(loss, initial, rtol=r, atol=r / 100, **limits) for r in (1e-8, 1e-11))
    assert found.method == "Radau IIA of order 9"
    assert float(abs(found.weight - finer.weight).max()) <= 1e-8 * int(found.steps.max())
    assert int(found.steps.max()) < 200  # Rodas takes thousands
    slow = oracles.gradient_flow(loss, initial[0], end=100, times=times, gradient_tolerance=0.0)
    w, _ = loss.unpack(torch.from_numpy(slow.y.T.copy()))
    np.testing.assert_allclose(finer.weight.values[0], w, atol=1e-5)


@pytest.mark.parametrize(("k", "n"), [(3, 2), (7, 1), (6, 5)])
def test_a_member_has_the_same_bits_in_every_company(k, n):
    """10, 9 and 40 parameters: a multiple of a cache line's numbers or not."""
    loss = PopulationLoss(orthonormal_teacher(k), n)
    rows = glorot_students(loss, 4, seed=2)
    options = {"times": np.geomspace(0.1, 100, 5), "rtol": 1e-8, "atol": 1e-10}
    together = gradient_flow(loss, rows, **options)
    for member in range(4):
        alone = gradient_flow(loss, rows[member], **options)
        np.testing.assert_array_equal(alone.weight.values[0], together.weight.values[member])
        np.testing.assert_array_equal(alone.final.values[0], together.final.values[member])


def test_a_flow_halted_and_stored_goes_on_with_the_same_bits(monkeypatch):
    """Also where members are computed in chunks, whose eigenvectors are given back between them."""
    loss = PopulationLoss(orthonormal_teacher(4), 2)
    rows, times = glorot_students(loss, 3), np.array([0.5, 5.0, 50.0])
    limits = Limits(rtol=1e-8, atol=1e-10)
    whole = Flow(loss, rows, times=times, limits=limits)
    whole.until(math.inf)
    monkeypatch.setattr(flows, "chunk_size", lambda loss: 2)
    first = Flow(loss, rows, times=times, limits=limits)
    for time in (0.1, 3.0, 70.0):
        first.until(time)
    assert first.running.all()
    second = Flow(loss, torch.zeros_like(rows) + 1, times=times, limits=limits)
    second.restore(first.state())
    second.until(math.inf)
    for name in ("y", "path", "t", "steps", "reason"):
        np.testing.assert_array_equal(second.joined(name), whole.joined(name))


@METHODS
def test_a_flow_that_leaves_all_numbers_says_so(method):
    """dx/dt = x² reaches infinity at t = 1; the other member ends at 0, as it does alone."""
    loss = FunctionLoss(lambda x: -(x**3).sum() / 3, 1)
    ds = gradient_flow(loss, tensor([1.0], [-1.0]), end=1e3, gradient_tolerance=1e-4, method=method)
    assert ds.stop_reason.values.tolist() == ["not finite", "gradient"]
    # of x(t) = 1/(1 − t) an error of 1e-4 per step moves the end by some 1e-2 at most; −1/(1 + t) forgets errors
    assert float(ds.stop_time[0]) == pytest.approx(1.0, abs=1e-2)
    assert float(ds.final[1, 0]) == pytest.approx(-1 / (1 + float(ds.stop_time[1])), abs=1e-4 * int(ds.steps[1]))


def test_a_curvature_that_is_not_finite_shortens_the_step_for_its_member_alone():
    """√x has none at 0, which a prediction may hit: the flow ends beside it, the neighbour as it does alone."""
    loss = FunctionLoss(lambda x: x.clamp(min=0).sqrt().sum() + 0.5 * x[1] ** 2, 2)
    rows = tensor([0.3, 1.0], [5.0, 2.0])
    both, alone = (gradient_flow(loss, r, end=0.1, method="radau", atol=1e-8) for r in (rows, rows[1]))
    np.testing.assert_array_equal(both.final.values[1], alone.final.values[0])
    assert both.stop_reason.values.tolist() == ["time", "time"]


def test_float32_is_integrated_to_what_it_resolves():
    loss = FunctionLoss(lambda x: 0.5 * (x.square() * torch.tensor([1.0, 50.0, 2e3])).sum(), 3, dtype=torch.float32)
    ds = gradient_flow(
        loss, torch.ones(1, 3), times=[0.5, 2.0], rtol=2e-6, atol=2e-6, gradient_tolerance=0.0, method="radau"
    )
    exact = np.exp(-np.array([1.0, 50.0, 2e3]) * np.array([0.5, 2.0])[:, None])
    assert (np.abs(ds.parameters.values[0] - exact) <= 2e-6 * int(ds.steps[0])).all()
    with pytest.raises(ValueError, match=r"rtol=1e-08; float32 resolves 1e-06, give at least that"):
        gradient_flow(loss, torch.ones(1, 3), rtol=1e-8)


def test_the_method_follows_from_the_tolerance_or_is_given_by_name():
    loss = FunctionLoss(lambda x: 0.5 * x.square().sum(), 1)
    assert gradient_flow(loss, tensor([1.0]), end=1.0).method == "Rodas4(3)"
    assert gradient_flow(loss, tensor([1.0]), end=1.0, rtol=1e-6).method == "Rodas4(3)"
    assert gradient_flow(loss, tensor([1.0]), end=1.0, rtol=9e-7).method == "Radau IIA of order 9"
    assert gradient_flow(loss, tensor([1.0]), end=1.0, rtol=1e-8, method="rodas").method == "Rodas4(3)"
    with pytest.raises(ValueError, match=r"method='bdf'; it is one of auto, rodas, radau"):
        gradient_flow(loss, tensor([1.0]), method="bdf")
