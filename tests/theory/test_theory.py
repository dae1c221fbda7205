"""The theory's matrices: against autograd, against one sample at a time, and against the conventions that are wrong."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.oracles as oracles
import tsdyn
from tests.networks.test_networks import random_network
from tests.typechecks import unchecked
from tsdyn import Network, theory
from tsdyn.networks import activations
from tsdyn.theory import couplings as couplings_module

TOLERANCE = 1e-12  # of the largest quantity, THEORY section 4

# THEORY section 3: teacher widths, student widths, activation, leak, bias
ROWS = {
    "two-layer": ((10, 5, 4), (10, 12, 4), "relu", 0.0, True),
    "deep-2x": ((20, 50, 75, 100, 125, 10), (20, 100, 150, 200, 250, 10), "relu", 0.0, True),
    "leaky": ((8, 7, 9, 6, 11, 5), (8, 21, 5, 18, 30, 5), "leaky_relu", 0.1, True),
    "leaky-no-bias": ((8, 7, 9, 6, 11, 5), (8, 21, 5, 18, 30, 5), "leaky_relu", 0.1, False),
    "linear": ((8, 7, 9, 6, 11, 5), (8, 21, 5, 18, 30, 5), "identity", 1.0, True),
    "under-realised": ((8, 20, 30, 5), (8, 3, 4, 5), "relu", 0.0, True),
    "seven-layers-one-output": ((6, 5, 5, 5, 5, 5, 5, 1), (6, 9, 8, 7, 8, 9, 7, 1), "relu", 0.0, True),
}


def scaled_network(widths, name, leak, bias, seed):
    """Weights N(0, 2/fan-in), so that activations keep their size with depth."""
    draw = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(n, below, generator=draw, dtype=torch.float64) * (2 / below) ** 0.5
        for below, n in itertools.pairwise(widths)
    ]
    biases = [0.5 * torch.randn(n, generator=draw, dtype=torch.float64) for n in widths[1:]] if bias else None
    return Network(weights, biases, name, leak=leak)


def pair(row, samples=40):
    teacher_widths, widths, name, leak, bias = ROWS[row]
    x = torch.randn(samples, widths[0], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (
        scaled_network(widths, name, leak, bias, 1),
        scaled_network(teacher_widths, name, leak, bias, 2),
        x,
    )


@pytest.mark.parametrize("row", ROWS)
def test_lemma_1(row):
    student, teacher, x = pair(row)
    assert 0 < theory.lemma1_residual(student, teacher, x) < TOLERANCE
    # what a batch holds does not matter
    split = theory.lemma1_residual(student, teacher, iter(x.split(7)), memory=1 << 16)
    assert split < TOLERANCE
    singles = [
        Network([w.float() for w in n.weights], [None if b is None else b.float() for b in n.biases],
                n.activation.name, leak=n.activation.leak or 0.0)
        for n in (student, teacher)
    ]  # fmt: skip
    assert theory.lemma1_residual(*singles, x.float()) < 1e-5


@pytest.mark.parametrize("row", ROWS)
def test_wrong_conventions_of_the_constant_column_fail(row):
    """No bias column, or this layer's bias only: off by the table's order, 0.01 to 10; right only where it says."""
    student, teacher, x = pair(row)
    own, taught = student.trace(x), teacher.trace(x)
    none, top_only = 0.0, 0.0
    for layer in range(1, student.depth + 1):
        g = theory.backpropagated_gradient(student, teacher, x, layer)
        v, v_star = (theory.output_jacobian(n, x, layer) for n in (student, teacher))
        f, f_star = own.activations[layer - 1], taught.activations[layer - 1]

        def pulled(difference, layer=layer, v=v):
            return own.gates[layer - 1] * torch.einsum("soi,so->si", v, difference)

        difference = torch.einsum("soj,sj->so", v_star, f_star) - torch.einsum("soi,si->so", v, f)
        none = max(none, float((g - pulled(difference)).abs().max()))
        if layer < student.depth:
            # the bias of the layer just above alone, carried up by that layer's V D
            for net, trace, sign in ((teacher, taught, 1), (student, own, -1)):
                bias = net.biases[layer]
                if bias is not None:
                    up = theory.output_jacobian(net, x, layer + 1) * trace.gates[layer].unsqueeze(1)
                    difference = difference + sign * up @ bias
        top_only = max(top_only, float((g - pulled(difference)).abs().max()))
    if ROWS[row][4]:
        assert none > 0.01
        assert (top_only < TOLERANCE * 10) == (student.depth == 2)
    else:
        assert max(none, top_only) < TOLERANCE * 100


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    inputs=st.integers(1, 10),
    leak=st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.0]),
    bias=st.booleans(),
    zeros=st.booleans(),
)
def test_lemma_1_on_any_network(widths, inputs, leak, bias, zeros):
    """Depth 1–6, widths 1–40, leaky slopes, exact zeros (a dead lower layer without biases)."""
    own = (inputs, *(w for w, _ in widths[:-1]), widths[-1][0])
    taught = (inputs, *(t for _, t in widths[:-1]), widths[-1][0])
    student = scaled_network(own, "leaky_relu", leak, bias, 3)
    teacher = scaled_network(taught, "leaky_relu", leak, bias, 4)
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if zeros:
        x[::2] = 0
        student.weights[0][0] = 0
    assert theory.lemma1_residual(student, teacher, x) < TOLERANCE
    for layer in range(1, student.depth + 1):
        g = theory.backpropagated_gradient(student, teacher, x, layer)
        expected = oracles.backpropagated_gradient(student, teacher(x), x, layer)
        torch.testing.assert_close(g, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", activations.NAMES)
def test_output_jacobian_is_autograds_one_sample_at_a_time(name):
    net = scaled_network((6, 5, 7, 4, 3), name, 0.2, True, 7)
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trace = net.trace(x)
    for layer in range(1, net.depth + 1):
        v = theory.output_jacobian(net, x, layer)
        assert v.shape == (6, 3, net.widths[layer])
        expected = torch.stack([oracles.output_jacobian(net, f, layer) for f in trace.activations[layer - 1]])
        torch.testing.assert_close(v, expected, rtol=1e-13, atol=1e-13)
        whole = theory.augmented_output_jacobian(net, x, layer)
        output = torch.einsum("soi,si->so", whole[..., :-1], trace.activations[layer - 1]) + whole[..., -1]
        torch.testing.assert_close(output, trace.output, rtol=1e-12, atol=1e-12)


def test_coupling_is_made_of_the_jacobians():
    student, teacher, x = pair("leaky", samples=5)
    for layer in range(1, 6):
        found = theory.coupling(student, teacher, x, layer)
        n, m = student.widths[layer], teacher.widths[layer]
        assert found.A.shape == (5, n, m + 1)
        assert found.B.shape == (5, n, n + 1)
        v, v_star = (theory.augmented_output_jacobian(net, x, layer) for net in (student, teacher))
        for s in range(5):
            torch.testing.assert_close(found.A[s], v[s, :, :-1].T @ v_star[s], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found.B[s], v[s, :, :-1].T @ v[s], rtol=1e-12, atol=1e-12)
        square = found.B[..., :-1]
        torch.testing.assert_close(square, square.mT)


def test_coupling_depends_on_the_gates_above_only():
    """Piecewise constancy: samples with identical gates above layer l share A_l and B_l."""
    student, teacher, _ = pair("leaky")
    x = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    near = torch.cat([x, x + 1e-7])
    for net in (student, teacher):
        gates = net.trace(near).gates
        assert all(torch.equal(g[0], g[1]) for g in gates)
    for layer in range(1, 6):
        found = theory.coupling(student, teacher, near, layer)
        torch.testing.assert_close(found.A[0], found.A[1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found.B[0], found.B[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "erf", "gelu"])
@pytest.mark.parametrize("widths", [((5, 6, 4), (5, 8, 4)), ((6, 5, 7, 4, 3), (6, 9, 8, 6, 3)), ((4, 3), (4, 3))])
def test_moments_are_means_of_per_sample_matrices(name, widths):
    teacher, student = (scaled_network(w, name, 0.1, True, s) for s, w in enumerate(widths))
    x = torch.randn(33, widths[0][0], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own, taught = student.trace(x), teacher.trace(x)
    for memory in (1 << 14, 1 << 30):
        product = theory.moments(student, teacher, x, memory=memory)
        joint = theory.moments(student, teacher, x, form="joint", memory=memory)
        assert product.H.attrs["definition"] == "product form"
        assert joint.H.attrs["definition"] == "joint form"
        for layer in range(1, student.depth):
            at = tsdyn.layer(product, layer)
            couplings = theory.coupling(student, teacher, x, layer)
            a, b = couplings.A[..., :-1], couplings.B[..., :-1]
            z, z_star = own.gates[layer - 1], taught.gates[layer - 1]
            f, f_star = own.activations[layer - 1], taught.activations[layer - 1]
            gates = torch.einsum("si,sj->sij", z, z)
            gates_star = torch.einsum("si,sj->sij", z, z_star)
            expected = {
                "A": a.mean(0),
                "B": b.mean(0),
                "D": gates.mean(0),
                "D_star": gates_star.mean(0),
                "L": f.T @ f / 33,
                "L_star": f.T @ f_star / 33,
                "H": b.mean(0) * gates.mean(0),
                "H_star": a.mean(0) * gates_star.mean(0),
                "fanout_norm": oracles.fanout_norms(student, x, layer),
            }
            for key, value in expected.items():
                np.testing.assert_allclose(at[key], value, rtol=1e-11, atol=1e-12, err_msg=key)
            together = tsdyn.layer(joint, layer)
            np.testing.assert_allclose(together.H, (b * gates).mean(0), rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(together.H_star, (a * gates_star).mean(0), rtol=1e-11, atol=1e-12)
        assert bool(product.sel(layer=student.depth).isnull().all().to_array().all())


def test_moments_stream_batches_that_never_are_together():
    student, teacher, x = pair("leaky", samples=40)
    whole = theory.moments(student, teacher, x)
    streamed = theory.moments(student, teacher, (part for part in x.split(13)))
    for name in theory.MOMENTS:
        np.testing.assert_allclose(streamed[name], whole[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("row", ROWS)
def test_expected_update_is_the_gradient_and_theorem_2_is_exact_at_the_top(row):
    """Eq. 1 to rounding; L*W*H* − LWH equals it at the top weight only, and its gap below is reported."""
    student, teacher, x = pair(row)
    weights = [w.clone().requires_grad_(True) for w in student.weights]
    biases = [None if b is None else b.clone().requires_grad_(True) for b in student.biases]
    free = Network(weights, biases, student.activation.name, leak=student.activation.leak or 0.0)
    (0.5 * (teacher(x) - free(x)).square().sum(1).mean()).backward()
    updates = theory.luck_matters_updates(student, teacher, x)
    assert [u.layer for u in updates] == list(range(1, student.depth + 1))
    for update, weight, bias in zip(updates, weights, biases, strict=True):
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(update.exact[:, :-1], -weight.grad, rtol=0, atol=1e-13 * max(1.0, scale))
        if bias is not None:
            torch.testing.assert_close(update.exact[:, -1], -bias.grad, rtol=0, atol=1e-13 * max(1.0, scale))
    assert updates[-1].gap < TOLERANCE
    assert updates[-1].cosine == pytest.approx(1, abs=1e-12)
    linear = student.activation.name == "identity"
    for update in updates[:-1]:
        assert (update.gap < TOLERANCE) == linear  # without gates nothing is approximated
    joint = theory.luck_matters_updates(student, teacher, x, form="joint")
    assert joint[-1].gap < TOLERANCE


@pytest.mark.parametrize("form", ["product", "joint"])
@pytest.mark.parametrize("row", ROWS)
def test_theorem_2_s_update_is_that_of_the_matrices_of_each_sample(row, form):
    """L*W*H* − LWH from per-sample A, B, gates and activations, in batches of any size."""
    student, teacher, x = pair(row)
    found = theory.luck_matters_updates(student, teacher, x, form=form, memory=20_000)

    def one(f):
        return torch.cat([f, torch.ones(len(x), 1, dtype=f.dtype)], 1)

    own, taught = student.trace(x), teacher.trace(x)
    for update, layer in zip(found[:-1], range(1, student.depth), strict=True):
        couple = theory.coupling(student, teacher, x, layer)
        expected = 0
        for sign, beta, net, trace in ((1, couple.A, teacher, taught), (-1, couple.B, student, own)):
            gates = own.gates[layer - 1].unsqueeze(2) * one(trace.gates[layer - 1]).unsqueeze(1)
            h = beta.mean(0) * gates.mean(0) if form == "product" else (beta * gates).mean(0)
            below = [one(([x, *t.activations])[layer - 1]) for t in (trace, own)]
            bias = net.biases[layer - 1]
            weight = torch.cat(
                [net.weights[layer - 1], torch.zeros(net.widths[layer], 1) if bias is None else bias[:, None]], 1
            )
            carried = torch.cat([weight, torch.eye(weight.shape[1], dtype=weight.dtype)[-1:]])
            expected = expected + sign * h @ carried @ (below[0].T @ below[1] / len(x))
        torch.testing.assert_close(update.approximate, expected, rtol=0, atol=1e-12 * float(expected.abs().max() + 1))


def test_gradients_flow_through_the_jacobian():
    """gradcheck of V, a multilinear function of the weights above."""
    net = scaled_network((3, 4, 3, 2), "erf", 0.0, True, 8)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def jacobian(*weights):
        return theory.output_jacobian(Network(list(weights), net.biases, "erf"), x, 1)

    assert torch.autograd.gradcheck(jacobian, [w.clone().requires_grad_(True) for w in net.weights])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, x: theory.output_jacobian(s, x, 0), r"output_jacobian: layer=0; .* has layers 1..2"),
        (lambda s, t, x: theory.coupling(s, t, x, 3), r"coupling: layer=3"),
        (lambda s, t, x: theory.coupling(s, random_network((4, 3, 9)), x, 1), "agree in their outputs, 2 and 9"),
        (lambda s, t, x: theory.moments(s, random_network((4, 3, 3, 2)), x), "the student has 2 layers, the teacher 3"),
        (lambda s, t, x: theory.moments(s, t, x.float()), "x is torch.float32 on cpu, .* move all to one dtype"),
        (lambda s, t, x: theory.moments(s, t, x[:0]), r"shape \(0, 4\); it must be \(sample, input\) with at least"),
        (lambda s, t, x: theory.moments(s, t, iter([])), "no samples"),
        (lambda s, t, x: theory.lemma1_residual(s, t, x * torch.nan), "NaN or infinite"),
        (lambda s, t, x: theory.lemma1_residual(s, t, x[:, :2]), "x has 2 features"),
        (
            lambda s, t, x: theory.lemma1_residual(random_network((4, 3, 2), "erf"), t, x),
            "the student's activation is erf; Lemma 1 needs",
        ),
        (lambda s, t, x: theory.moments(s, t, x, memory=1), "one sample needs .* GB, .* give more"),
        (
            lambda s, t, x: unchecked(theory.moments)(s, t, x, form="joined"),
            "moments: form='joined'; it is 'product' .* or 'joint'",
        ),
        (
            lambda s, t, x: unchecked(theory.expectations)(s, t, x, form="both"),
            "expectations: form='both'; it is 'product' .* or",
        ),
        (
            lambda s, t, x: unchecked(theory.luck_matters_updates)(s, t, x, form=""),
            "luck_matters_updates: form=''; it is 'pr",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    student, teacher = random_network((4, 5, 2)), random_network((4, 3, 2), seed=1)
    with pytest.raises(ValueError, match=message):
        call(student, teacher, torch.randn(6, 4, dtype=torch.float64))


def test_peak_memory_does_not_grow_with_the_number_of_samples():
    """Ten batches, then four hundred: what the process ever held grows by less than two batches (20 KB each) and what
    the allocator rounds up, far below the 8 MB that all samples would be, or their per-sample matrices (670 MB)."""
    code = """
