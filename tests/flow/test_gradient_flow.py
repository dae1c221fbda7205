import itertools

import numpy as np
import pytest
import torch

from tests import oracles
from tests.cases import glorot_students, orthonormal_teacher
from tsdyn.flow.flows import gradient_flow
from tsdyn.flow.rodas import _solver, _stages
from tsdyn.flow.stationary import FunctionLoss, minimum_derivative, polish, signature
from tsdyn.population import interaction
from tsdyn.population.two_layer_loss import PopulationLoss

POTENTIAL = FunctionLoss(lambda x: x[0] ** 4 / 4 + torch.cos(3 * x[1]) * x[0] + 5 * x[1] ** 2, 2)
START = torch.tensor([[1.0, 0.4]], dtype=torch.float64)


def test_rodas_is_of_order_four():
    ends = []
    for steps in (32, 64, 128):
        y, h = START, torch.tensor([1 / steps], dtype=torch.float64)
        for _ in range(steps):
            _, y = _stages(POTENTIAL, y, h, POTENTIAL.gradient(y))
        ends.append(y)
    errors = [float((a - b).norm()) for a, b in itertools.pairwise(ends)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (abs(rates - 4) < 0.5).all()


def test_dense_output_and_ends_follow_the_tolerance():
    times = np.linspace(0, 1, 14)
    fine = gradient_flow(POTENTIAL, START, times=times, rtol=1e-9, atol=1e-9, gradient_tolerance=0.0)
    for tolerance in (1e-3, 1e-5, 1e-7):
        ds = gradient_flow(POTENTIAL, START, times=times, rtol=tolerance, atol=tolerance, gradient_tolerance=0.0)
        # ten steps or more, each with a local error of the tolerance, and a contracting flow
        assert abs(ds.parameters - fine.parameters).max() <= 20 * tolerance
        assert ds.stop_reason.item() == "time"
        np.testing.assert_array_equal(ds.parameters.isel(time=-1).values[0], ds.final.values[0])


def test_the_flow_is_bdfs_and_does_not_depend_on_company():
    loss = PopulationLoss(orthonormal_teacher(4), 2)
    initial = glorot_students(loss, 2)
    times = np.geomspace(0.1, 100, 8)
    ds = gradient_flow(loss, initial, times=times, rtol=1e-7, atol=1e-9, gradient_tolerance=0.0)
    assert dict(ds.weight.sizes) == {"seed": 2, "time": 8, "node": 2, "input_node": 5}
    for member in range(2):
        slow = oracles.gradient_flow(loss, initial[member], end=100, times=times, gradient_tolerance=0.0)
        w, a = loss.unpack(torch.from_numpy(slow.y.T.copy()))
        # errors of 1e-7 a step grow along the plateau's unstable directions, at most some thousandfold here
        np.testing.assert_allclose(ds.weight.values[member], w, atol=1e-4)
        np.testing.assert_allclose(ds.outgoing.values[member], a, atol=1e-4)
        alone = gradient_flow(loss, initial[member], times=times, rtol=1e-7, atol=1e-9, gradient_tolerance=0.0)
        np.testing.assert_allclose(ds.weight.values[member], alone.weight.values[0], atol=1e-9)
    assert (ds.loss.diff("time") < 0).all()


def test_each_member_says_why_it_stopped():
    loss = PopulationLoss(orthonormal_teacher(3, activation="relu"), 2)
    rows = glorot_students(loss, 5, seed=3)
    rows[1, :4] = 0.0  # a weight of norm zero
    rows[2] = float("nan")
    ds = gradient_flow(loss, rows, seeds=[10, 11, 12, 13, 14])
    assert ds.stop_reason.sel(seed=11).item() == "singular"
    assert ds.stop_reason.sel(seed=12).item() == "not finite"
    assert {"gradient"} <= set(ds.stop_reason.values.tolist())
    assert gradient_flow(loss, rows[0], max_steps=5).stop_reason.item() == "steps"
    stopped = gradient_flow(loss, rows[0], end=0.5, times=[0.1, 0.4, 2.0])
    assert stopped.stop_reason.item() == "time"
    assert stopped.stop_time.item() == pytest.approx(0.5)
    assert stopped.loss.notnull().values.tolist() == [[True, True, False]]


def test_relu_conserves_the_balance_of_each_node():
    """a² − |w|² of every node, a first integral of the exact flow, away from w = 0, where the flow is singular."""
    loss = PopulationLoss(orthonormal_teacher(3, activation="relu"), 2)
    ds = gradient_flow(loss, glorot_students(loss, 4, seed=5), times=np.geomspace(0.01, 20, 6), rtol=1e-8, atol=1e-10)
    ds = ds.isel(seed=ds.stop_reason != "singular")
    assert ds.sizes["seed"] >= 2
    balance = (ds.outgoing**2).sum("output") - (ds.weight**2).sum("input_node")
    # each step errs by 1e-8 of parameters of order 1, the balance by some four times that
    assert abs(balance - balance.isel(time=0)).max() <= 4e-8 * ds.steps.max()


def test_a_finite_samples_loss_has_its_flow():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=draw, dtype=torch.float64)
    y = torch.randn(50, generator=draw, dtype=torch.float64)
    least_squares = FunctionLoss(lambda w: (x @ w - y).square().mean(), 3)
    ds = gradient_flow(least_squares, torch.zeros(1, 3, dtype=torch.float64), gradient_tolerance=1e-9)
    found = polish(least_squares, torch.from_numpy(ds.final.values))
    wanted = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(found.point[0], wanted, rtol=0, atol=1e-12)
    assert found.kind.tolist() == ["minimum"]


