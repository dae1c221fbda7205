"""Derivatives of any module against autograd, one sample at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.theory.test_theory import scaled_network
from tsdyn import derivatives, memory, theory
from tsdyn.derivatives import curvature

EPS = 1e-12


class Tied(nn.Module):
    """A layer used twice, a parameter shared by two layers, a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        return self.scale * self.last(x)


def modules():
    torch.manual_seed(0)
    kinds = {
        "mlp": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
        "linear": (nn.Linear(4, 3), (4,)),
        "inplace": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (4,)),
        "sequence": (nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2), nn.Flatten()), (5, 4)),
        "convolution": (
            nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1, stride=2),
                nn.LeakyReLU(0.1),
                nn.Conv2d(4, 6, 2, groups=2, dilation=2, bias=False),
                nn.Flatten(),
                nn.Linear(24, 3),
            ),
            (3, 8, 8),
        ),
        "normalized": (
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.BatchNorm1d(6).eval(), nn.ReLU(), nn.Linear(6, 3)),
            (4,),
        ),
        "tied": (Tied(), (4,)),
    }
    return {name: (module.double(), shape) for name, (module, shape) in kinds.items()}


MODULES = modules()


def problem(name, samples=7):
    module, shape = MODULES[name]
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(samples, *shape, generator=draw, dtype=torch.float64)
    with torch.no_grad():
        y = torch.randn(module(x).shape, generator=draw, dtype=torch.float64)
    return module, x, y


def half_square(output, target):
    return 0.5 * (output - target).square().sum()


def one_by_one(module, loss, x, y):
    """Reference: backward through one sample after the other."""
    rows = []
    for i in range(len(x)):
        module.zero_grad()
        loss(module(x[i : i + 1]), y[i : i + 1]).backward()
        rows.append({n: p.grad.clone() for n, p in module.named_parameters()})
    return {n: torch.stack([row[n] for row in rows]) for n in rows[0]}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=EPS * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("loss", [half_square, F.mse_loss, F.smooth_l1_loss])
@pytest.mark.parametrize("memory", [1, derivatives.MEMORY])
def test_gradients_and_norms_are_those_of_one_sample_at_a_time(name, loss, memory):
    module, x, y = problem(name)
    expected = one_by_one(module, loss, x, y)
    found = derivatives.per_sample_gradients(module, loss, x, y, memory=memory)
    assert set(found) == set(expected)
    for parameter, value in expected.items():
        assert found[parameter].shape == (7, *dict(module.named_parameters())[parameter].shape)
        close(found[parameter], value)
    norms = derivatives.per_sample_gradient_norms(module, loss, x, y, memory=memory)
    close(norms, torch.cat([g.reshape(7, -1) for g in expected.values()], 1).norm(dim=1))
    some = list(expected)[1:2] or list(expected)
    part = derivatives.per_sample_gradients(module, loss, x, y, names=some)
    assert list(part) == some
    close(
        derivatives.per_sample_gradient_norms(module, loss, x, y, names=some),
        expected[some[0]].reshape(7, -1).norm(dim=1),
    )


def test_cross_entropy_has_classes_as_targets():
    module, x, _ = problem("mlp")
    y = torch.arange(7) % 3
    expected = one_by_one(module, F.cross_entropy, x, y)
    for name, value in derivatives.per_sample_gradients(module, F.cross_entropy, x, y).items():
        close(value, expected[name])


def test_frozen_parameters_are_left_out():
    module, x, y = problem("mlp")
    module[0].requires_grad_(False)
    try:
        found = derivatives.per_sample_gradients(module, half_square, x, y)
        assert all(not name.startswith("0.") for name in found)
        jacobian = derivatives.jacobian(module, x)
        assert set(jacobian) == set(found)
        rows = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
        kernel = torch.einsum("sop,tqp->stoq", rows, rows)
        torch.testing.assert_close(derivatives.neural_tangent_kernel(module, x), kernel)
        assert "0.weight" in derivatives.per_sample_gradients(module, half_square, x, y, names=["0.weight"])
    finally:
        module[0].requires_grad_(True)