import resource, torch
from tests.theory.test_theory import scaled_network
from tsdyn import derivatives, theory
teacher, student = (scaled_network(w, "relu", 0.0, True, i) for i, w in enumerate([(8, 20, 20, 5), (8, 40, 40, 5)]))
module, loss = student.to_torch(), lambda output, target: 0.5 * (output - target).square().sum()
def work(batches):
    draws = (torch.randn(320, 8, dtype=torch.float64) for _ in range(batches))
    theory.moments(student, teacher, draws)
    theory.lemma1_residual(student, teacher, (torch.randn(320, 8, dtype=torch.float64) for _ in range(batches)))
    for _ in range(batches):
        x = torch.randn(320, 8, dtype=torch.float64)
        derivatives.per_sample_gradient_norms(module, loss, x, teacher(x))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(work(10), work(160))
"""
    words, root = (
        [sys.executable, "-c", code],
        Path(__file__).parent.parent.parent,
    )  # a fork's peak is its parent's, too
    run = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root)
    few, many = map(int, run.stdout.split())
    assert many - few <= 4 << 20


def test_lemma_1s_residual_notices_an_error_in_any_layer(monkeypatch):
    """Of layer 1 alone A and B vanish, where entries are a thousandth of the upper layers'."""
    student, teacher = (scaled_network((6, n, n, n, 3), "relu", 0.0, True, s) for n, s in ((5, 1), (4, 2)))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for network in (student, teacher):  # the same function with small fan-out of layer 1, and 2 and 3
        for layer in range(3):
            network.weights[layer].mul_(1e7)
            network.biases[layer].mul_(1e7 ** (layer + 1))
            network.weights[-1].mul_(1e-7)
    assert theory.lemma1_residual(student, teacher, x) < TOLERANCE
    right = couplings_module._augmented
    for wrong in range(1, student.depth + 1):

        def planted(net, trace, layer, wrong=wrong):
            return right(net, trace, layer) * (layer != wrong)

        monkeypatch.setattr(couplings_module, "_augmented", planted)
        assert theory.lemma1_residual(student, teacher, x) == pytest.approx(1)