def test_polish_tells_stationary_points_apart():
    """A minimum, a saddle, a valley that a symmetry may or may not explain, a channel to infinity."""
    quartic = FunctionLoss(lambda p: (p[0] ** 2 - 1) ** 2 + p[1] ** 2, 2)
    points = torch.tensor([[1.05, 0.1], [0.02, -0.03]], dtype=torch.float64)
    found = polish(quartic, points)
    assert found.kind.tolist() == ["minimum", "saddle"]
    assert found.signature.negative.tolist() == [0, 1]
    assert found.gradient_max.max() <= 1e-12
    flat = FunctionLoss(lambda p: (p[0] * p[1] - 1) ** 2, 2)
    at = torch.tensor([[1.0, 1.02]], dtype=torch.float64)
    assert polish(flat, at).kind.tolist() == ["degenerate"]
    known = FunctionLoss(lambda p: (p[0] * p[1] - 1) ** 2, 2, flat_directions=1)
    assert polish(known, at).kind.tolist() == ["minimum"]
    assert signature(known, polish(known, at).point).zero.tolist() == [0]
    channel = FunctionLoss(lambda p: torch.exp(-p[0]) + p[1] ** 2, 2)
    assert polish(channel, torch.tensor([[5.0, 0.1]], dtype=torch.float64)).kind.tolist() != ["minimum"]


@pytest.mark.parametrize(
    ("function", "start", "tolerances", "within"),
    [
        (lambda p: p[0] ** 4 + p[1] ** 2, 0.1, (1e-8, 1e-10, 1e-12), 1.0),
        (lambda p: torch.exp(-p[0]) + p[1] ** 2, 25.0, (1e-8, 1e-10, 1e-12), 1.0),
        (lambda p: 1 / p[0] + p[1] ** 2, 2e4, (1e-8,), 100.0),  # beyond, rounding hides its curvature
    ],
)
def test_curvature_that_vanishes_with_the_gradient_is_degenerate(function, start, tolerances, within):
    """By Kantorovich's condition at whatever gradient: over a Newton step x⁴ loses 5/9 of its curvature, e⁻ˣ 1 − 1/e,
    1/x 19/27."""
    loss = FunctionLoss(function, 2)
    for tolerance in tolerances:
        found = polish(loss, torch.tensor([[start, 0.1]], dtype=torch.float64), tolerance=tolerance, within=within)
        assert found.kind.tolist() == ["degenerate"]
        assert found.signature.zero.tolist() == [1]


def test_a_soft_minimum_is_a_minimum():
    """Curvatures 1 and 1e-10, far above rounding: 10 · 2 · ε of the largest."""
    soft = FunctionLoss(lambda p: (p[0] ** 2 + 1e-10 * (p[1] - 3) ** 2) / 2, 2)
    found = polish(soft, torch.tensor([[0.1, 3.1]], dtype=torch.float64))
    assert found.kind.tolist() == ["minimum"]
    assert found.point[0, 1] == pytest.approx(3, abs=1e-6)
    lost = FunctionLoss(lambda p: (p[0] ** 2 + 1e-15 * (p[1] - 3) ** 2) / 2, 2)
    assert polish(lost, torch.tensor([[0.1, 3.1]], dtype=torch.float64)).kind.tolist() == ["degenerate"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"initial has shape \(1, 3\); the loss takes \(member, 2\)"):
        gradient_flow(POTENTIAL, torch.zeros(3))
    with pytest.raises(ValueError, match="times must increase"):
        gradient_flow(POTENTIAL, START, times=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"rtol=0\.0"):
        gradient_flow(POTENTIAL, START, rtol=0.0)
    with pytest.raises(ValueError, match="2 labels for 1 rows"):
        gradient_flow(POTENTIAL, START, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"point has shape \(1, 3\); the loss takes \(member, 2\)"):
        polish(POTENTIAL, torch.zeros(3))


