"""Sums of the theory's matrices with inactive nodes left out, against the matrices of single samples."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.networks.test_networks import random_network
from tsdyn.engine import compiled_moments, native
from tsdyn.networks.network import Network
from tsdyn.theory import coupling_moments, couplings

pytestmark = pytest.mark.skipif(
    native.load(compiled_moments.SOURCE, compiled_moments.Job) is None, reason="no compiler here"
)


def network(widths, seed, dtype=torch.float64, *, dead=(), bias=True, name="relu", gate_at_zero="torch"):
    """A random network; `dead` nodes of layer 1 never fire."""
    drawn = random_network(widths, name, seed=seed, bias=bias).to(dtype)
    for node in dead:
        drawn.weights[0][node % widths[1]] = 0
    return Network(drawn.weights, drawn.biases, name, gate_at_zero=gate_at_zero)


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=2, max_size=4),
    ends=st.tuples(st.integers(1, 6), st.integers(1, 30)),
    samples=st.integers(1, compiled_moments.BLOCK + 3),
    dead=st.lists(st.integers(0, 39), max_size=3),
    bias=st.booleans(),
    gate_at_zero=st.sampled_from(["torch", "paper"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_sums_are_those_of_single_samples(hidden, ends, samples, dead, bias, gate_at_zero, dtype, seed):
    """Autograd's Jacobian of every sample, gated: no assumption is shared but the definition of G = V D.

    An element is a sum of samples·outputs products, each of a path sum over the layers above: relative to the same sum
    of absolute values, bounded by Cauchy-Schwarz, its error is eps times the number of terms of all these sums.
    """
    widths = [(ends[0], *(w[i] for w in hidden), ends[1]) for i in (0, 1)]
    nets = [network(w, seed + i, dtype, dead=dead, bias=bias, gate_at_zero=gate_at_zero) for i, w in enumerate(widths)]
    x = torch.randn(samples, ends[0], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    gates = [net.trace(x).gates[:-1] for net in nets]
    found = compiled_moments.sums(nets[0], gates[0], nets[1], gates[1], 1)
    terms = samples * ends[1] + sum(map(sum, widths))
    for layer in range(1, len(hidden)):
        g, g_star = (
            (couplings.output_jacobian(net, x, layer) * own[layer - 1][:, None]).flatten(0, 1)
            for net, own in zip(nets, gates, strict=True)
        )
        # paths that cancel: the sum of their sizes is that of the network of absolute weights
        size = [_sizes(net, own, layer) for net, own in zip(nets, gates, strict=True)]
        for got, other, bound in (found[0], g_star, size[0].T @ size[1]), (found[1], g, size[0].T @ size[0]):
            expected = g.T @ other
            assert got[layer - 1].shape == expected.shape
            assert bool(((got[layer - 1] - expected).abs() <= 2 * torch.finfo(dtype).eps * terms * bound).all())


def _sizes(net, gates, layer):
    """G of the network with the absolute values of the weights, (sample·output, node)."""
    v = net.weights[-1].abs().expand(len(gates[0]), -1, -1)
    for above in range(net.depth - 2, layer - 1, -1):
        v = (v * gates[above][:, None]) @ net.weights[above].abs()
    return (v * gates[layer - 1][:, None]).flatten(0, 1)


@pytest.mark.parametrize("form", ["product", "joint"])
@pytest.mark.parametrize("memory", [1 << 12, 8 << 20])
def test_expectations_do_not_depend_on_who_sums(form, memory):
    """A and B of a batch of 300: a thousand terms of size one at most, in two orders."""
    student, teacher = network((6, 20, 30, 17, 9), 1), network((6, 11, 12, 13, 9), 2)
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert compiled_moments.serves(student, teacher)
    compiled = coupling_moments.expectations(student, teacher, x, form=form, memory=memory)
    with mock.patch.object(native, "load", return_value=None):
        assert not compiled_moments.serves(student, teacher)
        plain = coupling_moments.expectations(student, teacher, x, form=form)
    for name, expected in vars(plain).items():
        for got, one in zip(getattr(compiled, name), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=1e3 * 2.3e-16 * float(one.abs().max()))


def test_bits_do_not_depend_on_threads():
    student, teacher = network((6, 20, 30, 9), 1), network((6, 11, 12, 9), 2)
    x = torch.randn(5 * compiled_moments.BLOCK + 1, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gates = [net.trace(x).gates[:-1] for net in (student, teacher)]
            found.append(compiled_moments.sums(student, gates[0], teacher, gates[1], 1))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_is_not_left_out(value):
    """NaN times a gate of zero is NaN: a network that has diverged has no finite moments."""
    student, teacher = network((4, 6, 5, 3), 1), network((4, 3, 3, 3), 2)
    assert compiled_moments.serves(student, teacher)
    student.weights[1][2, 4] = value
    assert not compiled_moments.serves(student, teacher)
    x = torch.randn(70, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert bool(coupling_moments.expectations(student, teacher, x, form="joint").H[0][4].isnan().any())


@pytest.mark.parametrize("name", ["leaky_relu", "identity", "tanh"])
def test_gates_that_are_never_zero_are_left_to_torch(name):
    assert not compiled_moments.serves(network((4, 6, 5, 3), 1, name=name), network((4, 3, 3, 3), 2, name=name))
