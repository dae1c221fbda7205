"""Online learning: the differential equation, its simulation, overlaps and the conventions of other codes."""

import json
import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.cases import REFERENCE, orthonormal_teacher, rng
from tsdyn import Network, flow
from tsdyn.flow.overlap_dynamics import _PAIRS, Rates, _fluctuation, _pairs, _slope
from tsdyn.networks import activations
from tsdyn.population.two_layer_loss import PopulationLoss

CASES = json.loads((REFERENCE / "nn2pp.json").read_text(encoding="utf-8"))["cases"]
NAME = {"erf": "erf", "lin": "identity"}


def start(case, seed="1"):
    K, M = case["K"], case["M"]
    given = {name: np.array(values) for name, values in case["seeds"][seed]["ic"].items()}
    return [given["Q"].reshape(K, K), given["R"].reshape(K, M), given["T"].reshape(M, M), given["v"], given["A"]]


def rule(case):
    keys = {"learning_rate": "lr", "second_learning_rate": "lr2", "weight_decay": "wd", "noise": "sigma"}
    return {name: case[key] or 0.0 for name, key in keys.items()} | {"activation": NAME[case["activation"]]}


def random_overlaps(K, M, seed=0, inputs=7):
    draw = rng(seed)
    w, B = draw.standard_normal((K, inputs)) / 2, draw.standard_normal((M, inputs)) / 2
    return [w @ w.T, w @ B.T, B @ B.T, draw.standard_normal(K), draw.standard_normal(M)]


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, case in CASES.items() for seed in list(case["seeds"])[:2]]
)
def test_the_equation_is_nn2pps(name, seed):
    """Its `ode` column is the same equation by DOP853 to rtol 1e-10 in Q, R, v, and eg a function of these."""
    case = CASES[name]
    wanted = case["seeds"][seed]["ode"]
    ds = flow.order_parameters(*start(case, seed), alpha=wanted["alpha"], **rule(case))
    np.testing.assert_allclose(ds.eg, wanted["eg"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(ds.Q[-1].values.ravel(), wanted["Q_end"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(ds.R[-1].values.ravel(), wanted["R_end"], rtol=0, atol=1e-8)
    np.testing.assert_allclose(ds.v[-1], wanted["v_end"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("activation", ["erf", "identity"])
@pytest.mark.parametrize(("K", "M", "second"), [(1, 1, 0.3), (3, 2, 0.7), (2, 4, 0.0)])
def test_the_slope_is_the_one_printed(activation, K, M, second):
    """Against the equation written out index by index; both are sums of some 100 terms of order 1."""
    begin = random_overlaps(K, M)
    rates = {"learning_rate": 0.6, "second_learning_rate": second, "weight_decay": 0.05, "batch": 3, "noise": 0.2}
    wanted = oracles.order_parameter_slope(*begin, **rates, activation=activation)
    sigma = activations.activation(activation)
    C = flow.Overlaps(*map(torch.from_numpy, begin)).covariance.numpy()
    for pairs in {_pairs(sigma), _PAIRS.get(activation, _pairs(sigma))}:
        found = _slope(C, begin[3], begin[4], pairs, Rates(**rates), _fluctuation(sigma))
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)


def test_the_printed_integrals_are_the_gaussian_ones():
    """By Gauss–Hermite in four dimensions: 40 nodes per side are exact to rounding for fields of variance below ½."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    w = rng(1).standard_normal((4, 4)) / 5
    C = w @ w.T
    fields = w @ np.stack(np.meshgrid(*[nodes] * 4, indexing="ij")).reshape(4, -1)
    density = np.einsum("a,b,c,d->abcd", *[weights] * 4).ravel()
    g = torch.erf(torch.from_numpy(fields) / math.sqrt(2)).numpy()
    slope = math.sqrt(2 / math.pi) * np.exp(-(fields**2) / 2)
    printed = oracles.saad_solla(C.tolist())
    assert np.diag(C).max() < 0.5
    for name, product in {
        "I2": (g[0], g[1]),
        "I3": (slope[0], fields[1], g[2]),
        "I4": (slope[0], slope[1], g[2], g[3]),
        "J2": (slope[0], slope[1]),
    }.items():
        integral = np.prod(product, 0) @ density
        assert printed[name](*range(len(product))) == pytest.approx(integral, rel=0, abs=1e-13)


@pytest.mark.parametrize(("K", "noise", "rate"), [(2, 0.05, 0.5), (3, 0.1, 0.2)])
def test_a_linear_committee_ends_where_it_should(K, noise, rate):
    """eg* = η ς² K / (4 − 2ηK)."""
    begin = random_overlaps(K, 2)[:3]
    ds = flow.order_parameters(*begin, learning_rate=rate, noise=noise, alpha=[600.0], activation="identity")
    assert ds.eg.item() == pytest.approx(rate * noise**2 * K / (4 - 2 * rate * K), rel=0, abs=1e-8)


@pytest.mark.parametrize("activation", ["erf", "tanh", "relu"])
def test_an_infinite_batch_is_the_gradient_flow_of_the_population(activation):
    """eg = ½L and t = ηα/2 (`convention`); two integrators of the same flow, each good to its tolerance."""
    teacher = orthonormal_teacher(2, activation=activation)
    draw = torch.Generator().manual_seed(2)
    w = torch.randn(2, 3, generator=draw, dtype=torch.float64) / 2
    student = Network([w, torch.tensor([[0.5, -0.8]], dtype=torch.float64)], activation=activation)
    known = flow.convention("gradient_flow", learning_rate=0.7, nodes=2, teacher_nodes=2, both=True)
    loss, times = PopulationLoss(teacher, 2), np.linspace(0, 3, 4)
    ds = flow.gradient_flow(loss, loss.pack(student), times=times, rtol=1e-7, atol=1e-8, gradient_tolerance=0.0)
    overlaps = flow.overlaps(student, teacher)
    online = flow.order_parameters(
        *overlaps, alpha=known.alpha(times), batch=math.inf, activation=activation, **known.rates
    )
    # some hundred steps of 1e-7 each, in a flow that expands a little
    np.testing.assert_allclose(online.eg, ds.loss[0] / 2, rtol=0, atol=1e-5)
    np.testing.assert_allclose(online.v, ds.outgoing[0, ..., 0], rtol=0, atol=1e-5)


def test_seeds_are_rows_and_do_not_disturb_each_other():
    pair = [np.stack(x) for x in zip(random_overlaps(2, 2, 1), random_overlaps(2, 2, 2), strict=True)]
    both = flow.order_parameters(*pair, learning_rate=0.5, alpha=[0.0, 1.0, 4.0], seeds=[4, 9])
    alone = flow.order_parameters(*random_overlaps(2, 2, 2), learning_rate=0.5, alpha=[0.0, 1.0, 4.0])
    np.testing.assert_array_equal(both.sel(seed=9).eg, alone.eg)
    assert both.eg.dims == ("seed", "alpha")
    assert both.Q.attrs["units"] == "1"
    assert both.stop_reason.values.tolist() == ["time", "time"]
    np.testing.assert_allclose(both.Q.isel(alpha=0).values, pair[0], rtol=0, atol=1e-15)


def test_divergence_is_told():
    """A linear committee with ηK > 2."""
    begin = random_overlaps(2, 1)[:3]
    ds = flow.order_parameters(*begin, learning_rate=1.5, alpha=[0.0, 1.0, 1000.0], activation="identity")
    assert ds.stop_reason.item() == "diverged"
    assert ds.eg.notnull().values.tolist() == [True, True, False]


# --- simulation ----------------------------------------------------------------------------------------------


def test_a_simulation_starts_with_the_overlaps_as_given():
    """Rounding of sums of N products: 1e-15 of the squared norms."""
    begin = start(CASES["M2K4_both_lr0.5"])
    ds = flow.online(*begin, inputs=300, learning_rate=0.5, alpha=[0.0], seeds=3)
    assert ds.eg.dims == ("seed", "alpha")
    for name, wanted in zip(("Q", "R"), begin, strict=False):
        np.testing.assert_allclose(ds[name].values[:, 0], np.stack([wanted] * 3), rtol=0, atol=2e-14)
    singular = [np.ones((2, 2)), np.ones((2, 1)), np.ones((1, 1))]  # three times the same weight
    same = flow.online(*singular, inputs=3, learning_rate=0.5, alpha=[0.0])
    np.testing.assert_allclose(same.Q.values[0, 0], 1.0, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("first", "second", "batch", "decay", "noise"),
    [(0.5, 0.0, 1, 0.3, 0.1), (0.5, 0.2, 3, 0.0, 0.2), (0.4, 0.7, 1, 0.5, 0.0), (0.0, 0.3, 2, 0.2, 0.1)],
)
def test_a_step_is_goldts(first, second, batch, decay, noise):
    """One step by hand in w/√N units, the samples drawn as the simulation draws them."""
    begin, N = random_overlaps(3, 2), 11
    ds = flow.online(
        *begin, inputs=N, learning_rate=first, second_learning_rate=second, batch=batch, weight_decay=decay,
        noise=noise, alpha=[1 / N], seeds=[6],
    )  # fmt: skip
    frame, inputs, errors = (np.random.default_rng(s) for s in np.random.SeedSequence(6).spawn(3))
    from tsdyn.flow import overlap_matrices

    w, B = (x.numpy() for x in overlap_matrices.weights(flow.Overlaps(*map(torch.from_numpy, begin)), N, frame))
    v, A = begin[3], begin[4]
    x = inputs.standard_normal((batch, N))
    g, slope = (lambda z: torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy()), math.sqrt(2 / math.pi)
    l, r = x @ w.T / math.sqrt(N), x @ B.T / math.sqrt(N)  # noqa: E741
    delta = g(r) @ A + (noise * errors.standard_normal(batch) if noise else 0) - g(l) @ v
    kept = 1 - decay / N
    moved = first / math.sqrt(N) / batch * (v * slope * np.exp(-(l**2) / 2) * delta[:, None]).T @ x
    after = w * kept + moved if first else w
    np.testing.assert_allclose(ds.Q.values[0, 0], after @ after.T / N, rtol=0, atol=1e-13)
    np.testing.assert_allclose(ds.R.values[0, 0], after @ B.T / N, rtol=0, atol=1e-13)
    learned = v * kept + second / N / batch * g(l).T @ delta if second else v
    np.testing.assert_allclose(ds.v.values[0, 0], learned, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "inputs", "more"), [
    ("M2K4_lr0.5_s0.01", 400, {}),
    ("M2K4_both_lr0.5", 400, {"batch": 4}),
    ("M2K2_lr0.2_s0", 400, {"weight_decay": 0.05, "batch": 2}),
    ("lin_M2K2_lr0.2", 400, {"noise": 0.3}),
])  # fmt: skip
def test_the_simulation_scatters_about_the_equation(name, inputs, more):
    """Mean of eg over seeds against the equation: five of its own standard errors, and a bias of order 1/N."""
    case = CASES[name]
    given, kwargs = start(case), rule(case) | more
    alpha = np.linspace(0, 8, 5)
    sim = flow.online(*given, inputs=inputs, alpha=alpha, seeds=12, **kwargs)
    ode = flow.order_parameters(*given, alpha=alpha, **kwargs)
    scatter = sim.eg.std("seed", ddof=1) / math.sqrt(12)
    assert (abs(sim.eg.mean("seed") - ode.eg) <= 5 * scatter + ode.eg * 5 / inputs + 1e-12).all()


def test_seeds_of_a_simulation_are_their_own():
    begin = random_overlaps(2, 2)
    kwargs = {"inputs": 30, "learning_rate": 0.5, "noise": 0.1}
    together = flow.online(*begin, alpha=[1.0, 2.0], seeds=[3, 5, 7], **kwargs)
    alone = flow.online(*begin, alpha=[2.0], seeds=[5], **kwargs)
    # products of another shape may round another way: 60 steps of 1e-16
    np.testing.assert_allclose(together.eg.sel(seed=5, alpha=2.0), alone.eg[0, 0], rtol=1e-12)
    assert len(set(together.eg.values[:, 1].tolist())) == 3


def test_a_simulation_that_diverges_is_nan():
    begin = random_overlaps(2, 1)[:3]
    ds = flow.online(*begin, inputs=8, learning_rate=200.0, alpha=[0.0, 300.0], activation="identity")
    assert ds.eg.notnull().values.tolist() == [[True, False]]


# --- overlaps and conventions ----------------------------------------------------------------------------------


def test_overlaps_are_a_networks():
    teacher = orthonormal_teacher(2, inputs=3)
    w = torch.tensor([[0.3, -1.0, 0.5], [0.2, 0.4, 2.0]], dtype=torch.float64)
    student = Network([w, torch.tensor([[0.5, -1.0]], dtype=torch.float64)], activation="erf")
    found = flow.overlaps(student, teacher)
    torch.testing.assert_close(found.R, w[:, :2])
    loss = PopulationLoss(teacher, 2)
    error = flow.generalization_error(found, teacher.activation)
    assert float(error) == pytest.approx(float(loss.value(loss.pack(student))[0]) / 2, rel=1e-14)


@pytest.mark.parametrize("name", ["tsdyn", "torch"])
def test_a_step_of_torch_is_a_step_of_goldts(name):
    """nn.Module, MSELoss and SGD on one sample, against the simulation with what `convention` makes of its numbers."""
    N, rate, decay = 9, 0.01, 0.1
    known = flow.convention(name, learning_rate=rate, nodes=2, teacher_nodes=2, inputs=N, weight_decay=decay, both=True)
    begin = random_overlaps(2, 2)
    ds = flow.online(*begin, inputs=N, alpha=known.alpha([1]), seeds=[0], **known.rates)
    from tsdyn.flow import overlap_matrices

    frame, inputs, _ = (np.random.default_rng(s) for s in np.random.SeedSequence(0).spawn(3))
    o = flow.Overlaps(*map(torch.from_numpy, begin))
    w, B = (x / math.sqrt(N) for x in overlap_matrices.weights(o, N, frame))
    x = torch.from_numpy(inputs.standard_normal((1, N)))
    module = Network([w, o.v[None].clone()], activation="erf").to_torch()
    factor = 1.0 if name == "torch" else 0.5
    optimizer = torch.optim.SGD(module.parameters(), rate, weight_decay=decay)
    (factor * torch.nn.MSELoss()(module(x), Network([B, o.A[None]], activation="erf")(x))).backward()
    optimizer.step()
    after = flow.overlaps(Network.from_torch(module), Network([B, o.A[None]], activation="erf"))
    np.testing.assert_allclose(ds.Q.values[0, 0], after.Q, rtol=0, atol=1e-13)
    np.testing.assert_allclose(ds.v.values[0, 0], after.v, rtol=0, atol=1e-13)


def test_committees_of_means():
    """Time γα/p and prefactors of dQ/dt: γ/p for the square, the noise a variance (Veiga et al. 2022)."""
    known = flow.convention("committee_learning", learning_rate=1.4, nodes=4, teacher_nodes=2, noise=0.09)
    assert known.noise == pytest.approx(0.3)
    assert known.v.tolist() == [0.25] * 4
    assert known.A.tolist() == [0.5] * 2
    assert known.time(10.0) == pytest.approx(3.5)
    np.testing.assert_allclose(known.alpha(known.time(np.arange(4.0))), np.arange(4.0))
    # η² v² dα = (γ/p) dt
    assert known.learning_rate**2 * known.v[0] ** 2 == pytest.approx(1.4 / 4 * known.time_per_alpha)


def test_what_diverges_before_the_first_time_says_so():
    ds = flow.order_parameters(
        [[1.0]], [[0.1]], [[1.0]], learning_rate=50.0, alpha=[900.0, 1000.0], activation="identity"
    )
    assert ds.stop_reason.item() == "diverged"
    assert ds.eg.isnull().all()
    both = flow.order_parameters(
        np.array([[[1.0]], [[1.0]]]), [[0.1]], [[1.0]], learning_rate=50.0, alpha=[0.0, 900.0], activation="identity"
    )
    assert both.stop_reason.values.tolist() == ["diverged"] * 2
    assert both.eg.isel(alpha=0).notnull().all()


def test_a_second_layer_that_is_drawn_is_not_taken_for_ones():
    known = flow.convention("tsdyn", learning_rate=0.1, nodes=2, teacher_nodes=1, inputs=10, std=2.0, both=True)
    assert (known.learning_rate, known.second_learning_rate) == (4.0, 1.0)
    with pytest.raises(ValueError, match="convention: the second layer is the networks' own here"):
        _ = known.v
    given = flow.convention("tsdyn", learning_rate=0.1, nodes=2, teacher_nodes=1, inputs=10, v=[0.5, -0.5], A=[2.0])
    assert (given.v.tolist(), given.A.tolist()) == ([0.5, -0.5], [2.0])
    with pytest.raises(ValueError, match=r"convention: v has shape \(1,\), A \(1,\); \(2,\) and \(1,\)"):
        flow.convention("goldt", learning_rate=0.1, nodes=2, teacher_nodes=1, v=[0.5], A=[2.0])


def test_what_a_convention_scales():
    def weights(name):
        known = flow.convention(name, learning_rate=0.5, nodes=4, teacher_nodes=9)
        return known.v[0], known.A[0], known.time_per_alpha

    assert weights("goldt") == weights("saad-solla") == (1, 1, 1)
    assert weights("goldt-normalise") == (1 / 4, 1 / 9, 1)
    assert weights("goldt-meanfield") == weights("statphys-ml") == (1 / 2, 1 / 3, 1)
    assert weights("gradient_flow") == weights("MLPGradientFlow.jl") == (1, 1, 0.25)


def test_bad_input_is_named():
    Q, R, T, v, A = random_overlaps(2, 3)
    more = {"learning_rate": 0.5, "alpha": [1.0]}
    for change, message in [
        ({"Q": np.eye(3)}, r"Q has shape \(3, 3\); R says 2 student and 3 teacher nodes, so it ends in \(2, 2\)"),
        ({"T": np.eye(2)}, r"T has shape \(2, 2\); R says"),
        ({"v": np.ones(3)}, r"v has shape \(3,\)"),
        ({"R": np.ones(3)}, r"R has shape \(3,\); it is \(node, teacher_node\)"),
        ({"R": R * 10}, r"has eigenvalue -.*; overlaps of weights have no negative one"),
        ({"Q": Q + np.array([[0, 1e-3], [0, 0]])}, "Q is not symmetric"),
        ({"Q": Q * np.nan}, "not finite"),
        ({"alpha": [1.0, 0.5]}, "increasing times"),
        ({"alpha": []}, "increasing times"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0; it is finite and not negative"),
        ({"batch": 0}, "batch=0; a step sees one sample at least"),
        ({"activation": "swish"}, "'swish' is no activation"),
    ]:
        for caller, extra in ((flow.order_parameters, {}), (flow.online, {"inputs": 20})):
            with pytest.raises(ValueError, match=message):
                caller(**({"Q": Q, "R": R, "T": T, "v": v, "A": A} | more | extra | change))
    with pytest.raises(ValueError, match=r"order_parameters: the fluctuation .* of tanh has no form here"):
        flow.order_parameters(Q, R, T, **more, activation="tanh")
    with pytest.raises(ValueError, match=r"inputs=4; 2 student and 3 teacher nodes .* need 5 dimensions"):
        flow.online(Q, R, T, inputs=4, **more)
    with pytest.raises(ValueError, match="closer than a step"):
        flow.online(Q, R, T, inputs=5, learning_rate=0.1, alpha=[1.0, 1.01])
    with pytest.raises(ValueError, match="both learning rates are 0"):
        flow.online(Q, R, T, inputs=5, learning_rate=0.0, alpha=[1.0])
    with pytest.raises(ValueError, match="different labels"):
        flow.online(Q, R, T, inputs=5, seeds=[1, 1], **more)
    with pytest.raises(ValueError, match="leading dimensions"):
        flow.order_parameters(np.stack([Q] * 3), R, T, seeds=[0, 1], **more)
    with pytest.raises(ValueError, match=r"no convention 'saadsolla' \(did you mean 'saad-solla'\?\)"):
        flow.convention("saadsolla", learning_rate=1.0, nodes=1, teacher_nodes=1)
    with pytest.raises(ValueError, match="give inputs=N"):
        flow.convention("torch", learning_rate=1.0, nodes=1, teacher_nodes=1)
    with pytest.raises(ValueError, match="the first is positive"):
        flow.convention("goldt", learning_rate=0.0, nodes=1, teacher_nodes=1)
    with pytest.raises(ValueError, match="has no noise"):
        flow.convention("gradient_flow", learning_rate=1.0, nodes=1, teacher_nodes=1, noise=0.1)
    with pytest.raises(ValueError, match="the student has biases"):
        flow.overlaps(Network([Q, v[None]], [np.ones(2), None]), Network([T[:, :2], A[None]]))
    with pytest.raises(ValueError, match="of two layers and one output"):
        flow.overlaps(Network([Q, Q]), Network([T[:, :2], A[None]]))
    with pytest.raises(ValueError, match="differ in inputs or activation"):
        flow.overlaps(Network([Q, v[None]], activation="erf"), Network([T[:, :2], A[None]]))
