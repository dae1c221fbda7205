"""Compiled normal numbers are numpy's, bit by bit, and leave the generator as numpy leaves it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdyn.engine import compiled_normals, native
from tsdyn.engine.compiled_normals import Job

pytestmark = pytest.mark.skipif(native.load(compiled_normals.SOURCE, Job) is None, reason="no compiler here")


@pytest.fixture(scope="module")
def layers():
    found = compiled_normals._trusted()
    assert found is not None  # else they would be numpy's own, and the tests of themselves
    return found


def pair(seed, counter=0):
    bits = [np.random.Philox(key=seed, counter=counter) for _ in range(2)]
    return [np.random.Generator(each) for each in bits]


def same(ours, theirs):
    assert repr(ours.bit_generator.state) == repr(theirs.bit_generator.state)


@given(
    seed=st.integers(0, 2**64 - 1),
    counts=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    before=st.integers(0, 5),
    counter=st.sampled_from([0, 1, 2**64 - 3, 2**128 - 300, 2**256 - 2]),
)
@settings(max_examples=40, deadline=None)
def test_any_part_of_any_stream(layers, seed, counts, before, counter):
    ours, theirs = pair(seed, counter)
    assert ours.integers(0, 9, before).tolist() == theirs.integers(0, 9, before).tolist()
    for count in counts:
        found = compiled_normals.drawn(ours, count, layers)
        assert found.tobytes() == theirs.standard_normal(count).tobytes()
        same(ours, theirs)
    assert ours.random() == theirs.random()


def test_many_numbers_of_many_streams(layers):
    """About 1,500 beyond the edge and 75,000 that a second number decides."""
    for seed in range(6):
        ours, theirs = pair(seed)
        found = compiled_normals.drawn(ours, 1_000_000, layers)
        assert found.tobytes() == theirs.standard_normal(1_000_000).tobytes()
        same(ours, theirs)
        assert np.abs(found).max() > layers.edge


@pytest.mark.parametrize("margin", [1e-4, 0.3, 1.0])
def test_what_is_close_is_left_to_numpy(layers, monkeypatch, margin):
    """With a margin of 1 all that the first word does not decide is numpy's."""
    ours, theirs = pair(3)
    asked, draw = [], np.random.Generator.standard_normal

    class Counting(np.random.Generator):
        def standard_normal(self, *given):
            asked.append(self.bit_generator.state["buffer_pos"])
            return draw(self, *given)

    found = compiled_normals.drawn(Counting(ours.bit_generator), 200_000, layers, margin)
    assert found.tobytes() == theirs.standard_normal(200_000).tobytes()
    same(ours, theirs)
    assert 0 < len(asked) < 200_000 * 0.02
    assert set(asked) <= {1, 2, 3, 4}  # as numpy's own states are, and from 2.5 on must be
    assert margin < 1e-3 or 4 in asked  # where a block begins


def test_layers_are_a_ziggurat_of_equal_areas(layers):
    """256 layers under exp(-x²/2) of the same area, the lowest with the tail beyond the edge."""
    from scipy import integrate

    edges = layers.widths * 2.0**52
    tail, _ = integrate.quad(lambda x: np.exp(-x * x / 2), layers.edge, np.inf)
    area = layers.edge * np.exp(-(layers.edge**2) / 2) + tail
    assert edges[0] * layers.heights[255] == pytest.approx(area, rel=1e-12)
    areas = edges[1:] * (layers.heights[:-1] - layers.heights[1:])
    assert areas == pytest.approx(np.full(255, area), rel=1e-11)


def test_few_numbers_and_other_generators_are_numpys(monkeypatch):
    monkeypatch.setattr(compiled_normals, "drawn", None)
    for bits in (np.random.PCG64, np.random.MT19937):
        ours, theirs = (np.random.Generator(bits(5)) for _ in range(2))
        found = compiled_normals.standard_normal(ours, 200, 200)
        assert found.tobytes() == theirs.standard_normal((200, 200)).tobytes()
    ours, theirs = pair(1)
    assert compiled_normals.standard_normal(ours, 5, 4).tobytes() == theirs.standard_normal((5, 4)).tobytes()


def test_numbers_that_differ_from_numpys_are_not_used(monkeypatch, caplog):
    """As with a numpy whose ziggurat is another."""
    true = compiled_normals.asked()
    compiled_normals._trusted.cache_clear()
    monkeypatch.setattr(compiled_normals, "asked", lambda: true._replace(widths=np.nextafter(true.widths, 1)))
    with caplog.at_level("INFO", "tsdyn"):
        ours, theirs = pair(2)
        found = compiled_normals.standard_normal(ours, 400, 100)
    compiled_normals._trusted.cache_clear()
    assert found.tobytes() == theirs.standard_normal((400, 100)).tobytes()
    assert "differ" in caplog.text
