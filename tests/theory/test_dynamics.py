"""Luck Matters' approximate dynamics: overlaps in closed form, Theorem 4's envelope, Theorem 5's fates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from tsdyn import Network, theory
from tsdyn.theory import luck_matters


@pytest.mark.parametrize("threshold", [0.0, 0.7, 2.5])
@pytest.mark.parametrize("theta", [0.05, 0.4, math.pi / 2, 2.0, 3.1])
def test_overlaps_are_the_gaussian_integrals(theta, threshold):
    """Given w·x = u, w'·x is N(u cos θ, sin² θ): one integral is left, and QUADPACK does it to 1e-12."""
    c, s = math.cos(theta), math.sin(theta)

    def both(u):
        return norm.pdf(u) * norm.sf((threshold - u * c) / s)

    def product(u):
        mean = u * c - threshold
        return norm.pdf(u) * (u - threshold) * (mean * norm.cdf(mean / s) + s * norm.pdf(mean / s))

    points = [threshold / c] if threshold < threshold / c < 40 else None  # where a small s makes a kink
    for integrand, closed in ((both, luck_matters.gate_overlap), (product, luck_matters.activation_overlap)):
        value, error = quad(integrand, threshold, 40, points=points, epsabs=1e-13, epsrel=1e-13, limit=500)
        assert abs(closed(theta, threshold) - value) <= max(error, 1e-13)


def test_overlaps_at_zero_threshold_are_the_arc_cosine_kernels():
    theta = np.linspace(0, math.pi, 50)
    np.testing.assert_allclose(luck_matters.gate_overlap(theta), (math.pi - theta) / (2 * math.pi), atol=2e-16)
    arc_cosine = (np.sin(theta) + (math.pi - theta) * np.cos(theta)) / (2 * math.pi)
    np.testing.assert_allclose(luck_matters.activation_overlap(theta), arc_cosine, atol=2e-16)


def test_lemma_4_the_overlap_with_the_teacher_is_quadratic_in_the_angle():
    """ψ_l(0) − ψ_l(θ) = θ²/4 − θ³/6π + O(θ⁴).  Source: Tian et al. (2019), Lemma 4."""
    theta = np.array([1e-1, 1e-2, 1e-3])
    lost = 0.5 - luck_matters.activation_overlap(theta)
    rest = lost - (theta**2 / 4 - theta**3 / (6 * np.pi))
    assert (np.abs(rest) <= theta**4 / 48 * 1.2 + np.finfo(float).eps).all()  # the next term is θ⁴/48


def test_overlaps_are_the_theory_moments_of_gaussian_samples():
    """D and L of `theory.expectations` on N samples, within five standard errors (E of a product of bounded terms)."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((3, 4))
    norms = np.linalg.norm(w, axis=1)
    net = Network([w, np.eye(3)], [-0.5 * norms, None])
    x = torch.from_numpy(rng.standard_normal((200_000, 4)))
    found = theory.expectations(net, net, x)
    theta = luck_matters.angles(w, w)
    f = net.trace(x).activations[0].numpy()
    for closed, sampled, square in (
        (luck_matters.gate_overlap(theta, 0.5), found.D[0], found.D[0].numpy()),
        (np.outer(norms, norms) * luck_matters.activation_overlap(theta, 0.5), found.L[0], (f**2).T @ (f**2) / len(f)),
    ):
        assert (np.abs(closed - sampled.numpy()) <= 5 * np.sqrt(square / len(x))).all()


def test_angles_see_what_an_arc_cosine_cannot():
    w = np.array([[1.0, 0.0]])
    assert luck_matters.angles(w, np.array([[1.0, 1e-12]]))[0, 0] == pytest.approx(1e-12, rel=1e-9)
    assert luck_matters.angles(w, np.array([[-3.0, 3e-12]]))[0, 0] == pytest.approx(math.pi - 1e-12, abs=1e-15)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    nodes=st.integers(2, 5),
    threshold=st.sampled_from([0.0, 1.5, 2.0, 2.5]),
    noise=st.floats(1e-4, 1e-2),
)
def test_theorem_4_envelope_bounds_every_angle(seed, nodes, threshold, noise):
    """Where γ, d̄ > 0.  The only slack is the integrator's 1e-10 relative tolerance, on weights of unit norm."""
    rng = np.random.default_rng(seed)
    teacher = np.eye(nodes, 8)
    start = teacher + noise * rng.standard_normal(teacher.shape)
    ds = luck_matters.projected_dynamics(teacher, start, np.linspace(0, 300, 7), threshold=threshold)
    assert float(ds.drift.max()) <= 1e-9  # the projection keeps ‖w‖
    if ds.attrs["gamma"] > 0 and ds.attrs["d_bar"] > 0:
        assert float((np.sin(ds.angle) - np.sin(ds.bound)).max()) <= 1e-9
    else:
        assert np.isnan(ds.bound).all()


