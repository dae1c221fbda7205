import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tests.oracles as oracles
from tests.typechecks import unchecked
from tsdyn import Network, theory
from tsdyn.networks import activations


def random_network(widths, name="relu", bias=True, seed=0, **options):
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    weights = [normal(n, below) for below, n in itertools.pairwise(widths)]
    return Network(weights, [normal(n) for n in widths[1:]] if bias else None, name, **options)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 12), min_size=2, max_size=7),
    name=st.sampled_from(activations.NAMES),
    bias=st.booleans(),
)
def test_forward_is_torch_modules_and_round_trips(widths, name, bias):
    network = random_network(widths, name, bias)
    x = torch.randn(5, widths[0], dtype=torch.float64)
    expected = oracles.forward(network, x).detach()
    # The same sums in another order: off by at most (terms) ulp of the sum of absolute values, layer upon layer;
    # every σ here grows by at most 1.13 |z| (gelu).
    bound = x.abs()
    for weight, offset in zip(network.weights, network.biases, strict=True):
        bound = 1.13 * (bound @ weight.abs().T + (0 if offset is None else offset.abs())) + 1
    terms = sum(widths) + 4 * len(widths)
    assert bool(((network(x) - expected).abs() <= terms * torch.finfo(torch.float64).eps * bound).all())
    torch.testing.assert_close(network.trace(x).output, network(x), rtol=0, atol=0)
    again = Network.from_torch(network.to_torch())
    torch.testing.assert_close(again(x).detach(), network(x), rtol=0, atol=0)
    assert again.widths == tuple(widths)


