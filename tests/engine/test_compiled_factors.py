"""Compiled products of each sample's factors beside torch's, and what they do not take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdyn.derivatives.factors import Factors
from tsdyn.engine import compiled_factors

served = pytest.mark.skipif(
    not compiled_factors.serves(torch.zeros(1, 2, 16), torch.zeros(1, 2, 3)), reason="no compiler"
)


def drawn(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@served
@settings(max_examples=40, deadline=None)
@given(
    samples=st.integers(1, 5),
    positions=st.integers(1, 40),
    lines=st.integers(1, 5),
    outputs=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.sampled_from([1, 2]),
)
def test_products_and_their_norms(samples, positions, lines, outputs, dtype, threads):
    inputs = lines * 64 // dtype.itemsize
    f = drawn(samples, positions, inputs, dtype=dtype, seed=0)
    g = drawn(samples, positions, outputs, dtype=dtype, seed=1)
    right = torch.einsum("sto,sti->soi", g.double(), f.double())
    # a sum of t terms is off by at most t eps of the sum of their sizes (Higham 2002, 3.1)
    room = (positions + 1) * torch.finfo(dtype).eps * torch.einsum("sto,sti->soi", g.double().abs(), f.double().abs())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compiled_factors.products(f, g, torch.full((samples, outputs, inputs), torch.nan, dtype=dtype))
        squares = compiled_factors.squared_norms(f, g)
    finally:
        torch.set_num_threads(before)
    assert bool(((found.double() - right).abs() <= room).all())
    exact = found.double().square().sum((1, 2))
    terms = outputs * inputs / (64 // dtype.itemsize) + 64
    torch.testing.assert_close(squares.double(), exact, rtol=terms * torch.finfo(dtype).eps, atol=0)


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("positions", "inputs", "outputs"), [(3, 16, 8), (9, 64, 48), (9, 24, 5), (2, 7, 5), (3, 16, 1)]
)
def test_factors_are_the_same_with_and_without(positions, inputs, outputs, dtype, monkeypatch):
    f, g = (drawn(4, positions, n, dtype=dtype, seed=n) for n in (inputs, outputs))
    held = Factors(f, g, torch.Size((outputs, inputs)), 1, True)
    into = torch.empty(4, outputs, inputs, dtype=dtype)
    found = held.weight(into), held.squared_norms(), held.weight()
    monkeypatch.setattr(compiled_factors, "serves", lambda *_: False)
    room = {"rtol": 100 * positions * torch.finfo(dtype).eps, "atol": 100 * positions * torch.finfo(dtype).eps}
    torch.testing.assert_close(found[0], held.weight(), **room)
    torch.testing.assert_close(found[2], held.weight(), **room)
    torch.testing.assert_close(found[1], held.squared_norms(), rtol=room["rtol"] * inputs, atol=0)


@served
def test_what_is_not_laid_out_for_it_goes_through_torch():
    f, g = drawn(3, 4, 16, dtype=torch.float64, seed=0), drawn(3, 4, 8, dtype=torch.float64, seed=1)
    assert compiled_factors.serves(f, g)
    apart = torch.empty(3 * 4 * 16 + 1, dtype=torch.float64)[1:].view(3, 4, 16)
    assert not compiled_factors.serves(apart, g)  # does not begin at a cache line
    assert not compiled_factors.serves(f.mT.contiguous().mT, g)
    assert not compiled_factors.serves(f[..., :12].contiguous(), g)
    assert not compiled_factors.serves(f.to(torch.complex128), g.to(torch.complex128))
    assert not compiled_factors.serves(f.clone().requires_grad_(True), g)
    assert not compiled_factors.serves(f.float(), g)
    assert not compiled_factors.serves(f[:0], g[:0])
    expanded = g[:, :1].expand(3, 4, 8)
    held = Factors(f, expanded, torch.Size((8, 16)), 1, False)
    torch.testing.assert_close(held.weight(), torch.bmm(expanded.mT, f))