def test_theorem_4_constants_of_two_orthogonal_teachers():
    """h = 0, m = 2: ψ = (π − θ)/2π, so eps = ½ and K = max over θ_1 of 1/(π − θ_1) × (θ_0 / 2 sin θ_0/2)."""
    t = 0.02
    start = np.array([[math.cos(t), math.sin(t)], [0.0, 1.0]])
    rate = luck_matters.projected_rate(np.eye(2), start)
    s = math.sin(t / 2)
    k = t / (2 * s * (math.pi / 2 - t))
    m = (1 + k) * (1 + 2 * k * s) ** 2 / math.cos(t / 2)
    expected = [t, k, 0.5, m, math.cos(t) - 0.5 * m, (1 - 2 * k * s) / 2]
    np.testing.assert_allclose(list(vars(rate).values()), expected, rtol=1e-12)
    assert rate.gamma > 0


def test_theorem_4_with_a_plus_in_d_bar_would_be_false():
    """THEORY section 4.2: the printed 1 + 2Ks is no lower bound.  With one node's overlap, d*_jj < ψ_d(0) at once."""
    t = 0.4
    assert luck_matters.gate_overlap(t) < luck_matters.gate_overlap(0.0)
    rate = luck_matters.projected_rate(np.eye(2), np.array([[math.cos(t), math.sin(t)], [0.0, 1.0]]))
    assert rate.d_bar <= luck_matters.gate_overlap(t)


@pytest.fixture(scope="module")
def lucky():
    rng = np.random.default_rng(0)
    teacher = np.eye(3, 20), rng.standard_normal((3, 4))
    rest = rng.standard_normal((5, 20))
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    start = np.concatenate([teacher[0] + 0.02 * rng.standard_normal((3, 20)), rest])
    return luck_matters.two_layer_dynamics(
        teacher, (start, 0.01 * rng.standard_normal((8, 4))), np.linspace(0, 1000, 41), threshold=1.0
    )


def test_theorem_5_lucky_nodes_converge_and_the_rest_vanish(lucky):
    assert lucky.lucky.values.tolist() == [0, 1, 2]
    end = lucky.isel(time=-1)
    assert float(end.angle.max()) < 1e-3 * float(lucky.angle.isel(time=0).max())
    assert float(end.fanout_error.max()) < 1e-3
    assert float(end.fanout_norm.where(end.rest).max()) < 1e-3 * float(end.fanout_norm.where(~end.rest).min())


def test_theorem_5_rest_moves_no_farther_than_its_fanout_carries_it(lucky):
    """The integral of the bound has the integrator's error, 1e-10 relative."""
    assert (lucky.displacement <= lucky.displacement_bound * (1 + 1e-8) + 1e-12).all()
    rest = lucky.isel(time=-1).where(lucky.rest)
    assert float(rest.displacement.max()) < 0.2 < float(lucky.displacement.isel(time=-1).where(~lucky.rest).min())


def test_theorem_5_fanouts_decay_no_slower_than_the_least_eigenvalue(lucky):
    """Late, W stands still and V' = −L (V − V_∞): ‖V − V_∞‖ falls by exp(−λ_min Δt) at least each interval.

    W still moves by `still`, which moves L V and so V by as much; times the interval that is the slack.
    """
    fanout, weight = lucky.fanout.values, lucky.weight.values
    left = np.linalg.norm((fanout - fanout[-1]).reshape(len(fanout), -1), axis=1)
    step = float(lucky.time[1])
    for k in range(20, 36):
        still = np.abs(weight[k:] - weight[-1]).max()
        decay = math.exp(-float(lucky.rate[k]) * step)
        assert left[k + 1] <= decay * left[k] + 20 * step * still + 1e-9


