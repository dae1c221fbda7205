"""A member of a batch has the bits that it has alone, wherever it stands."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdyn.networks import members_alone
from tsdyn.networks.network import Network
from tsdyn.population.two_layer_loss import PopulationLoss, starts

MEMBERS = 9
#: Members by their places: alone at several ones, in pairs, reversed.
CHOICES = [[0], [1], [8], [3, 1], [0, 7], [6, 5, 4, 3, 2], list(range(MEMBERS))[::-1]]


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def assert_alone(function, *tensors):
    """`function` of batches gives members that do not know of one another."""
    whole = function(*tensors)
    for chosen in CHOICES:
        torch.testing.assert_close(function(*(t[chosen].clone() for t in tensors)), whole[chosen], rtol=0, atol=0)
    return whole


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(1, 33), st.integers(1, 31), st.booleans(), st.booleans())
def test_a_product_of_matrices_is_that_of_each_alone(rows, inner, columns, turned, grouped):
    a, b = drawn(MEMBERS, 2, rows, inner), drawn(MEMBERS, 2, inner, columns, seed=1)
    if turned:
        b = b.mT.contiguous().mT
    if not grouped:
        a, b = a[:, 0].contiguous(), b[:, 0]
    found = assert_alone(members_alone.product, a, b)
    torch.testing.assert_close(found, a @ b, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_a_function_of_numbers_is_that_of_each_alone(shape):
    y, x = drawn(MEMBERS, *shape), drawn(MEMBERS, *shape, seed=1).abs()
    found = assert_alone(lambda *of: members_alone.elementwise(torch.atan2, *of), y, x)
    torch.testing.assert_close(found, torch.atan2(y, x), rtol=1e-14, atol=0)


def test_a_function_of_many_numbers_is_not_cut_for_the_threads():
    """torch cuts an array of more than 32,768 numbers for its threads, and the ends go to other code."""
    y, x = drawn(MEMBERS, 4999), drawn(MEMBERS, 4999, seed=1)
    assert_alone(lambda *of: members_alone.elementwise(torch.atan2, *of), y, x)
    assert members_alone.elementwise(torch.atan2, y[0, 0], x[:0]).shape == (0, 4999)


@given(st.integers(1, 5), st.integers(1, 11))
def test_terms_are_added_in_order_everywhere(terms, size):
    weights = np.random.default_rng(5).standard_normal(6).tolist()
    found = assert_alone(
        lambda *of: members_alone.combined(weights, of), *(drawn(MEMBERS, size, seed=i) for i in range(terms))
    )
    expected = sum(w * drawn(MEMBERS, size, seed=i) for i, w in zip(range(terms), weights, strict=False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "shape"),
    [(a, s) for a in ("erf", "relu", "leaky_relu", "identity", "gelu") for s in [(1, 3, 2), (2, 5, 3), (10, 15, 15)]]
    + [(a, (1, 3, 2)) for a in ("sigmoid", "tanh", "softplus", "silu")],  # of 36² terms for each pair of nodes
)
def test_a_population_loss_is_that_of_each_student_alone(activation, shape):
    nodes, inputs, k = shape
    teacher = Network([torch.eye(k, inputs).double(), torch.ones(1, k).double()], activation=activation)
    loss = PopulationLoss(teacher, nodes)
    for function in (loss.value, loss.gradient, loss.hessian):
        with torch.no_grad():
            assert_alone(function, starts(loss, range(MEMBERS)))