@pytest.mark.parametrize("name", activations.NAMES)
def test_gate_is_autograds_derivative_also_at_zero(name):
    sigma = activations.activation(name, leak=0.3)
    z = torch.cat([torch.linspace(-60, 60, 4001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    z.requires_grad_(True)
    (derivative,) = torch.autograd.grad(sigma(z).sum(), z)
    # one ulp of the function values that cancel in the derivative
    torch.testing.assert_close(sigma.gate(z.detach()), derivative, rtol=1e-14, atol=1e-15)


def test_gate_at_zero_follows_the_paper_on_request():
    zero = torch.zeros(1, dtype=torch.float64)
    assert activations.activation("relu").gate(zero) == 0
    assert activations.activation("leaky_relu", leak=0.2).gate(zero) == 0.2
    assert activations.activation("relu").gate(zero, at_zero="paper") == 1
    network = Network([[[1.0]], [[1.0]]], activation="relu", gate_at_zero="paper")
    assert network.trace(torch.zeros(1, 1)).gates[0] == 1


def test_piecewise_linear_means_value_is_gate_times_input():
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)
    for name in activations.NAMES:
        sigma = activations.activation(name, leak=0.1)
        equal = torch.equal(sigma(z), sigma.gate(z) * z)
        assert equal == sigma.piecewise_linear, name


def test_gradients_flow_through_the_tensors_given():
    weight = torch.ones(2, 3, requires_grad=True)
    network = Network([weight, torch.ones(1, 2)])
    network(torch.ones(4, 3)).sum().backward()
    assert network.weights[0] is weight
    assert torch.equal(weight.grad, torch.full((2, 3), 4.0))


def test_numpy_is_accepted():
    network = Network([np.eye(3), np.ones((1, 3))], [np.zeros(3), None], activation="tanh")
    assert network.widths == (3, 3, 1)
    assert "no bias" not in repr(network)
    x = np.random.default_rng(0).standard_normal((4, 3))
    assert torch.equal(network(x), network(torch.from_numpy(x)))
    assert torch.equal(network(x), network.trace(x).output)
    with pytest.raises(ValueError, match=r"Network: x is an array of torch\.float32, the weights are torch\.float64"):
        network(x.astype(np.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Network([]), "0 weights"),
        (
            lambda: Network([torch.ones(2, 3), torch.ones(4, 5)]),
            "layer 2 takes 5 inputs, layer 1 has 2 nodes",
        ),
        (lambda: Network([torch.ones(2, 3)], [torch.ones(3)]), r"bias of layer 1 has shape \(3,\)"),
        (lambda: Network([torch.ones(2)]), "must be floating point"),
        (lambda: Network([torch.ones(2, 3, dtype=torch.int64)]), "must be floating point"),
        (lambda: Network([torch.ones(2, 3), torch.ones(1, 2).double()]), "one dtype and device"),
        (
            lambda: Network([torch.ones(2, 3)], activation="swish"),
            "'swish' is no activation; there are relu",
        ),
        (lambda: Network([torch.ones(2, 3)], activation="leaky_relu", leak=-1.0), "leak=-1.0 is negative"),
        (lambda: Network([torch.ones(2, 3)])(torch.ones(1, 4)), "inputs have 4 features, layer 1 takes 3"),
        (
            lambda: Network.from_torch(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
            "must end with a Linear",
        ),
        (lambda: Network.from_torch(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "must end with a Linear"),
        (
            lambda: Network.from_torch(
                nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
            ),
            "activations differ",
        ),
        (
            lambda: Network.from_torch(nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh"), nn.Linear(2, 2))),
            "approximate",
        ),
        (
            lambda: unchecked(Network.__init__)(Network.__new__(Network), [torch.ones(2, 3)], gate_at_zero="tian"),
            r"Network: gate_at_zero='tian'; it is 'torch' \(autograd's gate at 0\) or 'paper' \(1\)",
        ),
        (
            lambda: unchecked(Network.__init__)(
                Network.__new__(Network), [torch.ones(2, 3), torch.ones(1, 2)], norm="below"
            ),
            "Network: norm='below'; BatchNorm is 'before' or 'after' the activation",
        ),
        (
            lambda: unchecked(activations.Activation.gate)(
                activations.activation("relu"), torch.zeros(1), at_zero="tian"
            ),
            r"Activation.gate: at_zero='tian'; it is 'torch' .* or 'paper'",
        ),
    ],
)
def test_bad_networks_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_linear_layers_without_activation_between_are_an_identity_network():
    network = Network.from_torch(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)))
    assert network.activation.name == "identity"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_in_eval_mode_is_folded(affine, bias):
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(n, affine=affine) for n in (6, 5)]
    module = nn.Sequential(
        nn.Linear(4, 6, bias=bias), norms[0], nn.ReLU(), nn.Linear(6, 5, bias=bias), nn.ReLU(), norms[1],
        nn.Linear(5, 3, bias=bias),
    ).double()  # fmt: skip
    x = torch.randn(50, 4, dtype=torch.float64)
    if affine:
        for norm in norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    module(x)  # moves the running statistics off 0 and 1
    kept = Network.from_torch(module.eval())
    assert kept.frame.places == ("before", "after")
    assert kept.norms[0].mean is norms[0].running_mean
    network = kept.folded()
    assert network.plain
    assert network.widths == kept.widths == (4, 6, 5, 3)
    torch.testing.assert_close(kept(x), module(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(network(x), module(x), rtol=1e-13, atol=1e-13)
    teacher = random_network((4, 3, 4, 3))
    assert theory.lemma1_residual(network, teacher, x) < 1e-12
    with pytest.raises(ValueError, match="must end with a Linear layer"):
        Network.from_torch(nn.Sequential(*module[:-1]))


def test_a_small_convolution_is_a_matrix_and_obeys_lemma_1():
    """THEORY section 3, last row: 3x3, 5 channels against 3, leaky, 8x8; A_1 is (n H W) x (m H W + 1)."""
    torch.manual_seed(0)

    def net(channels):
        return nn.Sequential(
            nn.Conv2d(2, channels, 3), nn.BatchNorm2d(channels), nn.LeakyReLU(0.1),
            nn.Conv2d(channels, 4, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(4 * 3 * 3, 6),
        ).double()  # fmt: skip

    images = torch.randn(12, 2, 8, 8, dtype=torch.float64)
    student, teacher = net(5), net(3)
    for module in (student, teacher):
        module(images)  # statistics for the BatchNorm
        module.eval()
    flat = images.flatten(1)
    networks = [Network.from_torch(module, image=(2, 8, 8)).folded() for module in (student, teacher)]
    for module, network in zip((student, teacher), networks, strict=True):
        torch.testing.assert_close(network(flat), module(images), rtol=1e-12, atol=1e-12)
    assert 0 < theory.lemma1_residual(*networks, flat) < 1e-12
    assert theory.coupling(*networks, flat[:2], layer=1).A.shape == (2, 5 * 6 * 6, 3 * 6 * 6 + 1)
    # g_1 against autograd through the module itself
    z = student[1](student[0](images)).detach().requires_grad_(True)
    half_square = 0.5 * (teacher(images) - student[2:](z)).square().sum()
    (expected,) = torch.autograd.grad(half_square, z)
    found = theory.backpropagated_gradient(*networks, flat, layer=1)
    torch.testing.assert_close(found, -expected.flatten(1), rtol=1e-12, atol=1e-12)
    # gradients reach the module's own parameters
    networks[0](flat).sum().backward()
    assert float(student[0].weight.grad.abs().max()) > 0


def test_a_convolution_needs_the_shape_of_its_images():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 1))
    for shape in (None, (1, 8, 8)):
        with pytest.raises(ValueError, match="give image="):
            Network.from_torch(module, image=shape)
    large = Network([torch.ones(3, 2, 3, 3), torch.ones(1, 3 * 63 * 63)], image=(2, 4000, 4000), stride=64)
    with pytest.raises(MemoryError, match="smaller images"):
        large.folded()