def test_factors_are_activation_and_negative_backpropagated_gradient():
    """Eq. 1 for a Network: f_{l−1} and −g_l."""
    student, teacher = (
        scaled_network((5, 8, 7, 3), "relu", 0.0, True, 1),
        scaled_network((5, 4, 4, 3), "relu", 0.0, True, 2),
    )
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = derivatives.factored_gradients(student, half_square, x, teacher(x))
    below = [x, *student.trace(x).activations]
    assert list(factors) == ["0", "2", "4"]
    for layer, pair in enumerate(factors.values(), start=1):
        close(pair.inputs[:, 0], below[layer - 1])
        close(pair.gradients[:, 0], -theory.backpropagated_gradient(student, teacher, x, layer))


@pytest.mark.parametrize("name", MODULES)
def test_jacobians(name):
    module, x, _ = problem(name, samples=3)
    outputs = module(x)
    found = derivatives.jacobian(module, x, memory=1)
    inputs = derivatives.jacobian(module, x, wrt="inputs")
    for s in range(3):
        for o in range(outputs.shape[1]):
            sample = x[s : s + 1].clone().requires_grad_(True)
            module.zero_grad()
            module(sample)[0, o].backward()
            close(inputs[s, o], sample.grad[0])
            for parameter, p in module.named_parameters():
                close(found[parameter][s, o], p.grad)


def test_jacobian_at_a_layers_activation_is_v():
    net = scaled_network((5, 8, 7, 3), "leaky_relu", 0.1, True, 1)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(derivatives.jacobian(net, x, wrt="1"), theory.output_jacobian(net, x, 1))
    close(derivatives.jacobian(net, x, wrt="3"), theory.output_jacobian(net, x, 2))
    gate = net.trace(x).gates[0]
    close(derivatives.jacobian(net, x, wrt="0"), theory.output_jacobian(net, x, 1) * gate[:, None])


@pytest.mark.parametrize("memory", [1, 6000, derivatives.MEMORY])
def test_neural_tangent_kernel_is_j_jt(memory):
    module, x, _ = problem("mlp")
    rows = torch.cat([j.flatten(2) for j in derivatives.jacobian(module, x).values()], 2)
    expected = torch.einsum("sop,tqp->stoq", rows, rows)
    close(derivatives.neural_tangent_kernel(module, x, memory=memory), expected)
    close(derivatives.neural_tangent_kernel(module, x[:2], x, memory=memory), expected[:2])


def network_loss(net, teacher, x):
    y = teacher(x)

    def loss(parameters):
        weights, biases = parameters[: net.depth], parameters[net.depth :]
        return 0.5 * (type(net)(weights, biases, net.activation.name)(x) - y).square().sum(1).mean()

    return loss, [*net.weights, *net.biases]