def test_a_step_beyond_a_negative_eigenvalue_solves_the_same_system():
    """Where H + I/(γh) is indefinite Cholesky's method fails, and LU's takes over for that member alone."""
    draw = torch.Generator().manual_seed(1)
    root = torch.randn(3, 6, 6, generator=draw, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(6)
    matrix[1] -= 5 * torch.eye(6)  # between its eigenvalues
    assert torch.linalg.eigvalsh(matrix[1])[[0, -1]].sign().tolist() == [-1, 1]
    right = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    found = _solver(matrix)(right)
    torch.testing.assert_close((matrix @ found[..., None])[..., 0], right, rtol=0, atol=1e-12)


def test_a_ridge_minimum_moves_with_its_targets_in_closed_form():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((12, 3), (12,)))

    def loss(row, targets):
        return 0.5 * (x @ row - targets).square().sum() + 0.1 * row.square().sum()

    solve = torch.linalg.solve(x.T @ x + 0.2 * torch.eye(3, dtype=torch.float64), x.T)
    found = minimum_derivative(loss, (solve @ y)[None] + 0.01, y)
    assert found.shape == (1, 3, 12)
    assert float((found[0] - solve).abs().max()) < 1e-12


def test_a_population_minimum_moves_with_its_teacher_as_when_polished_again():
    """One erf neuron against two: dθ*/dp at the teacher's rows and outgoing weights, against central differences."""
    rows = torch.tensor([[1.0, 0.2, 0.0], [0.3, 0.9, 0.4]], dtype=torch.float64)
    teacher = torch.cat([rows, torch.tensor([[1.0], [0.7]])], 1)

    def loss(row, p):
        w, a, v, b = row[:3], row[3], p[:, :3], p[:, 3]
        among = interaction("erf", v.norm(dim=1), w.norm(), (v @ w) / (v.norm(dim=1) * w.norm()))
        return a**2 * interaction("erf", w.norm(), w.norm(), torch.ones_like(a)) - 2 * a * (b * among).sum()

    flowed_to = torch.tensor([[0.64128383, 0.43306455, 0.14514656, 1.68745702]], dtype=torch.float64)  # from ones
    end = polish(FunctionLoss(lambda row: loss(row, teacher), 4), flowed_to).point
    found = minimum_derivative(loss, end, teacher)
    assert found.shape == (1, 4, 2, 4)
    for place in ((0, 0), (1, 2), (1, 3)):
        moved = []
        for step in (1e-4, -1e-4):
            other = teacher.clone()
            other[place] += step
            moved.append(polish(FunctionLoss(lambda row, other=other: loss(row, other), 4), end).point)
        slope = (moved[0] - moved[1])[0] / 2e-4
        assert float((found[(0, slice(None), *place)] - slope).abs().max()) < 1e-6 * float(slope.abs().max())


def test_what_moves_as_no_derivative_says_is_refused_and_symmetry_stands_still():
    circle = torch.tensor([[1.1, 0.0], [0.0, 0.9]], dtype=torch.float64)

    def loss(row, p):
        return (row.square().sum() - p) ** 2

    found = minimum_derivative(loss, circle, torch.tensor(1.0), flat_directions=1)
    assert torch.allclose(found, torch.eye(2, dtype=torch.float64) / 2, atol=1e-12)  # |θ*| = √p
    with pytest.raises(ValueError, match="row 0 is degenerate: only a minimum with a Hessian of full rank"):
        minimum_derivative(loss, circle, torch.tensor(1.0))
    with pytest.raises(ValueError, match="row 0 is saddle"):
        minimum_derivative(lambda row, p: p * (row[0] ** 2 - row[1] ** 2), torch.zeros(1, 2), torch.tensor(1.0))


def test_numbers_of_python_are_float64():
    """0.1 is not rounded to float32 on its way."""
    found = gradient_flow(lambda row: 0.5 * row.square().sum(), [[0.1]], end=0.0)
    assert found.final.values.tolist() == [[0.1]]
    assert signature(lambda row: row.square().sum(), [0.1]).least.dtype == torch.float64


def test_indefinite_systems_of_several_members_are_solved_on_several_threads():
    """torch's batched LU gives wrong factors for more than some 150 rows where MKL has several threads."""
    draw = np.random.default_rng(0)
    matrix, right = draw.standard_normal((3, 201, 201)), draw.standard_normal((3, 201))
    matrix += matrix.swapaxes(1, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = _solver(torch.from_numpy(matrix))(torch.from_numpy(right))
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, right[..., None])[..., 0], rtol=1e-9, atol=1e-9)
