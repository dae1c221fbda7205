"""Compiled gradients of each sample's convolution beside products of its patches, and what they do not take."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tsdyn.derivatives.factors import Convolved
from tsdyn.engine import compiled_patches

served = pytest.mark.skipif(
    not compiled_patches.serves(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), reason="no compiler"
)


def drawn(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


def by_patches(layer, x, g):
    """Σ_t g_t f_tᵀ of each sample in float64, and the same sum of the terms' sizes."""
    f = F.unfold(x.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    f = f.view(len(x), layer.groups, -1, f.shape[-1])
    g = g.double().reshape(len(x), layer.groups, -1, f.shape[-1])
    shape = (len(x), *layer.weight.shape)
    return tuple(torch.einsum("sgot,sgit->sgoi", b, a).reshape(shape) for a, b in ((f, g), (f.abs(), g.abs())))


@served
@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 19),
    below=st.integers(1, 5),
    channels=st.integers(1, 11),
    groups=st.integers(1, 3),
    image=pairs(1, 20),
    kernel=pairs(1, 4),
    stride=pairs(1, 3),
    padding=pairs(0, 3),
    dilation=pairs(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.sampled_from([1, 2]),
)
def test_gradients_and_their_norms(
    samples, below, channels, groups, image, kernel, stride, padding, dilation, dtype, threads
):
    """Every tile's size, samples that fill no vector, and borders of zeros on each side."""
    image = tuple(max(n, (k - 1) * d + 1) for n, k, d in zip(image, kernel, dilation, strict=True))
    layer = nn.Conv2d(below * groups, channels * groups, kernel, stride, padding, dilation, groups, dtype=dtype)
    x = drawn(samples, below * groups, *image, dtype=dtype, seed=0)
    g = drawn(*layer(x).shape, dtype=dtype, seed=1)
    right, size = by_patches(layer, x, g)
    # a sum of t terms is off by at most t eps of the sum of their sizes (Higham 2002, 3.1)
    room = (g[0, 0].numel() + 1) * torch.finfo(dtype).eps * size
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compiled_patches.gradients(layer, x, g, torch.full(right.shape, torch.nan, dtype=dtype))
        squares = compiled_patches.squared_norms(layer, x, g)
        alone = compiled_patches.gradients(layer, x[-1:], g[-1:], torch.empty(1, *right.shape[1:], dtype=dtype))
    finally:
        torch.set_num_threads(before)
    assert bool(((found.double() - right).abs() <= room).all())
    assert torch.equal(alone[0], found[-1])  # the same bits in every company
    exact = found.double().square().flatten(1).sum(1)
    terms = layer.weight[0].numel() + layer.weight.shape[0]
    torch.testing.assert_close(squares.double(), exact, rtol=terms * torch.finfo(dtype).eps, atol=0)


@served
def test_images_that_are_turned_band_by_band():
    """Of 64 channels of 90 x 80, a band of rows fits; its numbers go on where those of the band before it ended."""
    layer = nn.Conv2d(64, 9, 3, padding=1, dtype=torch.float64)
    x, g = drawn(2, 64, 90, 80, dtype=torch.float64, seed=0), drawn(2, 9, 90, 80, dtype=torch.float64, seed=1)
    right, size = by_patches(layer, x, g)
    found = compiled_patches.gradients(layer, x, g, torch.empty_like(right))
    assert bool(((found - right).abs() <= 7201 * torch.finfo(torch.float64).eps * size).all())


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "channels"), [(12, 3), (2, 24)])  # in the second, positions in pairs are cheaper
def test_gradients_are_the_same_with_and_without(size, channels, dtype, monkeypatch):
    layer = nn.Conv2d(channels, channels, 3, padding=1, dtype=dtype)
    x, g = (drawn(5, channels, size, size, dtype=dtype, seed=seed) for seed in (0, 1))
    held = Convolved(x, g, layer)
    found = held.weight(), held.squared_norms()
    monkeypatch.setattr(compiled_patches, "serves", lambda *_: False)
    _, size_of_terms = by_patches(layer, x, g)
    room = 2 * (size**2 + 1) * torch.finfo(dtype).eps * float(size_of_terms.max())
    torch.testing.assert_close(found[0], held.weight(), rtol=0, atol=room)
    torch.testing.assert_close(found[1], held.squared_norms(), rtol=1000 * torch.finfo(dtype).eps, atol=0)


@served
def test_what_it_cannot_take_goes_through_torch():
    x, g = drawn(3, 2, 5, 5, dtype=torch.float64, seed=0), drawn(3, 4, 3, 3, dtype=torch.float64, seed=1)
    assert compiled_patches.serves(x, g)
    assert not compiled_patches.serves(x.to(torch.complex128), g.to(torch.complex128))
    assert not compiled_patches.serves(x.half(), g.half())
    assert not compiled_patches.serves(x.float(), g)
    assert not compiled_patches.serves(x.clone().requires_grad_(True), g)
    assert not compiled_patches.serves(x[:0], g[:0])
    assert not compiled_patches.serves(x[0], g[0])
    layer = nn.Conv2d(2, 4, 3, dtype=torch.float64)
    apart = Convolved(x.to(memory_format=torch.channels_last), g.mT.contiguous().mT, layer)  # copied where it is needed
    torch.testing.assert_close(apart.weight(), by_patches(layer, x, g)[0])
    with pytest.raises(ValueError, match=r"gradients: gradients of shape \(3, 4, 2, 2\) at a layer that gives"):
        compiled_patches.gradients(layer, x, g[..., :2, :2].contiguous(), torch.empty(3, 4, 2, 3, 3).double())