def test_hessian_products_and_spectrum():
    student, teacher = scaled_network((4, 6, 3), "erf", 0.0, True, 1), scaled_network((4, 3, 3), "erf", 0.0, True, 2)
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, params = network_loss(student, teacher, x)
    dense = derivatives.hessian(loss, params)
    close(dense, dense.T)
    # central differences of the gradient are off by O(h²)
    flat = torch.cat([p.flatten() for p in params])
    v = torch.randn(len(flat), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    close(derivatives.hessian_vector_product(loss, params, v), dense @ v)

    def gradient(at):
        pieces = [piece.view(p.shape) for piece, p in zip(at.split([p.numel() for p in params]), params, strict=True)]
        free = [piece.clone().requires_grad_(True) for piece in pieces]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(free), free)])

    errors = [
        ((gradient(flat + h * v) - gradient(flat - h * v)) / (2 * h) - dense @ v).norm().item() for h in (1e-2, 5e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    values = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(derivatives.hessian_spectrum(loss, params, None), values)
    torch.testing.assert_close(derivatives.hessian_spectrum(loss, params, 4), values[:4])
    by_name = {str(i): p for i, p in enumerate(params)}
    close(derivatives.hessian(lambda named: loss(list(named.values())), by_name), dense)


def test_lanczos_agrees_with_the_dense_spectrum(monkeypatch):
    student, teacher = scaled_network((4, 6, 3), "erf", 0.0, True, 1), scaled_network((4, 3, 3), "erf", 0.0, True, 2)
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, params = network_loss(student, teacher, x)
    dense = derivatives.hessian_spectrum(loss, params, 5)
    monkeypatch.setattr(curvature, "DENSE_PARAMETERS", 10)
    torch.testing.assert_close(derivatives.hessian_spectrum(loss, params, 5), dense, rtol=1e-10, atol=1e-12)


def test_spectral_density_integrates_polynomials_exactly():
    """k Lanczos steps from v give Σ w θ^p = vᵀ H^p v for p < 2k; with all steps the nodes are the eigenvalues."""
    student, teacher = scaled_network((4, 6, 3), "erf", 0.0, True, 1), scaled_network((4, 3, 3), "erf", 0.0, True, 2)
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, params = network_loss(student, teacher, x)
    dense = derivatives.hessian(loss, params)
    size, steps = len(dense), 4
    found = derivatives.hessian_density(loss, params, probes=3, steps=steps, seed=5)
    draw = torch.Generator().manual_seed(5)
    for probe in range(3):
        v = torch.randn(size, generator=draw, dtype=torch.float64)
        power = v = v / v.norm()
        for p in range(2 * steps):
            expected = float(v @ power)
            scale = float(torch.linalg.matrix_norm(dense, 2)) ** p
            assert abs((found.weights[probe] * found.nodes[probe] ** p).sum() - expected) <= 1e-13 * scale
            power = dense @ power
    whole = derivatives.hessian_density(loss, params, probes=1, steps=size)
    values = torch.linalg.eigvalsh(dense)
    np.testing.assert_allclose(whole.nodes[0], values, atol=1e-10 * float(values.abs().max()))


def test_spectral_density_estimates_the_trace_within_its_own_error():
    student, teacher = scaled_network((4, 6, 3), "erf", 0.0, True, 1), scaled_network((4, 3, 3), "erf", 0.0, True, 2)
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, params = network_loss(student, teacher, x)
    values = torch.linalg.eigvalsh(derivatives.hessian(loss, params)).numpy()
    found = derivatives.hessian_density(loss, params, probes=40, steps=20)
    for function in (lambda v: v, np.square, lambda v: np.exp(-np.abs(v))):
        mean, error = found.mean(function)
        assert abs(mean - function(values).mean()) <= 5 * error
    grid, width = np.linspace(values[0] - 3, values[-1] + 3, 4001), 0.1
    np.testing.assert_allclose(np.trapezoid(found(grid, width), grid), 1, rtol=1e-6)
    assert found.weights.min() >= 0


def test_spectral_density_of_a_hessian_of_low_rank_stops_early():
    """Rank 1: the Krylov space has two dimensions; the rest of the nodes weigh nothing."""
    direction = torch.arange(1.0, 11.0, dtype=torch.float64)
    found = derivatives.hessian_density(lambda p: 0.5 * (p @ direction) ** 2, torch.zeros(10, dtype=torch.float64))
    assert np.count_nonzero(found.weights.sum(0)) == 2
    np.testing.assert_allclose(found.nodes.max(1), float(direction @ direction), rtol=1e-12)


def test_gauss_newton_is_the_hessian_at_zero_residual():
    student = scaled_network((4, 5, 3), "tanh", 0.0, True, 1)
    x = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = student.to_torch()
    found = derivatives.gauss_newton(module, half_square, x, student(x), memory=1)
    names = [n for n, _ in module.named_parameters()]

    def loss(params):
        output = torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))
        return 0.5 * (output - student(x)).square().sum(1).mean()

    close(found, derivatives.hessian(loss, [p.detach() for p in module.parameters()]))
    assert torch.linalg.eigvalsh(found)[0] > -1e-12


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn(3, dtype=x.dtype)


class Overwrites(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        y = x * 1
        out = self.layer(y)
        y.zero_()
        return out


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "1 is BatchNorm in training mode, .* module.eval()"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), "1 is Dropout in training mode, .* module.eval()"),
        (Noisy(4, 3), "Noisy draws random numbers"),
        (Overwrites(), "Overwrites overwrites the input of a layer in place, .*inplace=False"),
        (nn.Sequential(nn.ReLU()), "Sequential has no parameter that requires a gradient"),
    ],
)
def test_modules_without_per_sample_gradients(module, message):
    module = module.double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    if not isinstance(module, Noisy):
        module.train()
    for call in (derivatives.per_sample_gradients, derivatives.per_sample_gradient_norms):
        with pytest.raises(ValueError, match=message):
            call(module, half_square, x, y)


