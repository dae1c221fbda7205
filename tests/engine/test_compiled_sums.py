"""The compiled forward pass against the formulas of `observables`."""

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.networks.test_networks import random_network
from tsdyn.engine import compiled_sums, native
from tsdyn.networks import activations
from tsdyn.observables import formulas, member

pytestmark = pytest.mark.skipif(native.load(compiled_sums.SOURCE, compiled_sums.Job) is None, reason="no compiler here")


def drawn(widths, seed, *, bias=True, dtype=torch.float64, name="relu", leak=0.0):
    net = random_network(widths, name, seed=seed, bias=bias)
    parameters = [[None if p is None else p.to(dtype) for p in part] for part in (net.weights, net.biases)]
    return type(net)(*parameters, net.activation.name, leak=leak)


def by_formula(student, teacher, x):
    """Squared error and correlations by the formulas, from all activations at once."""
    theirs, ours = teacher.trace(x), student.trace(x)
    pairs = zip(theirs.activations[:-1], ours.activations[:-1], strict=True)
    return (theirs.output - ours.output).square().sum(), [formulas.correlation(t, f) for t, f in pairs]


@given(
    hidden=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=3),
    ends=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    samples=st.integers(2, 2 * compiled_sums.BLOCK + 40),
    bias=st.booleans(),
    name=st.sampled_from(activations.NAMES),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_formulas(hidden, ends, samples, bias, name, dtype, seed):
    """A sum of N terms keeps a relative error of N eps, whatever its order; a correlation is a ratio of three such."""
    teacher = drawn((ends[0], *(m for m, _ in hidden), ends[1]), seed, dtype=dtype, name=name, leak=0.1)
    student = drawn(
        (ends[0], *(n for _, n in hidden), ends[1]), seed + 100, bias=bias, dtype=dtype, name=name, leak=0.1
    )
    x = torch.randn(samples, ends[0], generator=torch.Generator().manual_seed(seed), dtype=dtype)
    probe = member.Probe(x, teacher)
    found = compiled_sums.sums(student, x, probe.trace.output, probe.taught)
    squared_error, correlations = by_formula(student, teacher, x)
    eps = torch.finfo(dtype).eps
    # an output is a sum of its own, of products that may cancel: as exact as its size before that
    size = float(probe.trace.output.abs().max() + student(x).abs().max())
    depth = sum(w.shape[1] + 1 for w in student.weights)
    scale = size * (float(squared_error) * samples * ends[1]) ** 0.5 + float(squared_error)
    assert float(found.squared_error) == pytest.approx(float(squared_error), abs=4 * eps * (depth + samples) * scale)
    for got, expected, t, f in zip(
        found.correlations, correlations, teacher.trace(x).activations, student.trace(x).activations, strict=False
    ):
        assert got.shape == (t.shape[1], f.shape[1])
        # a node that varies less than rounding moves it is constant in one way of computing and not in the other
        told = (f.std(0) > 1e3 * eps * f.abs().amax(0)) & (t.std(0) > 1e3 * eps * t.abs().amax(0))[:, None]
        room = (1 + (f.abs().amax(0) / f.std(0))) * (1 + (t.abs().amax(0) / t.std(0)))[:, None]
        error = (got - expected).abs() / room
        assert (error[told] <= 4 * eps * (depth + samples)).all()