def test_two_layer_dynamics_are_the_updates_of_the_theory():
    """At t = 0: V' is E[f g_Lᵀ] of the true gradient (exact at the top weight), from the same moments by sampling."""
    rng = np.random.default_rng(3)
    (w_star, v_star), (w, v) = [(rng.standard_normal((n, 5)), rng.standard_normal((n, 2))) for n in (2, 3)]
    student, teacher = (Network([a, b.T], [None, None]) for a, b in ((w, v), (w_star, v_star)))
    dt = 1e-6
    ds = luck_matters.two_layer_dynamics((w_star, v_star), (w, v), [0.0, dt])
    x = torch.from_numpy(rng.standard_normal((400_000, 5)))
    (top,) = [u for u in theory.luck_matters_updates(student, teacher, x) if u.layer == 2]
    moved = (ds.fanout.values[1] - ds.fanout.values[0]) / dt
    f, g = student.trace(x).activations[0].numpy(), (teacher(x) - student(x)).numpy()
    error = (f[:, :, None] * g[:, None, :]).std(0) / math.sqrt(len(x))
    assert (np.abs(moved - top.exact.numpy().T[:3]) <= 5 * error + 10 * dt).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: luck_matters.projected_rate(np.eye(2), np.eye(3)), "as many nodes"),
        (lambda: luck_matters.projected_rate(np.eye(2), np.zeros((2, 2))), "no direction"),
        (lambda: luck_matters.projected_dynamics(np.eye(2), np.eye(2), [1.0, 2.0]), "from 0"),
        (
            lambda: luck_matters.two_layer_dynamics((np.eye(2), np.eye(3)), (np.eye(2), np.eye(2)), [0.0, 1.0]),
            r"\(2, 2\)",
        ),
        (
            lambda: luck_matters.two_layer_dynamics(
                (np.eye(2), np.eye(2)), (np.array([[1.0, 1.0]]), np.ones((1, 2))), [0.0, 1.0]
            ),
            "repeat",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class BatchNorm(torch.nn.Module):
    """Training mode; torch's own refuses eps = 0."""

    def __init__(self, nodes):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(f(nodes, dtype=torch.float64)) for f in (torch.ones, torch.zeros))
        self.eps = 0.0

    def forward(self, x):
        centred = x - x.mean(0)
        return self.weight * centred / (centred.square().mean(0) + self.eps).sqrt() + self.bias


def implicit_midpoint(gradient, flat, step):
    """w₊ = w + h f((w + w₊)/2) by fixed-point iteration; None where it does not contract."""
    following = flat
    for _ in range(60):
        before, following = following, flat + step * gradient((flat + following) / 2)
        if np.abs(following - before).max() <= 1e-15 * np.abs(flat).max():
            return following
    return None


@pytest.mark.parametrize("order", ["relu-batchnorm", "batchnorm-relu"])
def test_theorem_3_batchnorm_keeps_the_norm_under_gradient_flow(order):
    """d‖w_j‖²/dt = −2 w_j·∂J/∂w_j = 0 with eps = 0: J does not change with the scale of a node's incoming parameters.

    After a ReLU that scale is [w; b]'s, before it w's alone.  The implicit midpoint rule keeps a quadratic invariant of
    the flow exactly: w₊ − w = h f(m), m = (w₊ + w)/2, so ‖w₊‖² − ‖w‖² = 2h m·f(m) = 0; the rest is rounding.  It has
    no solution once the flow slides along a gate's edge, where f jumps; from there on each step of descent must grow
    the norm by its own square alone.  With eps = 1e-5 the identity is off, by far more than rounding.
    """
    torch.manual_seed(0)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    linear, top = torch.nn.Linear(4, 5).double(), torch.nn.Linear(5, 3).double()
    norm_layer = BatchNorm(5)
    middle = [torch.nn.ReLU(), norm_layer] if order == "relu-batchnorm" else [norm_layer, torch.nn.ReLU()]
    module = torch.nn.Sequential(linear, *middle, top)
    free = list(module.parameters())
    sizes = [p.numel() for p in free]

    def gradient(flat):
        with torch.no_grad():
            for p, part in zip(free, torch.from_numpy(flat).split(sizes), strict=True):
                p.copy_(part.view_as(p))
        loss = 0.5 * (y - module(x)).square().sum(1).mean()
        return -torch.cat([g.flatten() for g in torch.autograd.grad(loss, free)]).numpy()

    def squares(flat):
        w, b = flat[:20].reshape(5, 4), flat[20:25]
        return (w**2).sum(1) + (b**2 if order == "relu-batchnorm" else 0)

    start = torch.cat([p.detach().flatten() for p in free]).numpy()
    flow = gradient(start)
    along = (start[:20] * flow[:20]).reshape(5, 4).sum(1) + (
        start[20:25] * flow[20:25] if order == "relu-batchnorm" else 0
    )
    assert np.abs(along).max() <= 1e-14 * np.abs(start[:20]).max() * np.abs(flow[:20]).max() * 20
    flat, step, steps = start, 0.01, 0
    while steps < 200 and (following := implicit_midpoint(gradient, flat, step)) is not None:
        flat, steps = following, steps + 1
    assert np.abs(flat[:20] - start[:20]).max() > 0.01  # it went somewhere
    np.testing.assert_allclose(squares(flat), squares(start), rtol=1e-12)
    for _ in range(50):
        following = flat + step * gradient(flat)
        np.testing.assert_allclose(squares(following), squares(flat) + squares(following - flat), rtol=1e-13)
        flat = following
    norm_layer.eps = 1e-5
    off = gradient(start)
    drift = (start[:20] * off[:20]).reshape(5, 4).sum(1) + (
        start[20:25] * off[20:25] if order == "relu-batchnorm" else 0
    )
    assert np.abs(drift).max() > 1e3 * np.abs(along).max()