def test_another_threads_draws_are_not_the_modules():
    """Dask's threads draw from Python's generator while a worker measures."""
    from tsdyn.derivatives.module_state import Randomness

    seen, module = Randomness(nn.Linear(2, 2)), nn.Linear(2, 2)
    torch.rand(1)  # once, by somebody else
    assert seen.moved()
    assert not seen.drawn_by(lambda: module(torch.ones(1, 2)))
    assert seen.drawn_by(lambda: nn.functional.dropout(torch.ones(1, 2)))


def test_random_modules_have_no_jacobian():
    with pytest.raises(ValueError, match="jacobian: Noisy draws random numbers"):
        derivatives.jacobian(Noisy(4, 3).double(), torch.randn(5, 4, dtype=torch.float64))


def test_bad_input_is_named(monkeypatch):
    module, x, y = problem("mlp")
    with pytest.raises(ValueError, match="7 samples and 6 targets"):
        derivatives.per_sample_gradients(module, half_square, x, y[:6])
    with pytest.raises(ValueError, match="0 samples and 0 targets"):
        derivatives.per_sample_gradient_norms(module, half_square, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"no parameters \['weight'\]; there are 0.weight"):
        derivatives.per_sample_gradients(module, half_square, x, y, names=["weight"])
    with pytest.raises(ValueError, match=r"loss of one sample has shape \(1, 3\)"):
        derivatives.per_sample_gradients(module, lambda o, t: (o - t) ** 2, x, y)
    with pytest.raises(ValueError, match="wrt='9'; it is 'parameters', 'inputs' or a submodule: 0, 1, 2"):
        derivatives.jacobian(module, x, wrt="9")
    with pytest.raises(ValueError, match="k=0; ask for at least one"):
        derivatives.hessian_spectrum(lambda p: p.sum(), x, 0)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    monkeypatch.setattr(memory, "ALWAYS", 0)
    with pytest.raises(
        MemoryError, match=r"per_sample_gradients: the result needs 0.0 GB, .* per_sample_gradient_norms"
    ):
        derivatives.per_sample_gradients(module, half_square, x, y)
    with pytest.raises(MemoryError, match="hessian: the result needs"):
        derivatives.hessian(lambda p: (p**3).sum(), torch.ones(30))


def test_what_is_refused_of_a_loss():
    flat = torch.ones(5, dtype=torch.float64)
    own = torch.Generator().manual_seed(0)
    drawn = lambda p: (p * torch.randn(5, dtype=torch.float64)).square().sum()  # noqa: E731
    drawn_by_its_own = lambda p: (p * torch.randn(5, generator=own, dtype=torch.float64)).square().sum()  # noqa: E731
    for call in (
        derivatives.hessian,
        derivatives.hessian_spectrum,
        derivatives.hessian_density,
        lambda *args: derivatives.hessian_vector_product(*args, flat),
    ):
        with pytest.raises(ValueError, match="does not depend on its parameters"):
            call(lambda p: torch.ones((), dtype=torch.float64), flat)
        with pytest.raises(ValueError, match="the loss draws random numbers"):
            call(drawn, flat)
        with pytest.raises(ValueError, match="two values for the same parameters"):
            call(drawn_by_its_own, flat)
        with pytest.raises(ValueError, match=r"complex128; a Hessian is that of real ones"):
            call(lambda p: p.abs().sum(), flat.to(torch.complex128))