@pytest.mark.parametrize("samples", [1, 31, 32, 33, 1024, 1025, 5117])
def test_bits_do_not_depend_on_threads(samples):
    teacher, student = drawn((7, 5, 6, 3), 1), drawn((7, 12, 9, 3), 2)
    x = torch.randn(samples, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe, before, found = member.Probe(x, teacher), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(compiled_sums.sums(student, x, probe.trace.output, probe.taught))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.squared_error, found[0].squared_error)
        for a, b in zip(other.correlations, found[0].correlations, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("at_once", [1, 5000, 1 << 20])
def test_passes_made_together_have_the_bits_of_each_alone(monkeypatch, at_once):
    """Of several widths and numbers of samples, over any number of threads, whatever fits in one call."""
    monkeypatch.setattr(compiled_sums, "AT_ONCE", at_once)
    shapes = [((7, 5, 6, 3), 33), ((7, 9, 3), 2500), ((2, 1, 1), 1), ((7, 5, 6, 3), 1024)]
    passes, alone, before = [], [], torch.get_num_threads()
    for i, (widths, samples) in enumerate(shapes):
        teacher, student = drawn(widths, i), drawn(widths, i + 10)
        x = torch.randn(samples, widths[0], generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        probe = member.Probe(x, teacher)
        taught = probe.taught if i != 1 else []
        passes.append(compiled_sums.Pass(student, x, probe.output, taught))
        alone.append(compiled_sums.sums(student, x, probe.output, taught))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for got, wanted in zip(compiled_sums.made(passes), alone, strict=True):
                assert torch.equal(got.squared_error, wanted.squared_error)
                for a, b in zip(got.correlations, wanted.correlations, strict=True):
                    np.testing.assert_array_equal(a, b)
    finally:
        torch.set_num_threads(before)
    assert compiled_sums.made([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("widths", "samples"),
    [((7, 5, 6, 3), 33), ((8, 16, 24), 2500), ((2, 1, 1), 1), ((31, 64), 64), ((5, 9, 9, 8), 1024)],
)
def test_data_that_are_held_turned_give_the_same_bits(widths, samples, dtype):
    """Of layers that are compared and layers that are not, of whole pieces and others, from the first block on."""
    teacher, student = (
        drawn(widths, 1, dtype=dtype),
        drawn((widths[0], *(2 * n for n in widths[1:-1]), widths[-1]), 2, dtype=dtype),
    )
    x = torch.randn(samples, widths[0], generator=torch.Generator().manual_seed(3), dtype=dtype)
    probe = member.Probe(x, teacher)
    for taught in (probe.taught, probe.taught[:1], []):
        one = compiled_sums.Pass(student, x, probe.output, taught)
        (before,) = compiled_sums.made([one])
        one.turn()
        (after,) = compiled_sums.made([one])
        assert torch.equal(after.squared_error, before.squared_error)
        for a, b in zip(after.correlations, before.correlations, strict=True):
            np.testing.assert_array_equal(a, b)
        assert one._turned.numel() == one.turned_numbers


def test_data_that_will_be_passed_often_are_held_turned_as_far_as_there_is_room(monkeypatch):
    teacher, students = drawn((4, 3, 2), 1), [drawn((4, 6, 2), seed) for seed in (2, 3, 4)]
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = member.Probe(x, teacher)

    def made(times):
        passes = [compiled_sums.Pass(s, x, probe.output, probe.taught) for s in students]
        joint = compiled_sums.JointSums(lambda: [passes[0], None, *passes[1:]], times)
        joint.renew([0, 2, 3])
        return (
            [float(joint.of(i).squared_error) for i in (0, 2, 3)],
            [one._turned is not None for one in passes],
            passes,
        )

    found, turned, passes = made(compiled_sums.OFTEN - 1)
    assert turned == [False, False, False]
    # 64 samples in two pieces: five inputs with the constant node, two outputs, three teacher nodes, all padded
    assert passes[0].turned_numbers == 64 * (8 + 8 + 8)
    assert made(compiled_sums.OFTEN)[:2] == (found, [True, True, True])
    monkeypatch.setattr(compiled_sums, "TURNED", 2 * 64 * 24 * 8)
    assert made(compiled_sums.OFTEN)[:2] == (found, [True, True, False])

    def full(self):
        raise MemoryError

    monkeypatch.setattr(compiled_sums.Pass, "turn", full)
    assert made(compiled_sums.OFTEN)[:2] == (found, [False, False, False])


def test_a_pass_is_of_the_numbers_that_the_network_has_when_it_is_made(monkeypatch):
    teacher, students = drawn((4, 3, 2), 1), [drawn((4, 6, 2), seed) for seed in (2, 3, 4)]
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe, made, calls = member.Probe(x, teacher), compiled_sums.made, []
    monkeypatch.setattr(compiled_sums, "made", lambda passes: calls.append(len(passes)) or made(passes))
    passes = [compiled_sums.Pass(s, x, probe.output, probe.taught) for s in students]
    joint = compiled_sums.JointSums(lambda: [*passes, None])
    joint.renew([0, 2, 3])
    first = [joint.of(i) for i in (0, 2)]
    assert calls == [2]
    assert joint.of(3) is None  # it has no pass
    other = float(joint.of(1).squared_error)  # not asked for with the others: made by itself
    assert other == pytest.approx(float(by_formula(students[1], teacher, x)[0]), rel=1e-12)
    kept = [s.squared_error.clone() for s in first]
    students[0].weights[0].mul_(2)
    assert torch.equal(joint.of(0).squared_error, kept[0])  # as it was when they were renewed and asked for
    joint.renew([0, 1])
    again = joint.of(0)
    assert float(again.squared_error) == pytest.approx(float(by_formula(students[0], teacher, x)[0]), rel=1e-12)
    assert all(torch.equal(a.squared_error, b) for a, b in zip(first, kept, strict=True))  # what was given out stays

    def full(passes):
        if len(passes) > 1:
            raise MemoryError
        return made(passes)

    joint.renew([0, 1, 2])
    monkeypatch.setattr(compiled_sums, "made", full)
    assert torch.equal(joint.of(0).squared_error, again.squared_error)


def test_a_node_of_small_variance_keeps_its_digits():
    """f = 1 + 1e-6 x: centred by a mean within its own scatter, the correlation with x is exact to 1e-6 of eps."""
    samples = 3000
    x = torch.randn(samples, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher, student = drawn((1, 1, 1), 1), drawn((1, 1, 1), 2)
    student.weights[0].fill_(1e-6)
    student.biases[0].fill_(1.0)
    t = formulas.standardized(x)
    (got,) = compiled_sums.sums(student, x, teacher(x), [compiled_sums.Taught(t)]).correlations
    # f itself is rounded to eps/2, and the scatter of those errors is 2**-53 / 1e-6 of its own
    assert float(got) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("samples", [40, 2500])
def test_constant_and_dead_nodes_are_nan(samples):
    teacher, student = drawn((4, 3, 2), 1), drawn((4, 6, 2), 2)
    student.weights[0][2], student.biases[0][2] = 0, -1  # never fires
    student.weights[0][4], student.biases[0][4] = 0, 0.3  # always the same
    student.weights[0][5] = torch.nan
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    probe = member.Probe(x, teacher)
    found = compiled_sums.sums(student, x, probe.trace.output, probe.taught)
    lost = found.correlations[0].isnan()
    assert lost[:, [2, 4, 5]].all()
    assert not lost[:, [0, 1, 3]].any()
    assert found.squared_error.isnan()


def walled(t, held):
    """The same numbers, ending where memory begins that nobody may read: who does ends with this process."""
    size = -(-t.numel() * t.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    found = torch.frombuffer(room, dtype=t.dtype, count=t.numel(), offset=size - t.numel() * t.element_size())
    held.append(found.copy_(t.flatten()))
    return found.view(t.shape)


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 9, 2, 17), (8, 8, 13, 5), (100, 10, 50, 16)])
def test_nothing_is_read_beyond_the_data(sizes, dtype):
    """Rows are read in whole vectors, past their ends; the last ones must not be."""
    width, known, nodes, outputs = sizes
    teacher, student = drawn((width, known, outputs), 1, dtype=dtype), drawn((width, nodes, outputs), 2, dtype=dtype)
    for samples in (1, 2, 31, 32, 33, 39, 40, 41, 64, 65, 1024, 1025, 1056, 1064):
        held = []
        x = torch.randn(samples, width, generator=torch.Generator().manual_seed(3), dtype=dtype)
        probe = member.Probe(x, teacher)
        (taught,) = probe.taught
        there = compiled_sums.Taught(walled(taught.activations, held))
        found = compiled_sums.sums(student, walled(x, held), walled(probe.trace.output, held), [there])
        plain = compiled_sums.sums(student, x, probe.trace.output, [taught])
        assert torch.equal(found.squared_error, plain.squared_error)
        np.testing.assert_array_equal(found.correlations[0], plain.correlations[0])
