"""Moments of gates and rectifiers against identities, since no quadrature resolves their kinks in four dimensions."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.cases import rng
from tsdyn import flow
from tsdyn.gaussian import interaction, orthants


def covariance(n, seed=0, inputs=6):
    w = rng(seed).standard_normal((n, inputs)) / math.sqrt(inputs)
    return w @ w.T


def flipped(C, signs):
    return C * np.multiply.outer(signs, signs)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_equally_correlated_fields_are_all_positive_once_in_n_plus_one(n):
    """With ρ = ½ fields are differences to one more variable of the same law, all positive if that is the least."""
    C = 0.5 * (np.ones((n, n)) + np.eye(n))
    assert orthants.probability(3.0 * C) == pytest.approx(1 / (n + 1), rel=0, abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_every_sign_of_the_gates_adds_up_to_no_gate(seed):
    """θ(a) + θ(−a) = 1, in each gate; E[c₊d₊] is the interaction function of relu."""
    C = covariance(4, seed)
    signs = [(*s, 1, 1) for s in itertools.product((1, -1), repeat=2)]
    total = sum(orthants.moment(flipped(C, s), 2, 2) for s in signs)
    own = [torch.tensor(C[i, j]) for i, j in ((2, 2), (3, 3), (2, 3))]
    assert total == pytest.approx(float(interaction.interaction_of("relu")(*own)), rel=0, abs=1e-15)
    squares = sum(orthants.square(flipped(C[:3, :3], s[:3])) for s in signs)
    assert squares == pytest.approx(C[2, 2] / 2, rel=0, abs=1e-15)
    assert sum(orthants.probability(flipped(C, s)) for s in itertools.product((1, -1), repeat=4)) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_prices_theorem_turns_rectifiers_into_gates(seed):
    """∂E[θθ c₊d₊]/∂C_cd = P[all positive]: central differences of step h err by h² and by rounding over h."""
    C, h = covariance(4, seed), 1e-4
    ends = []
    for step in (h, -h):
        moved = C.copy()
        moved[2, 3] += step
        moved[3, 2] += step
        ends.append(orthants.moment(moved, 2, 2))
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(orthants.probability(C), rel=0, abs=1e-7)


def test_a_gate_of_a_rectified_field_is_one():
    """Fields a and c the same: four fields of rank three, where rounding leaves half the digits of small terms."""
    three = covariance(3)
    same = np.ix_([1, 0, 1, 2], [1, 0, 1, 2])
    assert orthants.moment(three[same], 2, 2) == pytest.approx(orthants.moment(three, 1, 2), rel=0, abs=1e-9)


def test_the_fluctuation_is_the_samples():
    """E[θ_i θ_k Δ²] of 200,000 samples, within five of their standard errors."""
    C, m, nodes = covariance(5, 4), rng(5).standard_normal(5), 3
    x = rng(6).standard_normal((200_000, 5)) @ np.linalg.cholesky(C).T
    gate, squared = x[:, :nodes] > 0, (np.maximum(x, 0) @ m) ** 2
    found = orthants.gated_square(C, m, nodes)
    for i, k in itertools.product(range(nodes), repeat=2):
        sample = gate[:, i] * gate[:, k] * squared
        assert abs(sample.mean() - found[i, k]) <= 5 * sample.std() / math.sqrt(len(x))


def test_relus_simulation_scatters_about_the_equation():
    """Mean of eg over seeds: five of its own standard errors, and a bias of order 1/N."""
    begin = np.array([[1.0, 0.1], [0.1, 0.8]]), np.array([[0.2], [-0.1]]), np.eye(1)
    rule = {"learning_rate": 0.3, "noise": 0.1, "activation": "relu", "alpha": [0.0, 1.0, 4.0]}
    sim, ode = flow.online(*begin, inputs=200, seeds=20, **rule), flow.order_parameters(*begin, rtol=1e-6, **rule)
    scatter = sim.eg.std("seed", ddof=1) / math.sqrt(20)
    assert (abs(sim.eg.mean("seed") - ode.eg) <= 5 * scatter + ode.eg * 5 / 200 + 1e-12).all()