def test_a_linear_loss_has_a_hessian_of_zeros(monkeypatch):
    flat = torch.ones(9, dtype=torch.float64)
    assert not derivatives.hessian(torch.sum, flat).any()
    assert not derivatives.hessian_vector_product(torch.sum, flat, flat).any()
    assert not derivatives.hessian_density(torch.sum, flat).nodes.any()
    monkeypatch.setattr(curvature, "DENSE_PARAMETERS", 2)
    assert torch.equal(derivatives.hessian_spectrum(torch.sum, flat, 3), flat.new_zeros(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_derivatives_do_not_depend_on_the_callers_mode(mode):
    module, x, y = problem("mlp")
    calls = (
        lambda x, y: derivatives.per_sample_gradient_norms(module, half_square, x, y),
        lambda x, y: derivatives.jacobian(module, x, wrt="inputs"),
        lambda x, y: derivatives.neural_tangent_kernel(module, x),
        lambda x, y: derivatives.hessian(module, F.mse_loss, x, y),
        lambda x, y: derivatives.gauss_newton(module, half_square, x, y),
    )
    for call in calls:
        expected = call(x, y)
        with mode():
            close(call(x.clone(), y.clone()), expected)


def test_the_log_says_when_the_plain_way_is_taken(caplog):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.transpose(0, 1)).mean(0)

    x, y = torch.randn(5, 5, 4), torch.randn(5, 3)
    derivatives.per_sample_gradient_norms(Tokens(), half_square, x, y)
    assert "the gradient of layer does not factor" in caplog.text
    caplog.clear()
    lstm = nn.LSTM(4, 3, batch_first=True).double()
    derivatives.per_sample_gradients(lstm, lambda o, t: o[0].square().sum(), x.double())
    assert "one backward pass per sample instead" in caplog.text


def test_norms_whose_squares_are_out_of_range():
    """Gradients of 1e25 and 1e-25 in float32, and 1e200 in float64: the norm is representable, its square is not."""
    for scale, dtype in (
        (1e25, torch.float32),
        (1e-25, torch.float32),
        (1e200, torch.float64),
        (1e-200, torch.float64),
    ):
        module = nn.Linear(4, 3).to(dtype)
        x, y = torch.ones(5, 4, dtype=dtype), torch.arange(5, dtype=dtype)
        loss = lambda o, t, s=scale: (o * s).sum() * (1 + t.sum())  # noqa: E731
        found = derivatives.per_sample_gradient_norms(module, loss, x, y)
        expected = (1 + y.double()) * scale * 15**0.5
        torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_norms_of_gradients_whose_positions_cancel():
    """Σ_t g_t = 0 with equal inputs: the Gram form would keep eight of sixteen digits."""
    module = nn.Sequential(nn.Linear(20, 20, bias=False)).double()
    x = 1 + 1e-9 * torch.randn(5, 4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sign = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)[:, None]
    loss = lambda o, t: (o * sign).sum()  # noqa: E731
    expected = torch.cat([g.reshape(5, -1) for g in one_by_one(module, loss, x, x).values()], 1).norm(dim=1)
    torch.testing.assert_close(derivatives.per_sample_gradient_norms(module, loss, x, x), expected, rtol=1e-6, atol=0)


OF_A_LOSS = (
    "per_sample_gradients", "per_sample_gradient_norms", "factored_gradients", "gauss_newton", "hessian",
    "hessian_vector_product", "hessian_spectrum", "hessian_density",
)  # fmt: skip


@pytest.mark.parametrize("name", [*OF_A_LOSS, "jacobian", "neural_tangent_kernel"])
def test_every_function_takes_numpy_and_torch_and_says_when_nothing_depends_on_the_parameters(name):
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    draw = np.random.default_rng(0)
    x, y, v = draw.standard_normal((5, 3)), draw.standard_normal((5, 2)), draw.standard_normal(26)
    function = getattr(derivatives, name)

    def called(module, loss, x, y, v):
        more = {"vector": v} if name == "hessian_vector_product" else {}
        return function(module, x) if name not in OF_A_LOSS else function(module, loss, x, y, **more)

    def flat(found):
        parts = found.values() if isinstance(found, dict) else [found]
        arrays = [a for part in parts for a in ([part] if torch.is_tensor(part) else vars(part).values())]
        return torch.cat([torch.as_tensor(a).flatten().double() for a in arrays if hasattr(a, "shape")])

    by_torch = called(module, half_square, *(torch.from_numpy(a) for a in (x, y, v)))
    assert torch.equal(flat(called(module, half_square, x, y, v)), flat(by_torch))
    with pytest.raises(ValueError, match=f"{name}: a list of numbers; give a numpy array or a torch tensor"):
        called(module, half_square, x.tolist(), y, v)
    if name in OF_A_LOSS:
        for loss in (lambda o, t: t.square().sum(), lambda o, t: (o.detach() - t).square().sum()):
            with pytest.raises(ValueError, match=f"{name}: .*loss.* does not depend on"):
                called(module, loss, x, y, v)
    else:

        class Detached(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, x):
                return self.inner(x).detach()

        with pytest.raises(ValueError, match=f"{name}: .* does not depend on"):
            called(Detached(), half_square, x, y, v)
